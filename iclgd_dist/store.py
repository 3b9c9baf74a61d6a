"""The store: a directory in which each finished cell appears once, whole, and stays. Knows cells and manifests; nothing of models, plans or Ray.

    cells/<key>.arrows               one committed cell; the name is all that planning reads
    compacted/part-<n>-<sha>.arrows  many cells; counts only if the newest manifest lists it
    compacted/manifest-<n>.json      the parts, their sha256 and their keys; never changed once written
    attempts/*.json  sweeps/*.json   executions of blocks; resolved sweeps with their planned keys
    captures/*.safetensors           what captures.py keeps

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
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from iclgd_dist import cells, files, manifests, measured
from iclgd_dist.files import StoreError, Vanished, naming
from iclgd_dist.manifests import Manifest, Part
from iclgd_dist.schema import ATTEMPT

__all__ = ["Results", "Store", "StoreError", "read_results"]

PART_GROUPS = 10  # batches per part
MAX_SMALL_PARTS = 8  # parts of less than cells.GROUP_CELLS * PART_GROUPS cells; when there are so many, the next compaction merges them
DEBRIS_STALE_SECONDS = 86_400  # what killed processes left is deleted when it is this old

_CELL_NAME = re.compile(r"([0-9a-f]{64})\.(?:arrows|parquet)")
_ATTEMPT = pa.schema([(name, kind) for name, kind, _ in ATTEMPT])
_README = """Results of in-context learning versus gradient descent, one row per finished grid point; written by iclgd, not to be edited by hand.
Read it with: from iclgd_dist.store import read_results; results = read_results("this directory"); results.cells.to_pandas()
cells/ holds one Arrow stream per result, compacted/ the same many to a file (the newest manifest lists which files count), attempts/ and sweeps/ the history, captures/ what was kept.
"""


def _do_nothing(point: str) -> None:
    """Tests put something in its place that kills the process or raises at a named point of a commit or a compaction."""


fault_point: Callable[[str], None] = _do_nothing


def _publish(path: Path, data: bytes) -> bool:
    return files.publish(path, data, reach=fault_point)


@dataclass(frozen=True)
class Results:
    """What a store holds, as Arrow tables. All but `cells` and `attempts` begin with the cell's key (`controls` and `metrics`: cell; `pairs`: cell_a, cell_b)."""

    cells: pa.Table
    folds: pa.Table
    layers: pa.Table
    examples: pa.Table
    controls: pa.Table
    pairs: pa.Table
    metrics: pa.Table
    attempts: pa.Table


