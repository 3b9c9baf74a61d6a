"""Look after a store: find what is wrong, set cells aside so that they run again, delete what nothing needs. Knows the store's files; nothing of models or plans.

What is taken out of a store is moved to set_aside/ in it, never deleted, but by `gc`.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from iclgd_dist import cells, files, locks, manifests, measured
from iclgd_dist import store as stores
from iclgd_dist.files import Location, StoreError, Vanished
from iclgd_dist.manifests import Manifest, Part
from iclgd_dist.schema import CELL
from iclgd_dist.store import CELL_NAME, DEBRIS_STALE_SECONDS, Store, publish, read_results

ASIDE = "set_aside"
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
    duplicates: list[str] = field(default_factory=list)  # keys of loose cells that differ from those of a part; readers count each once
    missing: list[str] = field(default_factory=list)  # keys that a grid of this store planned; what a search asked for may never be asked for again
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
        path = store.root / "compacted" / error.filename.rpartition("/")[2]
        number = int(path.name.partition("-")[2].partition(".")[0])
        manifest = _rebuilt(store, number, (), set(), found.damaged)
        set_aside(store, path)  # after the next one is there: else an older one would count
    faults = {part.file: _faults_of_part(store, part) for part in manifest.parts}
    found.damaged += [error for errors in faults.values() for error in errors]
    if quarantine and (bad := [file for file, errors in faults.items() if any(error.is_damage for error in errors)]):
        manifest = _replace(store, manifest, dict.fromkeys(bad))
    _verify_loose(store, found, quarantine=quarantine)
    strays = list(_strays(store, manifest))
    found.damaged += strays
    if quarantine and strays:
        _rebuilt(store, manifest.number, manifest.parts, store.keys(), found.damaged)
    others = [*_foreign(store), *store.verify_records(), *measured.verify(store.root)]
    found.damaged += others
    for other in others:
        if quarantine and other.is_damage:
            folder, name = other.filename.rsplit("/", 2)[1:]
            set_aside(store, store.root / folder / name)
    if all(quarantine and error.is_damage for error in found.damaged):
        from iclgd_dist import captures  # torch, which nothing else here needs

        found.damaged += captures.verify(store, aside=(lambda path: set_aside(store, path)) if quarantine else None)
        keys, planned, searched = store.keys(), store.planned(), store.planned("search")
        found.num_cells, found.missing = len(keys), sorted(planned - keys)
        found.extra = sorted(keys - planned - searched) if planned | searched else []
    return found


def _verify_loose(store: Store, found: Verified, *, quarantine: bool) -> None:
    """Read every loose cell, many at once."""

    def look(one: tuple[str, Location]) -> tuple[StoreError | None, str]:
        try:
            return None, store.load(*one)[1]
        except StoreError as error:
            return error, ""
        except Vanished:
            return None, ""

    loose, commits = store.loose(), store.manifest().commits
    with ThreadPoolExecutor(files.num_readers(store.root)) as pool:
        for (key, path), (error, commit) in zip(loose.items(), pool.map(look, loose.items()), strict=True):
            found.damaged += [error] if error else []
            is_second = bool(commit) and commits.get(key, "") not in ("", commit)
            found.duplicates += [key] if is_second else []
            # It may have been forgotten and computed again since: then it is the only one.
            is_second = quarantine and is_second and store.manifest().commits.get(key, "") not in ("", commit)
            if is_second or (quarantine and error and error.is_damage):
                set_aside(store, path)


def _unlisted(store: Store, manifest: Manifest) -> list[Location]:
    """Return the parts that a manifest does not list, the newest first."""
    listed = {part.file for part in manifest.parts}
    names = filter(manifests.PART_NAME.fullmatch, files.names_in(store.root / "compacted"))
    return [store.root / "compacted" / name for name in sorted(names, reverse=True) if name not in listed]


def _keys_in(path: Location) -> list[str]:
    return [key for table in cells.decode(files.contents(path), path) for key in table["key"].to_pylist()]


def _strays(store: Store, manifest: Manifest) -> Iterator[StoreError]:
    """Yield the parts that no manifest lists and that hold cells which are nowhere else: a manifest is gone."""
    known = store.keys()
    for path in _unlisted(store, manifest):
        with contextlib.suppress(StoreError, Vanished):  # what cannot be read and no manifest lists is debris
            if num_lost := len(set(_keys_in(path)) - known):
                yield StoreError(f"is listed by no manifest and holds {num_lost} cells that are nowhere else; --quarantine lists it again", path)


def _rebuilt(store: Store, number: int, parts: Sequence[Part], known: Collection[str], damaged: list[StoreError]) -> Manifest:
    """Publish the manifest that follows `number`: `parts`, and of the parts that they leave out the cells not `known`, the newest first; return it.

    A part that is damaged is set aside and added to `damaged`. Errors: StoreError for one that cannot be read for another reason.
    """
    found, seen = list(parts), set(known)
    for path in _unlisted(store, Manifest(number, tuple(parts))):
        try:
            tables = cells.decode(files.contents(path), path)
        except StoreError as error:
            if not error.is_damage:
                raise
            damaged.append(error)
            set_aside(store, path)
            continue
        keys = {key for table in tables for key in table["key"].to_pylist()}
        if new := dict.fromkeys(sorted(keys - seen), ""):
            if len(new) == len(keys):
                found.append(Part(path.name, files.sha256_of(path), dict.fromkeys(_keys_in(path), "")))
            else:  # the rest was merged into a newer one
                rows = pa.concat_tables(tables)
                found.append(store.write_part(number + 1, [rows.filter(pc.is_in(rows["key"], pa.array(list(new), pa.string())))], new))
            seen |= keys
    return _published(store, number, found)


def _published(store: Store, number: int, parts: Sequence[Part]) -> Manifest:
    """Publish the manifest that follows `number` and return it. Errors: StoreError where another came first."""
    path, data = manifests.following(store.root / "compacted", number, parts)
    if not publish(path, data) or (manifest := store.manifest()).number != number + 1:
        raise StoreError("was written meanwhile", path, way_out=_AGAIN)
    return manifest


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


def _foreign(store: Store) -> list[StoreError]:
    """Return what lies among the cells and is not the store's."""
    ours = {"cells": [CELL_NAME], "compacted": [manifests.NAME, manifests.PART_NAME, re.compile("lock")]}
    strange = []
    for folder, patterns in ours.items():
        for name in sorted(files.names_in(store.root / folder)):
            if not name.startswith(".") and not any(pattern.fullmatch(name) for pattern in patterns):
                strange.append(StoreError("is damaged: no file of a store has such a name", store.root / folder / name))
    return strange


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
        for name in files.names_in(store.root / "cells"):  # before the manifest: what is committed after it is new
            if (match := CELL_NAME.fullmatch(name)) and match[1] in wanted:
                set_aside(store, store.root / "cells" / name)
        manifest = store.manifest()
        changed: dict[str, Part | None] = {}
        for part in manifest.parts:
            if wanted & part.commits.keys():
                table = pa.concat_tables(store.part_tables(part))
                rest = table.filter(pc.invert(pc.is_in(table["key"], pa.array(sorted(wanted), pa.string()))))
                changed[part.file] = store.write_part(manifest.number + 1, [rest], part.commits) if len(rest) else None
        stores.fault_point("before_forgetting")
        following = _replace(store, manifest, changed)  # also where nothing changes: a compaction that has read what is forgotten gives way
        for path in _unlisted(store, following):  # left by one that was killed: `verify` would take what it holds for lost
            with contextlib.suppress(StoreError, Vanished):
                if wanted.intersection(_keys_in(path)):
                    set_aside(store, path)
    return len(wanted)


def _replace(store: Store, manifest: Manifest, changed: dict[str, Part | None]) -> Manifest:
    """Publish the manifest that follows, in which some parts are others, or are gone, and set those aside; return it."""
    parts = [changed.get(part.file, part) for part in manifest.parts]
    following = _published(store, manifest.number, [part for part in parts if part is not None])
    for file in changed:
        set_aside(store, store.root / "compacted" / file)
    return following


def debris(store: Store) -> Iterator[tuple[Location, str]]:
    """Yield what nothing needs any more, and why: left by killed processes, replaced, set aside, or named by no cell. `files.remove` deletes it."""
    manifest = store.manifest()
    listed = {part.file for part in manifest.parts}
    strays = {error.filename.rpartition("/")[2] for error in _strays(store, manifest)}
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
            elif folder == "compacted" and manifests.PART_NAME.fullmatch(name) and name not in listed and name not in strays:
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
