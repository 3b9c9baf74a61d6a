"""The store: what is committed is there once, whole, for every reader, whatever breaks."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iclgd_dist import cells, files, store
from iclgd_dist.schema import ATTEMPT, CELL
from iclgd_dist.store import Results, Store, StoreError, read_results


def key(number: int) -> str:
    return f"{number:064x}"


def row(number: int, **values: Any) -> dict[str, Any]:
    """Return a small cell whose every figure depends on its number; what is not named is NULL."""
    return {
        "key": key(number),
        "kind": "finetuned",
        "status": "done",
        "step": number,
        "accuracy": number / 7,
        "prediction_counts": [number, 2],
        "folds": [{"fold": fold, "n": number, "accuracy": None} for fold in ("A", "B")],
        "layers": [{"layer": layer, "fold": fold, "sim_aou": layer / (number + 1), "sim_aou_n": number} for layer in range(3) for fold in ("A", "B", "all")],
        "examples": [{"query": f"q{query}", "fold": "A", "gold": query, "label_scores": [-float(number), None]} for query in range(number % 4)],
        "measures": [measure(kind, number + n, layer) for layer in (None, 0) for n, kind in enumerate(("metric", "control", "pair") * (number % 3))],
    } | values


def measure(kind: str, number: int, layer: int | None) -> dict[str, Any]:
    return {"kind": kind, "name": f"{kind} {number}", "metric": "sim_aou", "layer": layer, "fold": "all", "n": number, "mean": number / 3, "sd": None}


def prepared(path: Path, *rows: dict[str, Any]) -> Store:
    made = Store(path / "store")
    made.prepare()
    for each in rows:
        assert made.commit(each)
    return made


def full(value: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value.get(name) for name in names}


def assert_holds(results: Results, rows: list[dict[str, Any]]) -> None:
    """Compare with plain loops over the rows as they were committed."""
    assert sorted(results.cells["key"].to_pylist()) == sorted(each["key"] for each in rows)
    by_key = {each["key"]: each for each in rows}
    flat_names = [name for name in CELL.names if name not in ("folds", "layers", "examples", "measures")]
    for got in results.cells.to_pylist():
        assert got == full(by_key[got["key"]], flat_names)
    for name in ("folds", "layers", "examples"):
        inner = [field.name for field in CELL.field(name).type.value_type]
        expected = []
        for each in results.cells["key"].to_pylist():
            for element in by_key[each].get(name) or []:
                expected.append({"key": each} | full(element, inner))
        table = getattr(results, name)
        assert table.column_names == ["key", *inner]
        assert table.to_pylist() == expected
    for kind, names in {"control": ["cell", "control"], "pair": ["cell_a", "cell_b"], "metric": ["cell", "version"]}.items():
        table = getattr(results, f"{kind}s")
        assert table.column_names == [*names, "layer", "fold", "metric", "n", "mean", "sd"]
        measures = [(each, m) for each in results.cells["key"].to_pylist() for m in by_key[each].get("measures") or [] if m["kind"] == kind]
        expected = [{names[0]: each, names[1]: m["name"]} | {n: m[n] for n in table.column_names[2:]} for each, m in measures]
        assert table.to_pylist() == expected


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    prelude = "import os, sys, time\nfrom iclgd_dist import cells, files, store\nfrom tests.test_store import key, row\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def no_link(code: int) -> Callable[..., None]:
    def link(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    return link


# What goes in comes out.


def test_a_new_store_touches_nothing_and_is_empty(tmp_path: Path) -> None:
    missing = Store(tmp_path / "store")
    assert missing.keys() == set()
    assert key(1) not in missing
    assert missing.compact() == 0
    assert missing.sweeps() == []
    assert missing.attempts().num_rows == 0
    assert missing.verify() == []
    assert not missing.root.exists()


def test_an_empty_store_reads_as_empty_tables_with_all_columns(tmp_path: Path) -> None:
    results = read_results(prepared(tmp_path))
    assert_holds(results, [])
    assert results.attempts.column_names == [name for name, _, _ in ATTEMPT]


def test_reading_a_directory_that_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        read_results(tmp_path / "nowhere")


@pytest.mark.parametrize("when", [(), (5,), (3,), (2, 4), (1, 2, 3, 4, 5)])
def test_rows_read_back_as_committed_whenever_they_were_compacted(tmp_path: Path, when: tuple[int, ...]) -> None:
    rows = [row(number) for number in range(1, 6)]
    made = prepared(tmp_path)
    for number, each in enumerate(rows, 1):
        made.commit(each)
        if number in when:
            made.compact()
    assert_holds(read_results(made.root), rows)
    assert made.keys() == Store(made.root).keys() == {each["key"] for each in rows}
    assert key(5) in made
    assert key(6) not in made


def test_a_null_list_is_no_rows_and_a_null_struct_field_stays_null(tmp_path: Path) -> None:
    rows = [row(1, layers=None, examples=[]), row(2, layers=[{"layer": 0, "fold": "A"}])]
    made = prepared(tmp_path, *rows)
    assert_holds(read_results(made), rows)
    made.compact()
    assert_holds(read_results(made), rows)


def test_a_cell_is_committed_once(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    assert not made.commit(row(1, accuracy=0.5))
    made.compact()
    assert not made.commit(row(1, accuracy=0.5))
    assert not Store(made.root).commit(row(1))
    assert_holds(read_results(made), [row(1)])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_refused_with_the_path_of_its_column(tmp_path: Path, bad: float) -> None:
    made = prepared(tmp_path)
    cases: dict[str, dict[str, Any]] = {
        "accuracy": {"accuracy": bad},
        "layers.sim_aou": {"layers": [{"layer": 0, "sim_aou": 1.0}, {"layer": 1, "sim_aou": bad}]},
        "examples.label_scores": {"examples": [{"label_scores": [0.0, bad]}]},
    }
    for path, values in cases.items():
        with pytest.raises(ValueError, match=rf"^{path}: holds NaN or infinity"):
            made.commit(row(1, **values))
    assert os.listdir(made.root / "cells") == []


def test_an_unknown_or_mistyped_column_is_refused_by_name(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    with pytest.raises(ValueError, match=r"^acuracy: no such column"):
        made.commit(row(1, acuracy=1.0))
    with pytest.raises(ValueError, match=r"^layers\.sim: no such column"):
        made.commit(row(1, layers=[{"layer": 1}, {"sim": 1.0}]))
    with pytest.raises(ValueError, match=r"^step: must be int64"):
        made.commit(row(1, step="four"))
    assert made.keys() == set()


@pytest.mark.parametrize("bad", ["", "../../etc/passwd", "A" * 64, "a" * 63, "a" * 64 + "\n"])
def test_only_64_hex_digits_become_a_file_name(tmp_path: Path, bad: str) -> None:
    made = prepared(tmp_path)
    with pytest.raises(ValueError, match="key must be 64"):
        made.commit(row(1, key=bad))


def test_diverged_rows_are_found_by_their_status_beside_done_rows(tmp_path: Path) -> None:
    rows = [row(number, accuracy=0.25) for number in range(4)]
    rows += [row(number, accuracy=None, layers=None, status="diverged", diverged_step=2, last_finite_loss=1.5) for number in (4, 5)]
    made = prepared(tmp_path, *rows)
    for _ in range(2):
        table = read_results(made).cells
        assert table.filter(pa.compute.field("status") == "diverged")["key"].to_pylist() == [key(4), key(5)]
        assert table.filter(pa.compute.field("accuracy") == 0.25).num_rows == 4
        assert table.filter(pa.compute.field("accuracy").is_null()).num_rows == 2
        made.compact()


def test_attempts_are_kept_oldest_first_and_are_no_cells(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    made.record_attempt({"block": "b", "outcome": "oom", "reason": "too large", "created_at": "2025-01-02T00:00:00Z"})
    made.record_attempt({"block": "a", "outcome": "done", "num_cells": 3, "wall_seconds": 1.5, "created_at": "2025-01-01T00:00:00Z"})
    got = read_results(made).attempts.to_pylist()
    assert [each["outcome"] for each in got] == ["done", "oom"]
    assert got[0]["num_cells"] == 3
    assert got[0]["reason"] is None
    assert made.keys() == set()
    with pytest.raises(ValueError, match="colour"):
        made.record_attempt({"colour": "red"})
    with pytest.raises(ValueError, match="wall_seconds"):
        made.record_attempt({"wall_seconds": math.nan})


def test_an_attempt_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    path = made.root / "attempts" / "x.json"
    for text, message in (("{", "is damaged"), ("[]", "is damaged"), ('{"colour": 1}', "update iclgd")):
        path.write_text(text)
        with pytest.raises(StoreError, match=message) as caught:
            made.attempts()
        assert caught.value.filename == str(path)


def test_a_sweep_is_stored_once_per_plan(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    first = made.save_sweep(digest="0123456789abcdef", resolved={"name": "x"}, keys=[key(2), key(1)])
    content = first.read_bytes()
    assert made.save_sweep(digest="0123456789abcdef", resolved={"name": "x"}, keys=[key(1), key(2)]) == first
    other = made.save_sweep(digest="0123456789abcdef", resolved={"name": "x"}, keys=[key(1)])
    assert other != first
    assert first.read_bytes() == content
    oldest, newest = made.sweeps()
    assert {"digest": "0123456789abcdef", "resolved": {"name": "x"}, "keys": [key(2), key(1)]}.items() <= oldest.items()
    assert oldest["created_at"] <= newest["created_at"]
    with pytest.raises(ValueError, match="hex digits"):
        made.save_sweep(digest="../../x", resolved={}, keys=[])


# Where the store cannot be.


def test_an_error_says_path_cause_and_way_out_and_survives_pickling() -> None:
    error = StoreError("cannot be written: disk full", "/data/x", errno.ENOSPC, "free space")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, OSError)
    assert type(again) is StoreError
    assert str(again) == str(error) == "/data/x: cannot be written: disk full (ENOSPC); free space"
    assert (again.filename, again.errno, again.way_out) == ("/data/x", errno.ENOSPC, "free space")


def test_a_file_where_the_store_should_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StoreError, match="not a file"):
        Store(tmp_path / "store").prepare()
    with pytest.raises(StoreError, match="not a file"):
        Store(tmp_path / "store" / "inside").prepare()


@pytest.mark.parametrize(
    ("code", "way_out"), [(errno.EROFS, "can write to"), (errno.EACCES, "can write to"), (errno.ENOSPC, "free space"), (errno.EDQUOT, "free space")]
)
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, way_out: str) -> None:
    def refuse(*arguments: Any, **options: Any) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open" if code != errno.ENOSPC else "write", refuse)
    start = time.monotonic()
    with pytest.raises(StoreError, match=way_out) as caught:
        Store(tmp_path / "store").prepare()
    assert caught.value.errno == code
    assert str(tmp_path) in str(caught.value)
    assert time.monotonic() - start < 2


def test_prepare_says_what_the_directory_is_and_leaves_an_existing_store_as_it_is(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    assert len((made.root / "README.txt").read_text().splitlines()) == 3
    before = {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()}
    made.prepare()
    assert {path: path.read_bytes() for path in made.root.rglob("*") if path.is_file()} == before


def test_a_commit_without_a_prepared_store_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="store"):
        Store(tmp_path / "store").commit(row(1))


# Crashes and failing disks.


@pytest.mark.parametrize("point", ["mid_write", "before_link", "after_link"])
def test_a_process_killed_in_a_commit_leaves_a_whole_cell_or_none(tmp_path: Path, point: str) -> None:
    made = prepared(tmp_path, row(1))
    code = """
        store.fault_point = lambda point: os._exit(9) if point == sys.argv[2] else None
        store.Store(sys.argv[1]).commit(row(2))
    """
    assert run_python(code, made.root, point).wait() == 9
    assert len(os.listdir(made.root / "cells")) > 1, "the killed process must leave its temporary file, or this test proves nothing"
    is_there = point == "after_link"
    assert_holds(read_results(made), [row(1), row(2)] if is_there else [row(1)])
    assert made.commit(row(2)) is not is_there
    assert made.commit(row(3))
    assert_holds(read_results(made), [row(1), row(2), row(3)])


@pytest.mark.parametrize("point", ["mid_write", "before_manifest", "before_link", "after_link", "after_manifest"])
def test_a_process_killed_in_a_compaction_changes_no_row(tmp_path: Path, point: str) -> None:
    made = prepared(tmp_path, row(1), row(2))
    made.compact()
    rows = [row(1), row(2), row(3)]
    made.commit(row(3))
    code = """
        store.fault_point = lambda point: os._exit(9) if point == sys.argv[2] else None
        store.Store(sys.argv[1]).compact()
    """
    assert run_python(code, made.root, point).wait() == 9
    assert_holds(read_results(made), rows)
    assert not made.commit(row(3))
    assert made.commit(row(4))
    assert made.compact() == (2 if point in ("mid_write", "before_manifest", "before_link") else 1), "the dead process's lock must not hold this one up"
    assert_holds(read_results(made), [*rows, row(4)])
    assert os.listdir(made.root / "cells") == []


@pytest.mark.parametrize("name", ["open", "write", "fsync", "link"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EINTR])
def test_a_failing_system_call_leaves_a_cell_committed_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int) -> None:
    made, real, failures = prepared(tmp_path, row(0)), getattr(os, name), 0
    rows = [row(0)]
    for nth in range(1, 6):
        calls = 0

        def fail(*arguments: Any, nth: int = nth, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, fail)
        error = None
        try:
            made.commit(row(nth))
        except StoreError as caught:
            error = caught
        monkeypatch.setattr(os, name, real)
        if calls >= nth:
            failures += 1
            assert error is not None
            assert error.errno == code
            assert str(made.root / "cells") in str(error)
        was_committed = key(nth) in made
        assert was_committed or error is not None
        assert made.commit(row(nth)) is not was_committed
        rows.append(row(nth))
        assert not [left for left in os.listdir(made.root / "cells") if left.startswith(".tmp")]
    assert failures > 0
    assert_holds(read_results(made), rows)


@pytest.mark.parametrize("name", ["open", "write", "fsync", "link", "rename"])
def test_a_failing_system_call_in_a_compaction_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rows, real = [row(0)], getattr(os, name)
    made = prepared(tmp_path, row(0))
    for nth in range(1, 6):
        calls = 0

        def fail(*arguments: Any, nth: int = nth, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == nth:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **options)

        made.commit(row(nth))
        rows.append(row(nth))
        monkeypatch.setattr(os, name, fail)
        message = None
        try:
            made.compact()
        except StoreError as error:
            message = str(error)
        monkeypatch.setattr(os, name, real)
        assert message is None or str(made.root) in message
        assert message or calls < nth
        assert_holds(read_results(Store(made.root)), rows)
    assert {part.file for part in Store(made.root)._manifest().parts} == {n for n in os.listdir(made.root / "compacted") if n.startswith("part")}


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_the_first_writer_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    made = prepared(tmp_path, row(1))
    monkeypatch.setattr(os, "link", no_link(code))
    made.prepare()
    assert not made.commit(row(1, accuracy=0.5)), "a linked cell is there"
    assert made.commit(row(2))
    assert not made.commit(row(2, accuracy=0.5))
    assert made.verify() == []
    assert_holds(read_results(made), [row(1), row(2)])
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda lane: made.commit(row(3, lanes=lane)), range(8))) == 1
    monkeypatch.undo()
    assert not made.commit(row(2, accuracy=0.5)), "a cell written without links is there for one who links"
    assert made.compact() == 3
    assert os.listdir(made.root / "cells") == []
    assert_holds(read_results(made), [row(1), row(2), row(3, lanes=read_results(made).cells["lanes"].to_pylist()[2])])
    monkeypatch.setattr(os, "link", no_link(code))
    assert made.commit(row(4))
    assert made.compact() == 1
    assert made.keys() == {key(number) for number in (1, 2, 3, 4)}


# Many writers, readers and compactions.


def test_of_two_processes_that_commit_a_cell_at_once_exactly_one_is_told_that_it_did(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    code = """
        made = store.Store(sys.argv[1])
        while not os.path.exists(sys.argv[1] + "/go"):
            time.sleep(0.001)
        print("".join("1" if made.commit(row(number, host=sys.argv[2])) else "0" for number in range(20)))
    """
    both = [run_python(code, made.root, name) for name in ("a", "b")]
    time.sleep(0.5)
    (made.root / "go").touch()
    told = [process.communicate()[0].strip() for process in both]
    assert [int(a) + int(b) for a, b in zip(*told, strict=True)] == [1] * 20
    hosts = {each["key"]: each["host"] for each in read_results(made).cells.to_pylist()}
    assert [hosts[key(number)] for number in range(20)] == ["a" if flag == "1" else "b" for flag in told[0]]


def test_a_reader_that_polls_sees_every_acknowledged_cell_once_and_whole(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    code = """
        store.MAX_SMALL_PARTS = 2  # merge often: parts vanish under the reader
        made = store.Store(sys.argv[1])
        for number in range(45):
            made.commit(row(number))
            print(number, flush=True)
            if number % 5 == 4:
                made.compact()
    """
    writer = run_python(code, made.root)
    acknowledged: list[int] = []
    listener = threading.Thread(target=lambda: acknowledged.extend(int(line) for line in writer.stdout or ()))
    listener.start()
    num_reads = 0
    while listener.is_alive() or num_reads == 0:
        least = len(acknowledged)
        keys = made.keys()
        results = read_results(Store(made.root))
        assert len(keys) >= least
        assert len(results.cells) >= len(keys)
        assert_holds(results, [row(number) for number in range(len(results.cells))])
        num_reads += 1
    assert writer.wait() == 0
    assert len(read_results(made).cells) == 45
    assert num_reads > 3


@pytest.mark.parametrize("name", ["read", "contents"])
def test_a_reader_finds_the_cells_of_a_file_that_is_compacted_before_it_can_open_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made, other = prepared(tmp_path, row(1)), Store(tmp_path / "store")
    made.compact()
    made.commit(row(2))
    monkeypatch.setattr(store, "MAX_SMALL_PARTS", 1)  # the part vanishes too
    real, folder = getattr(files, name), "cells" if name == "read" else "compacted"

    def overtaken(path: Path) -> Any:
        if path.parent.name == folder:
            monkeypatch.setattr(files, name, real)
            assert other.compact() == 1
            assert not path.exists()
        return real(path)

    monkeypatch.setattr(files, name, overtaken)
    assert_holds(read_results(made), [row(1), row(2)])


def at(point: str, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `action` happen, once, while a commit or a compaction stands at `point`."""

    def reach(name: str) -> None:
        if name == point:
            monkeypatch.setattr(store, "fault_point", lambda name: None)
            action()

    monkeypatch.setattr(store, "fault_point", reach)