class Store:
    """The results of sweeps in one directory, shared by any number of processes and machines.

    Errors: StoreError when the directory cannot be read or written; what was committed before stays.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._cells, self._compacted, self._attempts, self._sweeps = (self.root / name for name in ("cells", "compacted", "attempts", "sweeps"))
        self._newest = Manifest()

    def prepare(self) -> None:
        """Make the directories and try one write the way a commit writes. Errors: StoreError for a file, a read-only or a full place."""
        for folder in (self.root, self._cells, self._compacted, self._attempts, self._sweeps):
            with naming(folder, "made a directory"):
                os.makedirs(folder, exist_ok=True)
        with naming(self.root, "written"):
            files.sync_folder(self.root)
        probe = files.temporary_in(self._cells)
        _publish(probe, b"probe")
        files.remove(probe)
        if not (self.root / "README.txt").exists():
            _publish(self.root / "README.txt", _README.encode())

    def keys(self) -> set[str]:
        """Return the keys of all committed cells, from names and the manifest: no file of a cell is opened. A missing store is empty."""
        return self._loose().keys() | self._manifest().commits.keys()

    def __contains__(self, key: str) -> bool:
        return self._is_loose(key) or key in self._manifest().commits

    def commit(self, row: dict[str, Any]) -> bool:
        """Store one cell, a row of CELL; it is on disk when this returns. Returns True if this call stored it, False if it was there.

        Errors: ValueError naming the column that is unknown, of the wrong type, NaN or infinite; StoreError when it cannot be written.
        """
        path = self._cell(row.get("key", ""))
        data = cells.encode(row)
        if row["key"] in self or not _publish(path, data):
            return False
        # While we wrote, another's cell may have been committed, compacted and deleted here: then ours is a second one.
        if self._manifest().commits.get(row["key"], _short_hash(data)) != _short_hash(data):
            files.remove(path)
            return False
        return True

    def record_attempt(self, attempt: dict[str, Any]) -> None:
        """Store how one execution of a block went: the columns of ATTEMPT."""
        cells.table_of([attempt], _ATTEMPT)
        _publish(self._attempts / f"{uuid.uuid4().hex}.json", json.dumps(attempt, allow_nan=False).encode())

    def attempts(self) -> pa.Table:
        """Return all attempts, oldest first."""
        rows = self._read_json(self._attempts)
        for path, row in rows.items():
            if newer := sorted(row.keys() - set(_ATTEMPT.names)):
                raise StoreError(f"holds columns this version does not know: {', '.join(newer)}", path, way_out=cells.UPDATE)
        with naming(self._attempts, "read"):
            return cells.table_of(list(rows.values()), _ATTEMPT).sort_by("created_at")

    def save_sweep(self, *, digest: str, resolved: dict[str, Any], keys: list[str]) -> Path:
        """Store what a run set out to do: the resolved sweep and its planned keys. The same plan is stored once."""
        if not re.fullmatch(r"[0-9a-f]{8,64}", digest):
            raise ValueError(f"digest must be 8 to 64 hex digits, got {digest!r}")
        plan = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16]
        path = self._sweeps / f"{digest}-{plan}.json"
        if not path.exists():
            saved = {"digest": digest, "resolved": resolved, "keys": keys, "created_at": datetime.datetime.now(datetime.UTC).isoformat()}
            _publish(path, json.dumps(saved, allow_nan=False).encode())
        return path

    def sweeps(self) -> list[dict[str, Any]]:
        """Return what `save_sweep` stored: digest, resolved, keys and created_at of each, the oldest first."""
        return sorted(self._read_json(self._sweeps).values(), key=lambda sweep: sweep.get("created_at", ""))

    def compact(self) -> int:
        """Move the loose cells into one file (merging small ones when there are many) and return how many; 0 if another process is at it.

        Readers and writers need not stop. Memory: about cells.GROUP_CELLS cells.
        """
        lock = self._compacted / "lock"
        if not self._loose() or not files.acquire(lock):
            return 0
        try:
            return self._compact(lock)
        except Vanished:
            return 0  # another process took the lock over
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(lock)

    def verify(self, *, set_aside: bool = False) -> list[StoreError]:
        """Read every cell and return what is wrong, one error per damaged file.

        With `set_aside` damaged files move to set_aside/ and their cells count as not run. To be called while nothing else writes to the store.
        """
        manifest, damaged, errors = self._manifest(), [], []
        for key, path in self._loose().items():
            try:
                if key not in manifest.commits:
                    self._load(key, path)
            except Vanished:
                continue
            except StoreError as error:
                errors.append(error)
                if set_aside and error.is_damage:
                    self.set_aside(path)
        for part in manifest.parts:
            try:
                self._check(part)
            except StoreError as error:
                errors.append(error)
                damaged += [part] if error.is_damage else []
        if set_aside and damaged:
            path, data = manifests.following(self._compacted, manifest.number, [part for part in manifest.parts if part not in damaged])
            if not _publish(path, data):
                raise StoreError("was written while the store was verified", path, way_out="verify again while nothing runs")
            for part in damaged:
                self.set_aside(self._compacted / part.file)
        for wrong in measured.verify(self.root):
            errors.append(wrong)
            if set_aside and wrong.is_damage:
                self.set_aside(Path(wrong.filename))
        return errors

    def _check(self, part: Part) -> None:
        path = self._compacted / part.file
        try:
            with naming(path, "read"), open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
                    raise StoreError(f"is damaged: its sha256 is not the manifest's; it held {len(part.commits)} cells", path)
            for table in self._part_tables(part):
                with naming(path, "read"):
                    table.validate(full=True)
        except Vanished:
            raise StoreError(f"is missing; it held {len(part.commits)} cells", path) from None

    def set_aside(self, path: Path) -> None:
        with naming(path, "moved"), contextlib.suppress(FileNotFoundError):
            (self.root / "set_aside").mkdir(exist_ok=True)
            os.rename(path, self.root / "set_aside" / f"{path.name}.{uuid.uuid4().hex[:8]}")

    def _cell(self, key: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{64}", key):
            raise ValueError(f"key must be 64 lower-case hex digits, got {key!r}")
        return self._cells / (key + cells.SUFFIX)

    def _is_loose(self, key: str) -> bool:
        path = self._cell(key)
        return path.exists() or path.with_suffix(cells.OLDER_SUFFIX).exists()

    def _loose(self) -> dict[str, Path]:
        """Return the loose cells' files by key, in the order of the keys. Of a cell that an older version wrote at the same time as this one, one counts."""
        names = sorted(files.names_in(self._cells), reverse=True)
        found = {match[1]: self._cells / name for name in names if (match := _CELL_NAME.fullmatch(name))}
        return dict(reversed(found.items()))

    def _manifest(self) -> Manifest:
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

    def _read_json(self, folder: Path) -> dict[Path, dict[str, Any]]:
        rows = {}
        for path in sorted(folder / name for name in files.names_in(folder) if name.endswith(".json") and not name.startswith(".")):
            with naming(path, "read"):
                rows[path] = json.loads(files.read(path))
            if not isinstance(rows[path], dict):
                raise StoreError("is damaged: must be a JSON object", path)
        return rows

    def _load(self, key: str, path: Path) -> tuple[pa.Table, str]:
        """Return a loose cell as a table of one row, and the hash of its file."""
        data = files.read(path)
        tables = cells.decode(data, path)
        if [each for table in tables for each in table["key"].to_pylist()] != [key]:
            raise StoreError("is damaged: it does not hold the one cell of its name", path)
        return tables[0], _short_hash(data)

    def _loose_tables(self, loose: dict[str, Path], commits: dict[str, str]) -> Iterator[pa.Table]:
        """Yield loose cells, many to a table; the hashes of their files go into `commits`."""
        every = list(loose.items())
        with ThreadPoolExecutor() as pool:
            for start in range(0, len(every), cells.GROUP_CELLS):
                batch = every[start : start + cells.GROUP_CELLS]
                loaded = list(pool.map(lambda one: self._load(*one), batch))
                commits.update({key: commit for (key, _), (_, commit) in zip(batch, loaded, strict=True)})
                yield pa.concat_tables([table for table, _ in loaded]).combine_chunks()

    def _part_tables(self, part: Part) -> list[pa.Table]:
        path = self._compacted / part.file
        tables = cells.decode(files.contents(path), path)
        if [key for table in tables for key in table["key"].to_pylist()] != list(part.commits):
            raise StoreError("is damaged: it does not hold the cells that the manifest lists", path)
        return tables

    def _compact(self, lock: Path) -> int:
        base = self._manifest()
        fresh = {key: path for key, path in self._loose().items() if key not in base.commits}
        small = [part for part in base.parts if len(part.commits) < cells.GROUP_CELLS * PART_GROUPS]
        merged = small if fresh and len(small) >= MAX_SMALL_PARTS else []
        commits = {key: commit for part in merged for key, commit in part.commits.items()}
        groups = cells.regroup(chain(*map(self._part_tables, merged), self._loose_tables(fresh, commits)))
        new: list[Part] = []
        is_published = False
        try:
            for first in groups:
                new.append(self._write_part(base.number + 1, chain([first], islice(groups, PART_GROUPS - 1)), commits, lock))
            if new:
                with naming(self._compacted, "written"):
                    files.sync_folder(self._compacted)
                fault_point("before_manifest")
                is_published = _publish(*manifests.following(self._compacted, base.number, [*(part for part in base.parts if part not in merged), *new]))
                is_published &= self._manifest().number == base.number + 1  # else so many came between that this number was free again
                fault_point("after_manifest")
        finally:
            self._clear(replaced={part.file for part in (*base.parts, *new)}, with_debris=is_published)
        return sum(len(part.commits) for part in new) - sum(len(part.commits) for part in merged) if is_published else 0

    def _write_part(self, number: int, groups: Iterable[pa.Table], commits: dict[str, str], lock: Path) -> Part:
        temporary = files.temporary_in(self._compacted)
        try:
            with naming(temporary, "written"):
                keys = cells.write_part(temporary, (_touching(lock, group) for group in groups))
                with open(temporary, "rb") as file:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                    os.fsync(file.fileno())
                name = f"part-{number:08d}-{sha256[:16]}{cells.SUFFIX}"
                os.rename(temporary, self._compacted / name)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return Part(file=name, sha256=sha256, commits={key: commits[key] for key in keys})

    def _clear(self, *, replaced: set[str], with_debris: bool) -> None:
        """Delete loose cells that the newest manifest holds, parts it does not list any more, and what killed processes left long ago."""
        newest = self._manifest()
        listed = {part.file for part in newest.parts}
        for key in self._loose().keys() & newest.commits.keys():
            for suffix in (cells.SUFFIX, cells.OLDER_SUFFIX):
                files.remove(self._cell(key).with_suffix(suffix))
        for name in replaced - listed:
            files.remove(self._compacted / name)
        for name in files.names_in(self._compacted):
            if (match := manifests.NAME.fullmatch(name)) and int(match[1]) < newest.number - 1:
                files.remove(self._compacted / name)
        if not with_debris:
            return
        now = files.now(self._compacted)
        for folder in (self._cells, self._compacted, self._attempts, self._sweeps, self.root / "captures", self.root / "measures"):
            for name in files.names_in(folder):
                if name.startswith(".tmp-") or (manifests.PART_NAME.fullmatch(name) and name not in listed):
                    with contextlib.suppress(FileNotFoundError):
                        if now - (folder / name).stat().st_mtime > DEBRIS_STALE_SECONDS:
                            files.remove(folder / name)

    def _tables(self) -> list[pa.Table]:
        """Return all cells, each once: parts in the manifest's order, then loose cells by key."""
        known = self._manifest().commits
        loose = {key: path for key, path in self._loose().items() if key not in known}
        tables = list(self._loose_tables(loose, {}))
        manifest = self._manifest()  # after the loose files were read: whichever of them had been compacted meanwhile are in it
        compacted = pa.array(manifest.commits.keys() & loose.keys(), pa.string())
        if len(compacted):
            tables = [table.filter(pc.invert(pc.is_in(table["key"], compacted))).combine_chunks() for table in tables]
        with ThreadPoolExecutor() as pool:
            return [table for part in pool.map(self._part_tables, manifest.parts) for table in part] + tables


