"""Real Ray on this machine: killed drivers, signals. One small sweep on a tiny model, driven through the command line."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from iclgd_dist.claims import claimed
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results, short_hash

pytestmark = pytest.mark.slow
ICLGD = [sys.executable, "-m", "iclgd_dist.cli"]


@pytest.fixture
def long_sweep(sweep_file: Path) -> Path:
    """Return a sweep of some 20 blocks of a second or so, for one actor."""
    text = sweep_file.read_text().replace("seeds = [1, 2]", f"seeds = {list(range(1, 21))}")
    text = re.sub(r"num_queries = 8", "num_queries = 16", text) + "\n[resources]\nmax_actors = 1\n"
    sweep_file.write_text(text)
    return sweep_file


def start(sweep: Path) -> subprocess.Popen:
    return subprocess.Popen([*ICLGD, "run", str(sweep)], cwd=sweep.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(condition, process: subprocess.Popen, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def committed(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (store / "cells").glob("[0-9a-f]*.arrows")}


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def test_a_driver_killed_in_the_middle_loses_nothing_and_nothing_is_computed_twice(long_sweep: Path) -> None:
    store = long_sweep.parent / "results" / "tiny"
    planned = make_plan(load_sweep(long_sweep))
    process = start(long_sweep)
    wait_for(lambda: len(committed(store)) >= 12, process)
    # Ray's two per-node agents notice a minute later; what computes, schedules or listens for work must end with the driver.
    children = [child for child in descendants(process) if "Agent" not in child.name()]
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, f"left behind: {alive}"
    before = committed(store)
    assert 12 <= len(before) < len(set(planned.keys))

    resumed = subprocess.run([*ICLGD, "run", str(long_sweep)], cwd=long_sweep.parent, capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    results = read_results(store)
    assert sorted(results.cells["key"].to_pylist()) == sorted(set(planned.keys)), "each planned cell once"
    done = Store(store).attempts().to_pylist()
    # What the killed run had committed was not computed again (the steps of the block in flight are in no attempt).
    clean = sum(8 * 4 // 2 for _ in planned.blocks)
    recomputed = sum(attempt["num_training_steps"] for attempt in done) - clean
    assert recomputed <= 0
    now = Store(store).manifest().commits
    assert all(now[name.partition(".")[0]] == short_hash(data) for name, data in before.items())


def test_what_another_driver_held_is_computed_when_that_driver_is_gone(sweep_file: Path) -> None:
    plan, store = make_plan(load_sweep(sweep_file)), Store(sweep_file.parent / "results" / "tiny")
    store.prepare()
    with claimed(store, plan.blocks[0], "another") as is_mine:
        assert is_mine
        driver = start(sweep_file)
        others = {cell.key for block in plan.blocks[1:] for cell in block.cells}
        wait_for(lambda: others <= store.keys(), driver)
        time.sleep(3)
        assert driver.poll() is None, f"it waits:\n{driver.communicate()[0]}"
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0 and store.keys() >= set(plan.keys), said
    assert {attempt["outcome"] for attempt in store.attempts().to_pylist()} == {"done"}


def test_more_cpus_than_a_node_has_are_refused_with_both_numbers(sweep_file: Path) -> None:
    sweep_file.write_text(sweep_file.read_text() + "\n[resources]\ncpus_per_actor = 4000\n")
    said = subprocess.run([*ICLGD, "run", str(sweep_file)], cwd=sweep_file.parent, capture_output=True, text=True, timeout=120)
    assert said.returncode == 2
    assert re.search(r"cpus_per_actor = 4000, but this machine has \d+", said.stderr)


def test_an_address_where_no_cluster_listens_is_refused_in_seconds(sweep_file: Path) -> None:
    started = time.monotonic()
    said = subprocess.run([*ICLGD, "run", str(sweep_file), "--address", "127.0.0.1:1"], cwd=sweep_file.parent, capture_output=True, text=True, timeout=60)
    assert said.returncode == 2
    assert said.stderr.strip() == "no Ray cluster answers at 127.0.0.1:1: Connection refused"
    assert time.monotonic() - started < 30