@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_paused_writer_is_told_that_another_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_compacted: bool) -> None:
    made, other = prepared(tmp_path), Store(tmp_path / "store")
    at("before_link", lambda: (other.commit(row(1)), is_compacted and other.compact()), monkeypatch)
    assert not made.commit(row(1, accuracy=0.5))
    assert_holds(read_results(made), [row(1)])
    made.compact()
    assert_holds(read_results(made), [row(1)])
    assert os.listdir(made.root / "cells") == []


def test_a_writer_whose_cell_is_compacted_under_its_hands_is_told_that_it_was_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, other = prepared(tmp_path), Store(tmp_path / "store")
    at("after_link", other.compact, monkeypatch)
    assert made.commit(row(1))
    assert_holds(read_results(made), [row(1)])


def test_a_cell_both_loose_and_compacted_counts_once_and_the_manifest_wins(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1), row(2))
    made.compact()
    (made.root / "cells" / f"{key(1)}.arrows").write_bytes(cells.encode(row(1, accuracy=0.5)))
    assert_holds(read_results(made), [row(1), row(2)])
    assert made.compact() == 0
    assert os.listdir(made.root / "cells") == []
    assert_holds(read_results(made), [row(1), row(2)])


@pytest.mark.parametrize("num_later", [0, 2])
@pytest.mark.parametrize("point", ["before_manifest", "before_link"])
def test_of_two_compactions_at_once_one_gives_way_and_no_cell_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, num_later: int) -> None:
    made, other = prepared(tmp_path, row(1), row(2)), Store(tmp_path / "store")

    def overtake() -> None:
        (made.root / "compacted" / "lock").unlink()  # as if the first had been paused until its lock went stale
        other.commit(row(3))
        assert other.compact() == 3
        for number in range(4, 4 + num_later):
            other.commit(row(number))
            assert other.compact() == 1

    at(point, overtake, monkeypatch)
    assert made.compact() == 0
    assert_holds(read_results(made), [row(number) for number in range(1, 4 + num_later)])
    listed = {part.file for part in made._manifest().parts}
    assert {name for name in os.listdir(made.root / "compacted") if name.startswith("part")} == listed