def _touching(lock: Path, table: pa.Table) -> pa.Table:
    with contextlib.suppress(FileNotFoundError):  # taken over: then the manifest decides whose work counts
        os.utime(lock)
    return table


def _short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_results(store: str | Path | Store) -> Results:
    """Read everything a store holds; writers and compactions may go on meanwhile.

    Errors: StoreError naming the file that is damaged, of a newer version, or missing.
    """
    store = store if isinstance(store, Store) else Store(store)
    if not store.root.is_dir():
        raise StoreError("is not a store: no such directory", store.root, errno.ENOENT, "check the path; `iclgd run` makes a store")
    for _ in range(10):
        try:
            tables = store._tables()
            break
        except Vanished as error:  # compacted or merged after it was listed
            missing = error
    else:
        raise StoreError("is listed in the newest manifest and missing", str(missing))
    flat = cells.flatten(tables)
    later = measured.read(store.root)
    for kind, name in cells.KINDS.items():  # what was measured with the cell comes first and counts
        new = measured.only_new(flat[name], later.filter(pc.equal(later["kind"], kind)), flat["cells"]["key"].combine_chunks()) if len(later) else []
        flat[name] = cells.named(kind, pa.concat_tables([flat[name], new] if len(new) else [flat[name]]))
    return Results(**flat, attempts=store.attempts())
