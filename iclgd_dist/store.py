"""The store: a directory or a bucket in which each finished cell appears once, whole, and stays. Knows cells and manifests; nothing of models, plans or Ray.

    cells/<key>.arrows               one committed cell; the name is all that planning reads
    compacted/part-<n>-<sha>.arrows  many cells; counts only if the newest manifest lists it
    compacted/manifest-<n>.json      the parts, their sha256 and their keys; never changed once written
    attempts/*.json  sweeps/*.json   executions of blocks; resolved sweeps with their planned keys
    captures/*.safetensors           what captures.py keeps
    claims/*                         what is being computed now (claims.py)

A commit publishes a cell, a compaction manifest n+1: of two that both started from manifest n one fails, so none can undo the other. The lock only spares double
work. A reader lists the loose cells first and reads the manifest last: a loose cell is deleted only after a manifest holds it, so none is missed;
a cell in both counts once and the manifest wins. On NFS another machine's view may lag by the attribute cache (up to a minute): a cell may be late, or computed twice, never lost.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from iclgd_dist import cells, files, locks, manifests, measured
from iclgd_dist.files import Location, StoreError, Vanished, naming
from iclgd_dist.manifests import Manifest, Part
from iclgd_dist.schema import ATTEMPT

__all__ = ["Results", "Store", "StoreError", "read_results"]

PART_GROUPS = 10  # batches per part
MAX_SMALL_PARTS = 8  # parts of less than cells.GROUP_CELLS * PART_GROUPS cells; when there are so many, the next compaction merges them
DEBRIS_STALE_SECONDS = 86_400  # what killed processes left is deleted when it is this old

CELL_NAME = re.compile(r"([0-9a-f]{64})\.(?:arrows|parquet)")
_SUFFIXES = (cells.SUFFIX, cells.OLDER_SUFFIX)
_HASH = re.compile("[0-9a-f]{40}")  # name of an attempt: hash of its content; in stores of older versions 32 random digits
_OTHER_CONTENT = "is damaged: its content is not that of its name"
_SWEEP = {"digest", "kind", "resolved", "keys", "created_at"}
_ATTEMPT = pa.schema([(name, kind) for name, kind, _ in ATTEMPT])
_README = """Results of in-context learning versus gradient descent, one row per finished grid point; written by iclgd, not to be edited by hand.
Read it with: from iclgd_dist.store import read_results; results = read_results("this directory"); results.cells.to_pandas()
cells/ holds one Arrow stream per result, compacted/ the same many to a file (the newest manifest lists which files count), attempts/ and sweeps/ the history, captures/ what was kept.
"""


def _do_nothing(point: str) -> None:
    """Tests put something in its place that kills the process or raises at a named point of a commit or a compaction."""


fault_point: Callable[[str], None] = _do_nothing


def publish(path: Location, data: bytes) -> bool:
    return files.publish(path, data, reach=fault_point)


@dataclass(frozen=True)
class Results:
    """What a store holds, as Arrow tables. All but `cells` and `attempts` begin with the cell's key (measures: `cell`; `pairs`: cell_a, cell_b)."""

    cells: pa.Table
    folds: pa.Table
    layers: pa.Table
    examples: pa.Table
    controls: pa.Table
    pairs: pa.Table
    metrics: pa.Table
    extras: pa.Table
    attempts: pa.Table