def test_a_live_lock_is_respected_and_a_stale_one_is_not(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    lock = made.root / "compacted" / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": 0}))
    assert made.compact() == 0
    assert lock.exists()
    old = files.now(made.root / "compacted") - files.LOCK_STALE_SECONDS - 1
    os.utime(lock, (old, old))
    assert made.compact() == 1
    assert not lock.exists()
    made.commit(row(2))
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "time": 0}))
    assert made.compact() == 0, "this process lives"
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock.write_text(json.dumps({"host": socket.gethostname(), "pid": gone.pid, "time": 0}))
    assert made.compact() == 1, "its holder is gone"


def test_the_clock_of_this_machine_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepared(tmp_path, row(1))
    (made.root / "compacted" / "lock").write_text("torn")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert made.compact() == 0
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert made.compact() == 0
    (made.root / "compacted" / "lock").unlink()
    assert made.compact() == 1


def test_many_compactions_keep_few_parts_and_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "GROUP_CELLS", 3)
    monkeypatch.setattr(store, "PART_GROUPS", 2)
    monkeypatch.setattr(store, "MAX_SMALL_PARTS", 3)
    made, rows = prepared(tmp_path), []
    for number in range(24):
        rows.append(row(number))
        made.commit(rows[-1])
        if number % 2:
            assert made.compact() == 2
        assert len(made._manifest().parts) <= 24 // 6 + 3
    assert_holds(read_results(made), rows)
    compacted = os.listdir(made.root / "compacted")
    assert sum(name.startswith("manifest") for name in compacted) <= 2
    assert {name for name in compacted if name.startswith("part")} == {part.file for part in made._manifest().parts}
    for part in made._manifest().parts:
        path = made.root / "compacted" / part.file
        assert all(len(table) >= 3 for table in cells.decode(path.read_bytes(), path)[:-1])


