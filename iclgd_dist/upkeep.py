"""Look after a store: find what is wrong, set cells aside so that they run again, delete what nothing needs. Knows the store's files; nothing of models or plans.

What is taken out of a store is moved to set_aside/ in it, never deleted, but by `gc`.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from iclgd_dist import captures, cells, files, locks, manifests, measured
from iclgd_dist import store as stores
from iclgd_dist.files import Location, StoreError, Vanished
from iclgd_dist.manifests import Manifest, Part
from iclgd_dist.schema import CELL
from iclgd_dist.store import DEBRIS_STALE_SECONDS, Store, publish, read_json, read_results, short_hash

ASIDE = "set_aside"
_CELL_FILE = re.compile(r"[0-9a-f]{64}\.(?:arrows|parquet)")
_AGAIN = "run the same command again while nothing else writes to the store"
_CONDITION = re.compile(r"\s*(\w+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*")
_OPERATORS: dict[str, Callable[..., Any]] = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


@dataclass
class Verified:
    """What a look at every file found."""

    num_cells: int | None = None  # this and what is missing or extra are known once nothing is damaged, or all that is was set aside
    damaged: list[StoreError] = field(default_factory=list)  # a file each: flipped, cut short, empty, of something else, gone
    duplicates: list[str] = field(default_factory=list)  # keys; readers count each once
    missing: list[str] = field(default_factory=list)  # keys that a sweep of this store planned
    extra: list[str] = field(default_factory=list)  # keys that none planned: a sweep file was edited

    @property
    def is_whole(self) -> bool:
        return not (self.damaged or self.duplicates)


def verify(store: Store, *, quarantine: bool = False) -> Verified:
    """Read every file of a store and say what is wrong with it.

    With `quarantine` damaged files move to set_aside/, and their cells count as not run. To be called while nothing else writes to the store.
    Errors: StoreError when the store cannot be read at all.
    """
    found = Verified()
    try:
        manifest = store.manifest()
    except StoreError as error:
        found.damaged.append(error)
        if not (quarantine and error.is_damage):
            return found
        set_aside(store, store.root / "compacted" / error.filename.rpartition("/")[2])
        manifest = _rebuilt(store)
    faults = {part.file: _faults_of_part(store, part) for part in manifest.parts}
    found.damaged += [error for errors in faults.values() for error in errors]
    found.duplicates += [key for key, count in Counter(key for part in manifest.parts for key in part.commits).items() if count > 1]
    for key, path in store.loose().items():
        with contextlib.suppress(Vanished):
            errors = _faults_of_cell(store, key, path)
            found.damaged += errors
            is_second = manifest.commits.get(key, "") not in ("", short_hash(files.read(path)))
            found.duplicates += [key] if is_second else []
            if quarantine and (is_second or any(error.is_damage for error in errors)):
                set_aside(store, path)
    if quarantine and (bad := [file for file, errors in faults.items() if any(error.is_damage for error in errors)]):
        _replace(store, manifest, dict.fromkeys(bad))
        for file in bad:
            set_aside(store, store.root / "compacted" / file)
    others = [*_foreign(store), *_faults_of_records(store), *measured.verify(store.root)]
    found.damaged += others
    for other in others:
        if quarantine and other.is_damage:
            folder, name = other.filename.rsplit("/", 2)[1:]
            set_aside(store, store.root / folder / name)
    if quarantine or not found.damaged:
        found.damaged += captures.verify(store, aside=(lambda path: set_aside(store, path)) if quarantine else None)
        planned = {key for sweep in store.sweeps() for key in sweep["keys"]}
        keys = store.keys()
        found.num_cells, found.missing, found.extra = len(keys), sorted(planned - keys), sorted(keys - planned) if planned else []
    return found


def _rebuilt(store: Store) -> Manifest:
    """Publish a manifest of the parts that are there, the newest first, in the place of one that was damaged; return it."""
    before, parts, seen = store.manifest(), list[Part](), set[str]()
    for name in sorted(filter(manifests.PART_NAME.fullmatch, files.names_in(store.root / "compacted")), reverse=True):
        with contextlib.suppress(StoreError):
            path = store.root / "compacted" / name
            keys = [key for table in cells.decode(files.contents(path), path) for key in table["key"].to_pylist()]
            if seen.isdisjoint(keys):  # else it was merged into a newer one
                parts.append(Part(name, files.sha256_of(path), dict.fromkeys(keys, "")))
                seen |= set(keys)
    numbers = [int(match[1]) for match in map(manifests.NAME.match, files.names_in(store.root / ASIDE)) if match]
    path, data = manifests.following(store.root / "compacted", max([before.number, *numbers]), parts[::-1])
    publish(path, data)
    return store.manifest()


def _faults_of_part(store: Store, part: Part) -> list[StoreError]:
    path = store.root / "compacted" / part.file
    try:
        if files.sha256_of(path) != part.sha256:
            raise StoreError(f"is damaged: its sha256 is not the manifest's; it held {len(part.commits)} cells", path)
        store.part_tables(part)
    except Vanished:
        return [StoreError(f"is missing; it held {len(part.commits)} cells", path)]
    except StoreError as error:
        return [error]
    return []


def _faults_of_cell(store: Store, key: str, path: Location) -> list[StoreError]:
    try:
        store.load(key, path)
    except StoreError as error:
        return [error]
    return []


def _foreign(store: Store) -> list[StoreError]:
    """Return what lies among the cells and is not the store's."""
    ours = {"cells": [_CELL_FILE], "compacted": [manifests.NAME, manifests.PART_NAME, re.compile("lock")]}
    strange = []
    for folder, patterns in ours.items():
        for name in sorted(files.names_in(store.root / folder)):
            if not name.startswith(".") and not any(pattern.fullmatch(name) for pattern in patterns):
                strange.append(StoreError("is damaged: no file of a store has such a name", store.root / folder / name))
    return strange


