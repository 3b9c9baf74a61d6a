"""Accidents of storage under a running sweep: calls that fail, a full disk, no hard links, damage, a compaction that is killed."""

from __future__ import annotations

import errno
import os
import subprocess
import time
from pathlib import Path

import pytest

from iclgd_dist import files
from iclgd_dist.store import Store, read_results
from tests.faults.case import ICLGD, Case
from tests.stores import run_python

pytestmark = pytest.mark.slow


@pytest.mark.long
@pytest.mark.parametrize(("call", "code", "nth"), [("open", errno.EIO, 2), ("write", errno.ENOSPC, 2), ("fsync", errno.EIO, 1), ("link", errno.EIO, 2)])
def test_f3_a_system_call_that_fails_is_an_error_with_the_path_and_a_resume_completes(case: Case, call: str, code: int, nth: int) -> None:
    case.plot({"what": "call_fails", "call": call, "code": code, "nth": nth, "seed": 2, "step": 2})
    said = case.run(code=74)
    assert str(case.store.root) in said and os.strerror(code) in said
    assert [attempt["outcome"] for attempt in case.store.attempts().to_pylist() if attempt["outcome"] != "done"] == ["storage"]
    before = case.committed()
    case.run()
    case.check(before)


@pytest.mark.long
def test_f13_a_full_disk_ends_with_74_and_a_resume_completes(case: Case) -> None:
    case.plot({"what": "disk_full", "bytes": 4_000, "times": 2})
    said = case.run(code=74)
    assert "free space" in said
    case.plot()
    before = case.committed()
    case.run()
    case.check(before)


@pytest.mark.long
def test_f14_a_place_that_cannot_be_written_is_refused_at_once(case: Case) -> None:
    (case.folder / "file").write_text("")
    for where in (case.folder / "file", Path("/proc/store")):
        before = time.monotonic()
        with pytest.raises(files.StoreError, match=r"choose a directory|check the path"):
            Store(where).prepare()
        assert time.monotonic() - before < 2
        said = subprocess.run([*ICLGD, "run", str(case.file), "--store", str(where)], capture_output=True, text=True, timeout=60, cwd=case.folder)
        assert said.returncode == 74 and said.stderr.startswith(f"{where}") and said.stderr.count("\n") == 1, said.stderr
    case.facts["injections"] = 2
    case.run()
    case.check()


@pytest.mark.long
def test_f14_without_hard_links_the_first_writer_still_wins(case: Case) -> None:
    case.plot({"what": "no_links", "times": 2})
    case.run()
    case.check()


@pytest.mark.long
@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_f21_a_damaged_cell_is_named_refused_set_aside_and_run_again(case: Case, damage: str) -> None:
    case.write(seeds=[1, 2])
    case.run()
    case.facts["injections"] = 1
    part = next((case.store.root / "compacted").glob("part-*"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes({"flip": data, "cut": data[:-100], "empty": b""}[damage])
    with pytest.raises(files.StoreError, match="verify"):
        read_results(case.store)
    said = subprocess.run([*ICLGD, "verify", str(case.store.root)], capture_output=True, text=True)
    assert said.returncode == 74 and part.name in said.stdout
    said = subprocess.run([*ICLGD, "verify", str(case.store.root), "--quarantine"], capture_output=True, text=True)
    assert said.returncode == 3 and "missing" in said.stdout
    case.store = Store(case.store.root)
    case.run()
    case.check()


@pytest.mark.long
@pytest.mark.parametrize("point", ["mid_write", "before_manifest", "after_manifest"])
def test_f22_a_compaction_killed_at_any_point_changes_no_row(case: Case, point: str) -> None:
    case.write(seeds=[1, 2])
    driver = case.start()
    case.wait(lambda: len(case.committed()) >= 8)
    driver.kill()
    driver.wait()
    rows = {row["key"]: row for row in read_results(case.store).cells.to_pylist()}
    code = """
        made = store.Store(sys.argv[1])
        store.fault_point = lambda name: os._exit(7) if name == sys.argv[2] else None
        made.compact()
    """
    assert run_python(code, case.store.root, point).wait() == 7
    case.facts["injections"] = 1
    now = {row["key"]: row for row in read_results(Store(case.store.root)).cells.to_pylist()}
    assert {key: now[key] for key in rows} == rows  # an actor may have committed more before it noticed that the driver is gone
    case.run()
    case.check()


@pytest.mark.long
def test_f18_diverged_cells_are_found_beside_equal_values_before_and_after_compaction(case: Case) -> None:
    case.write(seeds=[1], rates="[0.002, 1e30]", actors=1)
    case.run()
    case.facts["injections"] = 1
    cells = read_results(case.store).cells.to_pandas()
    loose = Store(case.folder / "loose")
    loose.prepare()
    for table in Store(case.store.root).part_tables(case.store.manifest().parts[0]):
        for row in table.to_pylist():
            measures = [{"kind": kind[:-1]} | measure for kind in ("controls", "pairs", "metrics", "extras") for measure in row.pop(kind) or []]
            loose.commit(row | {"measures": measures})
    for found in (cells, read_results(loose).cells.to_pandas()):
        diverged = found[found.status == "diverged"]
        assert set(diverged.learning_rate) == {1e30} and diverged.sim_aou.isna().all()
        assert found[found.status == "done"].sim_aou[found.kind == "finetuned"].notna().all()
    case.check()