# Foreign, damaged, older and newer files.


def test_temporary_and_foreign_files_are_no_data(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    folder = made.root / "cells"
    content = cells.encode(row(2))
    for name in (".tmp-old", ".tmp-new", f"{key(2)}.arrows.tmp", f"{key(2)}.arrows~", f".{key(2)}.arrows", "part-0.arrows", "README"):
        (folder / name).write_bytes(content)
    (folder / "folder").mkdir()
    old = files.now(folder) - store.DEBRIS_STALE_SECONDS - 1
    os.utime(folder / ".tmp-old", (old, old))
    os.utime(folder / "README", (old, old))
    for _ in range(2):
        assert made.keys() == {key(1)}
        assert_holds(read_results(made), [row(1)])
        assert made.compact() in (0, 1)
    assert not (folder / ".tmp-old").exists()
    assert (folder / ".tmp-new").exists()
    assert (folder / "README").exists()


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"hello",
    "magic only": lambda data: b"PAR1PAR1",
    "zero page": lambda data: data[:1000] + bytes(1000) + data[2000:],
}


@pytest.mark.parametrize("is_compacted", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_by_readers_and_can_be_set_aside(tmp_path: Path, damage: str, is_compacted: bool) -> None:
    made = prepared(tmp_path, row(1))
    made.compact()
    made.commit(row(2))
    if is_compacted:
        made.compact()
    path = made.root / "compacted" / made._manifest().parts[1].file if is_compacted else made.root / "cells" / f"{key(2)}.arrows"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(StoreError, match="verify") as caught:
        read_results(made)
    assert caught.value.filename == str(path)
    assert [error.filename for error in made.verify()] == [str(path)]
    assert path.exists()
    assert len(made.verify(set_aside=True)) == 1
    assert made.verify() == []
    assert made.keys() == {key(1)}
    assert made.commit(row(2))
    assert_holds(read_results(made), [row(1), row(2)])
    assert len(os.listdir(made.root / "set_aside")) == 1


@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path, is_compacted: bool) -> None:
    made = prepared(tmp_path, row(3))
    if is_compacted:
        made.compact()
    path = next((made.root / ("compacted" if is_compacted else "cells")).glob("*.arrows"))
    data, choose, num_errors = path.read_bytes(), random.Random(1), 0
    for _ in range(60):
        place = choose.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << choose.randrange(8))]) + data[place + 1 :])
        named = None
        try:
            assert_holds(read_results(made), [row(3)])
        except StoreError as error:
            named = error.filename
            num_errors += 1
        assert named in (None, str(path))
    assert num_errors > 10


