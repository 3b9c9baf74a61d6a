"""The store with several writers, readers and compactions at once."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from iclgd_dist import cells, files, locks, store
from iclgd_dist.store import Store, read_results
from tests.stores import assert_holds, at, key, prepared, row, run_python


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


def test_cells_that_are_compacted_while_a_reader_begins_are_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = prepared(tmp_path, row(1), row(2)), Store.loose

    def overtaken(self: Store) -> object:
        monkeypatch.setattr(Store, "loose", real)
        assert Store(made.root).compact() == 2
        return real(self)

    monkeypatch.setattr(Store, "loose", overtaken)
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
    listed = {part.file for part in made.manifest().parts}
    assert {name for name in os.listdir(made.root / "compacted") if name.startswith("part")} == listed


def test_a_live_lock_is_respected_and_a_stale_one_is_not(tmp_path: Path) -> None:
    made = prepared(tmp_path, row(1))
    lock = made.root / "compacted" / "lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "time": 0}))
    assert made.compact() == 0
    assert lock.exists()
    old = files.now(made.root / "compacted") - locks.STALE_SECONDS - 1
    os.utime(lock, (old, old))
    assert made.compact() == 1
    assert not lock.exists()
    made.commit(row(2))
    lock.write_text(json.dumps(locks.here() | {"pid": os.getpid(), "time": 0}))
    assert made.compact() == 0, "this process lives"
    gone = subprocess.Popen(["true"])
    gone.wait()
    lock.write_text(json.dumps(locks.here() | {"space": 1, "pid": gone.pid, "time": 0}))
    assert made.compact() == 0, "a process id of another container of this machine says nothing here"
    lock.write_text(json.dumps(locks.here() | {"pid": gone.pid, "time": 0}))
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
        assert len(made.manifest().parts) <= 24 // 6 + 3
    assert_holds(read_results(made), rows)
    compacted = os.listdir(made.root / "compacted")
    assert sum(name.startswith("manifest") for name in compacted) <= 2
    assert {name for name in compacted if name.startswith("part")} == {part.file for part in made.manifest().parts}
    for part in made.manifest().parts:
        path = made.root / "compacted" / part.file
        assert all(len(table) >= 3 for table in cells.decode(path.read_bytes(), path)[:-1])
