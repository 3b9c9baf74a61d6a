"""The store: what is committed is there once, whole, for every reader."""

from __future__ import annotations

import errno
import math
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from iclgd_dist import files
from iclgd_dist.schema import ATTEMPT
from iclgd_dist.store import Store, StoreError, read_results
from iclgd_dist.upkeep import verify
from tests.stores import assert_holds, key, prepared, row


def test_where_nobody_may_write_is_known_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    for may in (True, False):
        monkeypatch.setattr(os, "access", lambda path, mode, may=may: asked.append(path) or may)
        assert files.is_writable(tmp_path / "a" / "b") is may
    assert asked == [tmp_path, tmp_path] and not list(tmp_path.iterdir())


def test_a_new_store_touches_nothing_and_is_empty(tmp_path: Path) -> None:
    missing = Store(tmp_path / "store")
    assert missing.keys() == set()
    assert key(1) not in missing
    assert missing.compact() == 0
    assert missing.sweeps() == []
    assert missing.attempts().num_rows == 0
    assert verify(missing).damaged == []
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
    search = made.save_sweep(digest="0123456789abcdef", resolved={"name": "x"}, keys=[key(1)], kind="search")
    assert other != search, "what a search evaluated and what a grid plans are two records, though of the same cells"
    assert other != first
    assert first.read_bytes() == content
    oldest, newest, _ = made.sweeps()
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
