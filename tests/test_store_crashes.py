"""The store when processes are killed, system calls fail, or links are missing: a cell is there whole or not at all."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from iclgd_dist.store import Store, StoreError, read_results
from iclgd_dist.upkeep import debris, verify
from tests.stores import FailsOnce, assert_holds, key, no_link, prepared, row, run_python


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
        fail = FailsOnce(real, nth, code)
        monkeypatch.setattr(os, name, fail)
        error = None
        try:
            made.commit(row(nth))
        except StoreError as caught:
            error = caught
        monkeypatch.setattr(os, name, real)
        if fail.calls >= nth:
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
        fail = FailsOnce(real, nth, errno.EIO)
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
        assert message or fail.calls < nth
        assert_holds(read_results(Store(made.root)), rows)
    assert {part.file for part in Store(made.root).manifest().parts} <= set(os.listdir(made.root / "compacted"))
    assert not list(debris(made)), "what a failed compaction left is a day from being deleted"


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links_the_first_writer_still_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    made = prepared(tmp_path, row(1))
    monkeypatch.setattr(os, "link", no_link(code))
    made.prepare()
    assert not made.commit(row(1, accuracy=0.5)), "a linked cell is there"
    assert made.commit(row(2))
    assert not made.commit(row(2, accuracy=0.5))
    assert verify(made).damaged == []
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
