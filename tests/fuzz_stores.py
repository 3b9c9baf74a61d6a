"""What `tests/fuzz.py` tries on stores: damage by accident, which has to be told, and rows of somebody who means harm."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from xxhash import xxh3_64

from iclgd_dist.store_errors import StoreError
from tests import mutations
from tests.fuzzing import OURS, Files, Target, contents, good

ODD_TEXTS = [None, "", "x", "[]", "{}", "null", "1", '{"a": 1}', '{"preset": 1}', "<script>", "\0", "\U0001f600", "a" * 3000, "{text}", "%s", "$x$", "[" * 2000]


def _store() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from iclgd_dist import captures, measured
    from iclgd_dist.metrics import Capture
    from iclgd_dist.schema import CELL
    from tests.stores import key, measure, prepared, row

    numbers = itertools.count(1)
    # The names of parts are random, and a seed's tries must not be.
    with tempfile.TemporaryDirectory() as place, mock.patch("uuid.uuid4", lambda: uuid.UUID(int=next(numbers))):
        made = prepared(Path(place), row(1), row(2), row(3))
        made.compact()
        file, sha256 = captures.keep(made, key(4), Capture(torch.ones(2, 3, 4), torch.ones(2, 3, 2, 5), torch.ones(3, 2)))
        made.commit(row(4, capture_file=file, capture_sha256=sha256))
        made.commit(row(5))
        old = pa.Table.from_pylist([row(6)], schema=CELL)
        pq.write_table(old, made.root / "cells" / f"{key(6)}.parquet", write_page_checksum=True)
        rows = [{"key": key(number)} | measure(kind, 90 + number, layer) for number in range(1, 6) for kind in ("metric", "pair") for layer in (None, 1)]
        measured.commit(made.root, rows, reach=lambda point: None)
        made.record_attempt({"block": "a", "outcome": "done"} | {"created_at": "2026-01-01T00:00:00+00:00"})
        made.save_sweep(digest="0123456789abcdef", resolved={"name": "x", "seeds": [1]}, keys=[key(number) for number in range(1, 7)])
        (made.root / "claims").mkdir(exist_ok=True)
        (made.root / "claims" / ("a" * 32)).write_text(json.dumps({"host": "h", "space": 1, "pid": 1, "time": 1.0, "owner": "r", "lock": "x"}))
        return contents(made.root)


def reseal(name: str, data: bytes) -> bytes:
    """Give a file of a store the checksum of what it holds now: what somebody makes who means harm."""
    if name.endswith(".arrows"):
        return data[:-8] + xxh3_64(data[:-8]).digest()
    if "manifest" in name:
        try:
            content = json.loads(data)
            content.pop("sha256")
            return json.dumps(content | {"sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}).encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    return data


def _damage_store(files: dict[str, bytes], choose: random.Random) -> Files:
    name = choose.choice(sorted(name for name in files if name != "README.txt"))
    beside = [other for other in files if Path(other).parent == Path(name).parent]
    if choose.random() < 0.1:
        return {name: files[choose.choice(beside)]}
    return {name: (mutations.as_json if name.endswith(".json") or "claims" in name else mutations.some_of)(files[name], choose)}


def _damage_hostile(files: dict[str, bytes], choose: random.Random) -> Files:
    found = _damage_store(files, choose)
    return {name: reseal(name, data or b"") for name, data in found.items()}


def rows_of(root: Path) -> dict[str, list[dict[str, Any]]]:
    from iclgd_dist.store import read_results

    found = read_results(root)
    tables = {name: getattr(found, name).to_pylist() for name in ("cells", "folds", "layers", "examples", "controls", "pairs", "metrics", "extras", "attempts")}
    return {name: sorted(rows, key=repr) for name, rows in tables.items()}


@functools.cache
def _undamaged() -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as place:
        for name, content in good(STORE).items():
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(place) / name).write_bytes(content)
        return rows_of(Path(place))


def _sweeps() -> list[dict[str, Any]]:
    return [json.loads(data) | {"sha256": 0} for name, data in good(STORE).items() if name.startswith("sweeps/")]


def _answered(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the error of ours that it raises."""
    try:
        return call()
    except OURS as error:
        return error