class Store:
    """The results of sweeps in one place, shared by any number of processes and machines: a directory, or s3://bucket/prefix and its like.

    Errors: StoreError when it cannot be read or written; what was committed before stays.
    """

    def __init__(self, root: str | Location) -> None:
        self.root = files.location(root)
        self._cells, self._compacted, self._attempts, self._sweeps = (self.root / name for name in ("cells", "compacted", "attempts", "sweeps"))
        self._newest = Manifest()

    def prepare(self) -> None:
        """Make the directories and try one write the way a commit writes. Errors: StoreError for a file, a read-only or a full place."""
        for folder in (self.root, self._cells, self._compacted, self._attempts, self._sweeps, self.root / "claims"):
            files.make_folder(folder)
        probe = files.temporary_in(self._cells)
        publish(probe, b"probe")
        if publish(probe, b"another probe"):
            raise StoreError("does not keep the first of two that write the same name", self.root, way_out="choose a store with conditional writes")
        files.remove(probe)
        if not files.exists(self.root / "README.txt"):
            publish(self.root / "README.txt", _README.encode())

    def keys(self) -> set[str]:
        """Return the keys of all committed cells, from names and the manifest: no file of a cell is opened. A missing store is empty."""
        return self.loose().keys() | self.manifest().commits.keys()

    def __contains__(self, key: str) -> bool:
        return self._is_loose(key) or key in self.manifest().commits

    def commit(self, row: dict[str, Any]) -> bool:
        """Store one cell, a row of CELL; it is on disk when this returns. Returns True if this call stored it, False if it was there.

        Errors: ValueError naming the column that is unknown, of the wrong type, NaN or infinite; StoreError when it cannot be written.
        """
        path = self.cell(row.get("key", ""))
        data = cells.encode(row)
        if row["key"] in self or not publish(path, data):
            return False
        # While we wrote, another's cell may have been committed, compacted and deleted here: then ours is a second one.
        if self.manifest().commits.get(row["key"], short_hash(data)) != short_hash(data):
            files.remove(path)
            return False
        return True

    def record_attempt(self, attempt: dict[str, Any]) -> None:
        """Store how one execution of a block went: the columns of ATTEMPT."""
        cells.table_of([attempt], _ATTEMPT)
        data = json.dumps(attempt, allow_nan=False).encode()
        publish(self._attempts / f"{_name_of(data)}.json", data)

    def attempts(self) -> pa.Table:
        """Return all attempts, oldest first."""
        rows = self._read_json(self._attempts)
        try:
            return cells.table_of(list(rows.values()), _ATTEMPT).sort_by("created_at")
        except ValueError:
            for path, row in rows.items():
                _check_attempt(path, row)
            raise

    def save_sweep(self, *, digest: str, resolved: dict[str, Any], keys: list[str], kind: str = "grid") -> Location:
        """Store what a run set out to do: the resolved sweep and its planned keys; or, of a search, the keys that it asks for. The same is stored once."""
        if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
            raise ValueError(f"digest must be 8 to 64 hex digits, got {digest!r}")
        path = self._sweeps / f"{digest}-{_plan_hash(keys)}{'' if kind == 'grid' else f'-{kind}'}.json"  # a grid may plan just what a search asks for
        if not files.exists(path):
            saved = {"digest": digest, "kind": kind, "resolved": resolved, "keys": keys, "created_at": datetime.datetime.now(datetime.UTC).isoformat()}
            publish(path, json.dumps(saved | {"sha256": manifests.checksum(saved)}, allow_nan=False).encode())
        return path

    def sweeps(self) -> list[dict[str, Any]]:
        """Return what `save_sweep` stored: digest, kind (older ones have none: grid), resolved, keys and created_at of each, the oldest first."""
        found = self._read_json(self._sweeps)
        for path, sweep in found.items():
            _check_sweep(path, sweep)
        return sorted(found.values(), key=lambda sweep: str(sweep.get("created_at", "")))

    def planned(self, kind: str = "grid") -> set[str]:
        """Return the keys that the sweeps of a kind planned, or that searches asked for."""
        return {key for sweep in self.sweeps() if sweep.get("kind", "grid") == kind for key in sweep["keys"]}

    def compact(self) -> int:
        """Move the loose cells into one file (merging small ones when there are many) and return how many; 0 if another process is at it.

        Readers and writers need not stop. Memory: about cells.GROUP_CELLS cells.
        """
        if not self.loose() or not (lock := locks.acquire(self._compacted / "lock")):
            return 0
        with locks.touched([lock]):
            before = self.manifest()
            try:
                return self._compact(before)
            except Vanished as error:
                if self.manifest().number == before.number:
                    raise StoreError("is missing; the newest manifest lists it", str(error)) from error
                return 0  # another process took the lock over

    def cell(self, key: str) -> Location:
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"key must be 64 lower-case hex digits, got {key!r}")
        return self._cells / (key + cells.SUFFIX)

    def _is_loose(self, key: str) -> bool:
        path = self.cell(key)
        return files.exists(path) or files.exists(path.with_suffix(cells.OLDER_SUFFIX))

    def loose(self) -> dict[str, Location]:
        """Return the loose cells' files by key, in the order of the keys. Of a cell that an older version wrote at the same time as this one, one counts."""
        names = sorted(files.names_in(self._cells), reverse=True)
        found = {match[1]: self._cells / name for name in names if (match := CELL_NAME.fullmatch(name))}
        return dict(reversed(found.items()))

    def manifest(self) -> Manifest:
        """Return the newest manifest. A manifest never changes, so one that was read is not read again."""
        for _ in range(10):
            number, name = max(((int(m[1]), m[0]) for m in map(manifests.NAME.fullmatch, files.names_in(self._compacted)) if m), default=(0, ""))
            if number > self._newest.number:
                try:
                    self._newest = manifests.read(self._compacted / name, number)
                except Vanished:  # two compactions since it was listed
                    continue
            return self._newest
        raise StoreError("manifests come and go while they are read", self._compacted, way_out="check the disk, then run the same command again")

    def _read_json(self, folder: Location) -> dict[Location, dict[str, Any]]:
        paths = [folder / name for name in records_in(folder)]
        with ThreadPoolExecutor(files.num_readers(self.root)) as pool:
            return dict(zip(paths, pool.map(read_json, paths), strict=True))

    def verify_records(self) -> list[StoreError]:
        """Read every record of an attempt or a sweep and return what is wrong, also where only its content is not that of its name."""
        errors = []
        for folder, check in ((self._attempts, _check_attempt), (self._sweeps, _check_sweep)):
            for path in (folder / name for name in records_in(folder)):
                with contextlib.suppress(Vanished):
                    try:
                        check(path, read_json(path))
                    except StoreError as error:
                        errors.append(error)
        return errors

    def load(self, key: str, path: Location) -> tuple[pa.Table, str]:
        """Return a loose cell as a table of one row, and the hash of its file."""
        data = files.read(path)
        tables = cells.decode(data, path)
        if [each for table in tables for each in table["key"].to_pylist()] != [key]:
            raise StoreError("is damaged: it does not hold the one cell of its name", path)
        return tables[0], short_hash(data)

    def _loose_tables(self, loose: dict[str, Location], commits: dict[str, str]) -> Iterator[pa.Table]:
        """Yield loose cells, many to a table; the hashes of their files go into `commits`."""
        every = list(loose.items())
        with ThreadPoolExecutor(files.num_readers(self.root)) as pool:
            for start in range(0, len(every), cells.GROUP_CELLS):
                batch = every[start : start + cells.GROUP_CELLS]
                loaded = list(pool.map(lambda one: self.load(*one), batch))
                commits.update({key: commit for (key, _), (_, commit) in zip(batch, loaded, strict=True)})
                yield pa.concat_tables([table for table, _ in loaded]).combine_chunks()

    def part_tables(self, part: Part) -> list[pa.Table]:
        path = self._compacted / part.file
        tables = cells.decode(files.contents(path), path)
        if [key for table in tables for key in table["key"].to_pylist()] != list(part.commits):
            raise StoreError("is damaged: it does not hold the cells that the manifest lists", path)
        return tables

    def _compact(self, base: Manifest) -> int:
        fresh = {key: path for key, path in self.loose().items() if key not in base.commits}
        small = [part for part in base.parts if len(part.commits) < cells.GROUP_CELLS * PART_GROUPS]
        merged = small if fresh and len(small) >= MAX_SMALL_PARTS else []
        commits = {key: commit for part in merged for key, commit in part.commits.items()}
        groups = cells.regroup(chain(*map(self.part_tables, merged), self._loose_tables(fresh, commits)))
        new = [self.write_part(base.number + 1, chain([first], islice(groups, PART_GROUPS - 1)), commits) for first in groups]
        is_published = False
        if new:
            fault_point("before_manifest")
            # Where this fails, it may have come about all the same: what it lists stays then, and so does what it would replace.
            is_published = publish(*manifests.following(self._compacted, base.number, [*(part for part in base.parts if part not in merged), *new]))
            is_published &= self.manifest().number == base.number + 1  # else so many came between that this number was free again
            fault_point("after_manifest")
        self._clear(replaced={part.file for part in (*base.parts, *new)})
        return sum(len(part.commits) for part in new) - sum(len(part.commits) for part in merged) if is_published else 0

    def write_part(self, number: int, groups: Iterable[pa.Table], commits: dict[str, str]) -> Part:
        """Write a file of many cells, which counts as soon as a manifest lists it; `commits` may name more cells than it holds."""
        keys, sha256, name = files.add(
            self._compacted, lambda path: cells.write_part(path, groups), lambda sha256: f"part-{number:08d}-{sha256[:16]}{cells.SUFFIX}"
        )
        return Part(file=name, sha256=sha256, commits={key: commits[key] for key in keys})

    def _clear(self, *, replaced: set[str]) -> None:
        """Delete loose cells that the newest manifest holds, those of the `replaced` parts that it does not list, and what killed processes left long ago.

        Errors: StoreError where a part that it lists is not there; nothing is deleted then.
        """
        newest = self.manifest()
        files.sync(self._compacted)  # another's manifest may be on no disk yet
        names = files.names_in(self._compacted)
        listed = {part.file for part in newest.parts}
        if (missing := sorted(listed.difference(names))) and self.manifest().number == newest.number:
            raise StoreError("is missing; the newest manifest lists it", self._compacted / missing[0])
        gone = [
            self._cells / f"{key}{suffix}"
            for key, suffix in map(os.path.splitext, files.names_in(self._cells))
            if key in newest.commits and suffix in _SUFFIXES
        ]
        gone += [self._compacted / name for name in replaced - listed]
        gone += [self._compacted / m[0] for m in map(manifests.NAME.fullmatch, names) if m and int(m[1]) < newest.number - 1]
        now = files.now(self._compacted)
        for folder in (self._cells, self._compacted, self._attempts, self._sweeps, self.root / "captures", self.root / "measures"):
            for name in files.names_in(folder):
                if name.startswith(".tmp-"):
                    with contextlib.suppress(Vanished):
                        gone += [folder / name] if now - files.modified(folder / name) > DEBRIS_STALE_SECONDS else []
        with ThreadPoolExecutor(files.num_readers(self.root)) as pool:
            list(pool.map(files.remove, gone))

    def _tables(self) -> list[pa.Table]:
        """Return all cells, each once: parts in the manifest's order, then loose cells by key."""
        known = self.manifest().commits
        loose = {key: path for key, path in self.loose().items() if key not in known}
        tables = list(self._loose_tables(loose, {}))
        manifest = self.manifest()  # after the loose files were read: whichever of them had been compacted meanwhile are in it
        compacted = pa.array(manifest.commits.keys() & loose.keys(), pa.string())
        if len(compacted):
            tables = [table.filter(pc.invert(pc.is_in(table["key"], compacted))).combine_chunks() for table in tables]
        with ThreadPoolExecutor() as pool:
            return [table for part in pool.map(self.part_tables, manifest.parts) for table in part] + tables