def _faults_of_records(store: Store) -> list[StoreError]:
    errors = []
    for folder in ("attempts", "sweeps"):
        for name in sorted(files.names_in(store.root / folder)):
            if name.endswith(".json") and not name.startswith("."):
                try:
                    read_json(store.root / folder / name)
                except StoreError as error:
                    errors.append(error)
                except Vanished:
                    pass
    return errors


def set_aside(store: Store, path: Location) -> None:
    """Move a file out of what counts; it stays in set_aside/."""
    files.make_folder(store.root / ASIDE)
    files.move(path, store.root / ASIDE / f"{path.name}.{uuid.uuid4().hex[:8]}")


def matching(store: Store, conditions: Sequence[str]) -> list[str]:
    """Return the keys of the cells for which every condition holds: `column=value`, or with != < <= > >=; NULL fits none.

    Errors: ValueError for what is no condition, an unknown column, or a value of the wrong type.
    """
    table = read_results(store).cells
    for condition in conditions:
        table = table.filter(_mask(table, condition))
    return [str(key) for key in table["key"].to_pylist()]


def _mask(table: pa.Table, condition: str) -> Any:
    match = _CONDITION.fullmatch(condition)
    if not match:
        raise ValueError(f"{condition!r} is no condition; write column=value, e.g. method=vanilla, learning_rate>0.01 or status=diverged")
    name, sign, text = match.groups()
    if name not in table.column_names:
        import difflib

        near = difflib.get_close_matches(name, table.column_names, 1)
        raise ValueError(f"{condition!r}: cells have no column {name!r}" + (f"; did you mean {near[0]!r}?" if near else "; see iclgd_dist/schema.py"))
    kind = CELL.field(name).type
    if pa.types.is_nested(kind):
        raise ValueError(f"{condition!r}: {name} is a list; choose another column")
    try:
        value = pa.scalar(text).cast(kind)
    except pa.ArrowException:
        raise ValueError(f"{condition!r}: {name} is {kind}, got {text!r}") from None
    return pc.fill_null(_OPERATORS[sign](table[name], value), False)