@pytest.mark.parametrize("is_compacted", [False, True])
def test_a_changed_figure_is_an_error(tmp_path: Path, is_compacted: bool) -> None:
    made = prepared(tmp_path, row(3))
    if is_compacted:
        made.compact()
    path = next((made.root / ("compacted" if is_compacted else "cells")).glob("*.arrows"))
    figure = struct.pack("<d", 3 / 7)
    assert path.read_bytes().count(figure) == 1
    path.write_bytes(path.read_bytes().replace(figure, struct.pack("<d", 4 / 7)))
    with pytest.raises(StoreError, match="damaged") as caught:
        read_results(made)
    assert caught.value.filename == str(path)


def test_a_missing_part_is_an_error_not_a_smaller_table(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    made.compact()
    part = next((made.root / "compacted").glob("part-*"))
    part.unlink()
    with pytest.raises(StoreError, match="missing") as caught:
        read_results(made)
    assert caught.value.filename == str(part)
    assert len(made.verify(set_aside=True)) == 1
    assert made.keys() == set()


def test_a_cell_under_another_cells_name_is_damage(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    (made.root / "cells" / f"{key(1)}.arrows").rename(made.root / "cells" / f"{key(2)}.arrows")
    with pytest.raises(StoreError, match="one cell of its name"):
        read_results(made)


def test_a_manifest_that_is_torn_newer_or_points_elsewhere_is_an_error(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    made.compact()
    path = next((made.root / "compacted").glob("manifest-*"))
    content = json.loads(path.read_text())
    stolen = [content["parts"][0] | {"file": "../../secret.parquet"}]
    for text in ("", "{", "[]", "{}", '{"version": 1, "parts": [{}]}', json.dumps(content | {"parts": stolen}), json.dumps(content | {"version": 3})):
        path.write_text(text)
        for read in (lambda: Store(made.root).keys(), lambda: read_results(made.root)):
            with pytest.raises(StoreError) as caught:
                read()
            assert caught.value.filename == str(path)
    assert "update iclgd" in str(caught.value)


def test_a_pipe_in_a_store_from_elsewhere_is_refused_without_waiting(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    os.mkfifo(made.root / "cells" / f"{key(1)}.parquet")
    with pytest.raises(StoreError, match="not a regular file"):
        read_results(made)


def without(kind: pa.DataType, name: str) -> pa.DataType:
    return pa.list_(pa.struct([field for field in kind.value_type if field.name != name]))


def write_as(path: Path, schema: pa.Schema, *rows: dict[str, Any]) -> None:
    """Write rows as a version with this schema would: Parquet with one column of measures, or a stream in which each kind has a column."""
    if path.suffix == ".arrows":
        kinds = {name: [m for m in rows[0].get("measures") or [] if f"{m['kind']}s" == name] for name in ("controls", "pairs", "metrics")}
        schema = pa.schema([field for field in schema if field.name != "measures"] + [field for field in cells.STORED if field.name in kinds])
        table = pa.Table.from_pylist([each | kinds for each in rows], schema=schema)
        path.write_bytes(b"".join(cells._messages(schema, [table])))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrows"])
@pytest.mark.parametrize("is_compacted", [False, True])
def test_files_of_an_older_version_read_with_null_for_what_it_did_not_know(tmp_path: Path, is_compacted: bool, suffix: str) -> None:
    made = prepared(tmp_path, row(1))
    old = pa.schema(
        [
            pa.field(
                field.name,
                without(field.type, "sim_aou") if field.name == "layers" else without(field.type, "fold") if field.name == "examples" else field.type,
            )
            for field in CELL
            if field.name != "accuracy"
        ]
    )
    write_as(made.root / "cells" / f"{key(2)}{suffix}", old, row(2))
    write_as(made.root / "cells" / f"{key(3)}{suffix}", old, row(3, layers=None))
    if is_compacted:
        assert made.compact() == 3
    expected = [row(2), row(3, layers=None)]
    for each in expected:
        del each["accuracy"]
        each["layers"] = each["layers"] and [{name: value for name, value in layer.items() if name != "sim_aou"} for layer in each["layers"]]
        each["examples"] = [{name: value for name, value in example.items() if name != "fold"} for example in each["examples"]]
    assert_holds(read_results(made), [row(1), *expected])


def test_a_part_of_an_older_version_is_read_and_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = pa.schema(
        [pa.field(field.name, without(field.type, "noise_floor") if field.name == "layers" else field.type) for field in CELL if field.name != "peak_gib"]
    )
    made = prepared(tmp_path)
    part = made.root / "compacted" / f"part-00000001-{'0' * 16}.parquet"
    write_as(part, old, row(1), row(2))
    listed = {"file": part.name, "sha256": hashlib.sha256(part.read_bytes()).hexdigest(), "commits": {key(1): "1" * 16, key(2): "2" * 16}}
    (part.parent / "manifest-00000001.json").write_text(json.dumps({"version": 1, "parts": [listed]}))
    assert made.keys() == {key(1), key(2)}
    assert_holds(read_results(made), [row(1), row(2)])
    assert made.verify() == []
    monkeypatch.setattr(store, "MAX_SMALL_PARTS", 1)
    made.commit(row(3))
    assert made.compact() == 1
    assert not part.exists()
    assert_holds(read_results(made), [row(1), row(2), row(3)])


def test_a_cell_that_an_older_version_wrote_is_there(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    for number in (1, 2):  # the first at the same time as this version
        write_as(made.root / "cells" / f"{key(number)}.parquet", CELL, row(number))
    assert key(2) in made
    assert not made.commit(row(2, accuracy=0.5))
    assert made.keys() == {key(1), key(2)}
    assert_holds(read_results(made), [row(1), row(2)])
    assert made.compact() == 2
    assert os.listdir(made.root / "cells") == []
    assert_holds(read_results(made), [row(1), row(2)])


@pytest.mark.parametrize("is_mapped", [True, False])
def test_what_was_read_stays_when_its_file_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mapped: bool) -> None:
    made = prepared(tmp_path, row(1), row(2))
    made.compact()
    mapped = []
    real = pa.memory_map
    monkeypatch.setattr(pa, "memory_map", lambda path: (mapped.append(path), real(path))[1])
    monkeypatch.setattr(os, "major", lambda device: 8 if is_mapped else 0)  # 0: no disk of this machine
    results = read_results(made)
    (part,) = (made.root / "compacted").glob("part-*")
    assert mapped == [str(part)] * is_mapped
    part.unlink()
    assert_holds(results, [row(1), row(2)])


@pytest.mark.parametrize("suffix", [".parquet", ".arrows"])
@pytest.mark.parametrize("where", ["row", "layers", "type"])
def test_files_of_a_newer_version_are_refused_with_the_advice_to_update_and_never_set_aside(tmp_path: Path, where: str, suffix: str) -> None:
    made = prepared(tmp_path)
    newer = CELL.append(pa.field("entropy", pa.float64()))
    if where == "layers":
        longer = pa.list_(pa.struct([*CELL.field("layers").type.value_type, pa.field("entropy", pa.float64())]))
        newer = CELL.set(CELL.get_field_index("layers"), pa.field("layers", longer))
    if where == "type":
        newer = CELL.set(CELL.get_field_index("step"), pa.field("step", pa.float64()))
    write_as(made.root / "cells" / f"{key(2)}{suffix}", newer, row(2))
    with pytest.raises(StoreError, match="step as double" if where == "type" else "entropy") as caught:
        read_results(made)
    assert "update iclgd" in str(caught.value)
    assert key(2) in str(caught.value)
    with pytest.raises(StoreError, match="update iclgd"):
        made.compact()
    assert len(made.verify(set_aside=True)) == 1
    assert made.keys() == {key(2)}