def read_json(path: Location) -> dict[str, Any]:
    """Return a record of an attempt or of a sweep. Errors: StoreError when it is damaged."""
    with naming(path, "read"):
        found = json.loads(data := files.read(path))
    if not isinstance(found, dict):
        raise StoreError("is damaged: must be a JSON object", path)
    name, said = path.name.partition(".")[0], found.pop("sha256", None)
    if (_HASH.fullmatch(name) and _name_of(data) != name) or (said is not None and said != manifests.checksum(found)):
        raise StoreError(_OTHER_CONTENT, path)
    return found


def records_in(folder: Location) -> list[str]:
    """Return the names of the records of attempts or of sweeps."""
    return [name for name in sorted(files.names_in(folder)) if name.endswith(".json") and not name.startswith(".")]


def _check_attempt(path: Location, row: dict[str, Any]) -> None:
    _refuse_unknown(path, row.keys() - set(_ATTEMPT.names))
    with naming(path, "read"):
        cells.table_of([row], _ATTEMPT)


def _check_sweep(path: Location, sweep: dict[str, Any]) -> None:
    _refuse_unknown(path, sweep.keys() - _SWEEP)
    keys = sweep.get("keys")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise StoreError("is damaged: it has no list of keys", path)
    if _plan_hash(keys) not in path.name:
        raise StoreError(_OTHER_CONTENT, path)