def forget(store: Store, keys: Sequence[str]) -> int:
    """Set cells aside, with their captures and what was measured of them later, so that the next run computes them anew; return how many.

    Errors: StoreError when another process compacts or writes manifests meanwhile; what was set aside until then stays where it was read from.
    """
    wanted = set(keys)
    lock = locks.acquire(store.root / "compacted" / "lock")
    if lock is None:
        raise StoreError("is being compacted", store.root, way_out=_AGAIN)
    with locks.touched([lock]):
        kept = {name.partition(".")[0] for name in files.names_in(store.root / "captures")}
        for key in sorted(wanted & kept):  # first: a cell that runs again keeps a capture that is there
            set_aside(store, store.root / "captures" / f"{key}.safetensors")
        measured.forget(store.root, wanted, aside=lambda path: set_aside(store, path), reach=stores.fault_point)
        manifest = store.manifest()
        changed: dict[str, pa.Table | None] = {}
        for part in manifest.parts:
            if wanted & part.commits.keys():
                table = pa.concat_tables(store.part_tables(part))
                goes = pc.is_in(table["key"], pa.array(sorted(wanted), pa.string()))
                _copy_aside(store, table.filter(goes))
                rest = table.filter(pc.invert(goes))
                changed[part.file] = rest if len(rest) else None
        if changed:
            _replace(store, manifest, changed)
        for key, path in store.loose().items():
            if key in wanted:
                set_aside(store, path)
    return len(wanted)


def _copy_aside(store: Store, table: pa.Table) -> None:
    files.make_folder(store.root / ASIDE)
    files.add(store.root / ASIDE, lambda path: cells.write_part(path, [table]), lambda sha256: f"forgotten-{sha256[:16]}{cells.SUFFIX}")


def _replace(store: Store, manifest: Manifest, changed: dict[str, pa.Table | None]) -> None:
    """Publish the manifest that follows, in which some parts hold less, or are gone."""
    parts = [part for part in manifest.parts if part.file not in changed]
    for part in manifest.parts:
        if (table := changed.get(part.file)) is not None:
            parts.append(store.write_part(manifest.number + 1, [table], part.commits))
    path, data = manifests.following(store.root / "compacted", manifest.number, parts)
    if not publish(path, data) or store.manifest().number != manifest.number + 1:
        raise StoreError("was written meanwhile", path, way_out=_AGAIN)


def debris(store: Store) -> Iterator[tuple[Location, str]]:
    """Yield what nothing needs any more, and why: left by killed processes, replaced, set aside, or named by no cell. `files.remove` deletes it."""
    manifest = store.manifest()
    listed = {part.file for part in manifest.parts}
    now = files.now(store.root)

    def is_old(path: Location) -> bool:
        with contextlib.suppress(Vanished):
            return now - files.modified(path) > DEBRIS_STALE_SECONDS
        return False

    for folder in ("cells", "compacted", "attempts", "sweeps", "captures", "measures", "claims"):
        for name in sorted(files.names_in(store.root / folder)):
            path = store.root / folder / name
            if name.startswith(".tmp-"):
                why = "left by a killed process"
            elif folder == "compacted" and manifests.PART_NAME.fullmatch(name) and name not in listed:
                why = "listed by no manifest"
            elif folder == "compacted" and (match := manifests.NAME.fullmatch(name)) and int(match[1]) < manifest.number - 1:
                why = "an older manifest"
            elif folder == "claims":
                why = "a claim whose holder is gone"
            else:
                continue
            if is_old(path):
                yield path, why
    keys = store.keys()
    for name in sorted(files.names_in(store.root / "captures")):
        path = store.root / "captures" / name
        if not name.startswith(".tmp-") and name.partition(".")[0] not in keys and is_old(path):
            yield path, "the capture of no cell"
    for name in sorted(files.names_in(store.root / ASIDE)):
        yield store.root / ASIDE / name, "set aside"
