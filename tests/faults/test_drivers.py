"""Accidents of drivers: killed, signalled, two at once; and sweep files that change between runs."""

from __future__ import annotations

import glob
import os
import random
import signal
import time

import pytest

from iclgd_dist.store import read_results
from tests.faults.case import Case

slow = pytest.mark.slow


@pytest.mark.long
@slow
def test_f7_a_driver_killed_at_ten_random_times_loses_nothing(case: Case) -> None:
    case.write(seeds=list(range(1, 25)))
    case.plot({"what": "slow", "seconds": 0.2, "times": 200})
    in_flight = 0
    for _ in range(10):
        driver, num_before = case.start(), len(case.store.keys())
        case.wait(lambda before=num_before: len(case.store.keys()) > before)
        time.sleep(random.uniform(0, 2))
        driver.kill()
        driver.wait()
        in_flight += 2 * 2 * 2 * 4  # two actors, each at most a whole block: 2 methods x 2 learning rates x 4 steps
        case.facts["injections"] += 1
    before = case.committed()
    case.run()
    facts = case.check(before)
    assert facts["recomputed"] <= in_flight


@slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), pytest.param(signal.SIGINT, 130, marks=pytest.mark.long)])
def test_f8_a_signal_drains_in_ten_seconds_and_says_how_to_resume(case: Case, number: signal.Signals, code: int) -> None:
    driver = case.start()
    case.wait(lambda: len(case.committed()) >= 3)
    before, sent = case.committed(), time.monotonic()
    os.kill(driver.pid, number)
    said, _ = driver.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert driver.returncode == code, said
    assert f"run {case.file}" in said.rstrip().splitlines()[-1]
    case.facts["injections"] = 1
    case.run()
    case.check(before)


@pytest.mark.long
@slow
def test_f8_a_long_step_is_not_waited_for(case: Case) -> None:
    case.plot({"what": "slow", "seconds": 60})
    driver = case.start()
    case.wait(lambda: list(case.folder.glob("happened-*")))
    sent = time.monotonic()
    os.kill(driver.pid, signal.SIGTERM)
    said, _ = driver.communicate(timeout=60)
    assert time.monotonic() - sent < 10
    assert driver.returncode == 75 and f"run {case.file}" in said.rstrip().splitlines()[-1], said
    case.facts["injections"] = 1
    case.run()
    case.check()


@pytest.mark.long
@slow
def test_f10_what_tune_leaves_of_its_own_state_has_no_effect(case: Case) -> None:
    driver = case.start()
    case.wait(lambda: len(case.committed()) >= 3)
    for path in glob.glob(f"/tmp/ray/session_*_{driver.pid}/artifacts/**/experiment_state*.json", recursive=True):
        os.truncate(path, 10)
        case.facts["injections"] += 1
    assert case.facts["injections"], "Tune keeps such files elsewhere now"
    said, _ = driver.communicate(timeout=120)
    assert driver.returncode == 0, said
    assert not list(case.store.root.glob(".tune*")), "nothing of Tune's is in the store"
    case.check()


@slow
def test_f11_two_drivers_on_one_store_share_the_work(case: Case) -> None:
    case.share()


@pytest.mark.long
@slow
def test_f19_a_sweep_file_that_grows_shrinks_or_changes_runs_new_cells_only(case: Case) -> None:
    case.write(seeds=[1, 2])
    case.run()
    first, steps = {row["key"]: row for row in read_results(case.store).cells.to_pylist()}, case.num_steps()
    case.facts["injections"] = 3
    case.write(seeds=[1, 2, 3])
    case.run()
    assert case.num_steps() == steps * 3 // 2
    rows = {row["key"]: row for row in read_results(case.store).cells.to_pylist()}
    assert {key: rows[key] for key in first} == first
    case.write(seeds=[1])
    assert f"0 cells to run: all {len(set(case.plan().keys))} are in" in case.run()
    case.write(seeds=[1], template="Would you call {text} sweet?")
    case.run()
    assert case.store.keys() > rows.keys() and len(case.store.keys()) == len(rows) + len(set(case.plan().keys))
    case.check(extra=True)


@pytest.mark.long
@slow
def test_a_budget_of_hours_stops_like_sigterm_and_the_same_command_resumes(case: Case) -> None:
    case.write(seeds=list(range(1, 13)))
    case.plot({"what": "slow", "seconds": 5, "times": 100})
    said = case.run("--hours", "0.015", code=75)
    assert "0.015 hours are spent" in said
    case.plot()
    case.facts["injections"] = 1
    case.run()
    case.check()