def _refuse_unknown(path: Location, names: set[str]) -> None:
    if names:
        raise StoreError(f"holds columns this version does not know: {', '.join(map(repr, sorted(names)))}", path, way_out=cells.UPDATE)


def _plan_hash(keys: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]


def _name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_results(store: str | Location | Store) -> Results:
    """Read everything a store holds; writers and compactions may go on meanwhile.

    Errors: StoreError naming the file that is damaged, of a newer version, or missing.
    """
    store = store if isinstance(store, Store) else Store(store)
    if not files.is_folder(store.root):
        raise StoreError("is not a store: no such directory", store.root, errno.ENOENT, "check the path; `iclgd run` makes a store")
    for _ in range(10):
        try:
            tables, later, attempts = store._tables(), measured.read(store.root), store.attempts()
            break
        except Vanished as error:  # compacted, merged or set aside after it was listed
            missing = error
    else:
        raise StoreError("is listed in the newest manifest and missing", str(missing))
    flat = cells.flatten(tables)
    for kind, name in cells.KINDS.items():  # what was measured with the cell comes first and counts
        new = measured.only_new(flat[name], later.filter(pc.equal(later["kind"], kind)), flat["cells"]["key"].combine_chunks()) if len(later) else []
        flat[name] = cells.named(kind, pa.concat_tables([flat[name], new] if len(new) else [flat[name]]))
    return Results(**flat, attempts=attempts)