def _read_store(folder: Path, *, is_hostile: bool = False) -> str | None:
    from iclgd_dist import captures, files, locks, upkeep
    from iclgd_dist.metrics import Capture
    from iclgd_dist.store import Store, read_results
    from iclgd_dist.upkeep import forget, verify
    from tests.stores import key

    expected, known = _undamaged(), {key(number) for number in range(1, 7)}
    for claim in (folder / "claims").iterdir():
        locks.is_held(claim, owner="other", stale_seconds=1e9)
    read, keys = _answered(lambda: rows_of(folder)), _answered(lambda: Store(folder).keys())
    looked, sweeps = _answered(lambda: verify(Store(folder))), _answered(lambda: Store(folder).sweeps())
    row = next((row for row in read["cells"] if row["capture_sha256"]), None) if isinstance(read, dict) else None
    kept = row and _answered(lambda: captures.recall(Store(folder), row["key"], row["capture_sha256"]))
    compacted = Path(shutil.copytree(folder, folder.with_name(folder.name + "-compacted")))
    aside = Path(shutil.copytree(folder, folder.with_name(folder.name + "-aside")))
    try:
        _answered(lambda: Store(compacted).compact())
        with mock.patch.object(upkeep, "DEBRIS_STALE_SECONDS", -1):
            _answered(lambda: [files.remove(path) for path, _ in upkeep.debris(Store(compacted))])
        later = _answered(lambda: rows_of(compacted))
        quarantined = _answered(lambda: verify(Store(aside), quarantine=True))
        left = _answered(lambda: rows_of(aside))
        _answered(lambda: forget(Store(aside), [key(4)]))
        _answered(lambda: read_results(aside))
        if is_hostile:
            return None
        if isinstance(read, dict) and read != expected:
            return f"rows differ and nothing says so: {[name for name in expected if read[name] != expected[name]]}"
        if isinstance(later, dict) and later != expected:
            return f"rows differ after a compaction and nothing says so: {[name for name in expected if later[name] != expected[name]]}"
        if isinstance(kept, Capture) and not all(bool((getattr(kept, name) == 1).all()) for name in ("attention_LQD", "scores_LQHT", "label_scores_QC")):
            return "a capture holds other numbers and nothing says so"
        if isinstance(keys, set) and not keys <= known:
            return "the plan would subtract cells that are not there"
        if isinstance(read, StoreError) and not isinstance(looked, StoreError) and looked.is_whole:
            return f"readers say {read}, verify says that all is well"
        if not isinstance(quarantined, StoreError) and all(error.is_damage for error in quarantined.damaged):
            if not isinstance(left, dict):
                return f"what is left after --quarantine cannot be read: {left}"
            if any(row not in expected[name] for name, rows in left.items() for row in rows):
                return "rows after --quarantine are not those from before"
        # Without a checksum it is a sweep of an older version.
        has_checksum = all(b'"sha256"' in path.read_bytes() for path in (folder / "sweeps").iterdir())
        if isinstance(sweeps, list) and has_checksum and [sweep | {"sha256": 0} for sweep in sweeps] != _sweeps():
            return "a sweep is another and nothing says so"
    finally:
        shutil.rmtree(compacted)
        shutil.rmtree(aside)
    return None


# --- The page


@functools.cache
def _rows() -> list[dict[str, Any]]:
    from tests.made import make_rows

    return make_rows(rates={"vanilla": (1e-3, 1e-2), "layer_causal": (1e-3,)})


def _of_rows() -> dict[str, bytes]:
    from iclgd_dist.config import load_sweep
    from iclgd_dist.store import Store
    from tests.made import make_store
    from tests.test_config import GOOD

    with tempfile.TemporaryDirectory() as place:
        root = make_store(Path(place) / "store", _rows())
        (Path(place) / "x.toml").write_text(GOOD)
        Store(root).save_sweep(digest="0123456789abcdef", resolved=load_sweep(Path(place) / "x.toml").resolved(), keys=[row["key"] for row in _rows()])
        return contents(root)


def odd(kind: Any, choose: random.Random) -> Any:
    """Return a value of an Arrow type that no cell of ours has."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {field.name: odd(field.type, choose) for field in kind}
    if pa.types.is_list(kind):
        return choose.choice([None, [], [odd(kind.value_type, choose)] * choose.choice([1, 40])])
    if pa.types.is_string(kind):
        return choose.choice(ODD_TEXTS)
    if pa.types.is_floating(kind):
        return choose.choice([None, 0.0, -1.0, 1e308, -1e308, 5e-324])
    if pa.types.is_boolean(kind):
        return choose.choice([None, False, True])
    return choose.choice([None, 0, -1, 2**31, 2**53, 2**62, -(2**62)])  # a number, or a time


def _damage_rows(files: dict[str, bytes], choose: random.Random) -> Files:
    """Change a column of one row or of all, or what a sweep says of itself; checksums are right."""
    from iclgd_dist import cells, manifests
    from iclgd_dist.schema import CELL

    if choose.random() < 0.3:
        name = choose.choice([name for name in files if name.startswith("sweeps/")])
        content = json.loads(files[name])
        content |= {"resolved": mutations.alter(content["resolved"], choose)}
        del content["sha256"]
        content = json.loads(json.dumps(content))
        return {name: json.dumps(content | {"sha256": manifests.checksum(content)}).encode()}
    rows = choose.sample(_rows(), choose.choice([1, 1, len(_rows())]))
    column = choose.choice([column for column in CELL if column.name != "key"])
    return {f"cells/{row['key']}.arrows": cells.encode(row | {column.name: odd(column.type, choose)}) for row in rows}


def _read_page(folder: Path) -> None:
    from iclgd_analysis.report import write_report

    write_report(folder)


PAGE = Target(_of_rows, _damage_rows, _read_page, 4)
STORE = Target(_store, _damage_store, _read_store, 4)
HOSTILE = Target(lambda: good(STORE), _damage_hostile, functools.partial(_read_store, is_hostile=True))
