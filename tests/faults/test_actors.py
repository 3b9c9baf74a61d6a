"""Accidents of actors: killed, out of memory, paused, diverging, with a wrong clock."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from iclgd_dist import claims
from iclgd_dist.store import Store, read_results
from tests.faults.case import Case

pytestmark = pytest.mark.slow


def test_f1_an_actor_killed_in_a_block_is_replaced_and_leaves_a_record(case: Case) -> None:
    case.plot(*({"what": "kill", "seed": seed, "step": random.choice([2, 4])} for seed in (2, 5)))
    case.run()
    lost = case.attempts("lost")
    assert len(lost) == 2 and all("actor" in attempt["reason"].lower() for attempt in lost), lost
    assert {attempt["block"].split("-")[2] for attempt in lost} == {"s2", "s5"}
    case.check()


@pytest.mark.long
def test_f1_a_block_that_always_kills_its_actor_is_given_up_and_the_others_are_done(case: Case) -> None:
    case.plot({"what": "kill", "seed": 3, "always": True, "times": 4})
    said = case.run(code=3)
    assert "its actor died 4 times" in said
    assert len(case.attempts("lost")) == 4
    done = {block.name for block in case.plan().blocks if block.seed != 3}
    assert done <= {attempt["block"] for attempt in case.attempts("done")}
    case.plot()
    case.run()
    case.check()


def test_f4_after_each_death_half_as_many_learning_rates_train_at_once(case: Case) -> None:
    case.write(seeds=[1, 2], rates="[0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05]")
    case.plot({"what": "kill", "seed": 1, "lanes": 2, "always": True})
    case.run()
    assert len(case.attempts("lost")) == 2, "8 and 4 at once; 2 are no reason to die"
    case.check()


@pytest.mark.long
@pytest.mark.parametrize(("gib", "num_oom"), [(2.5, 0), (0.5, 1)])
def test_f4_out_of_memory_halves_the_lanes_and_a_lane_that_does_not_fit_stays_pending(case: Case, gib: float, num_oom: int) -> None:
    case.write(seeds=[1, 2], rates="[0.002, 0.005, 0.01, 0.05]")
    case.plot({"what": "memory", "gib": gib, "always": True, "seed": 1})
    case.run(code=3 if num_oom else 0)
    assert len(case.attempts("oom")) == num_oom
    pending = set(case.plan().keys) - case.store.keys()
    trained = {cell.key for block in case.plan().blocks if block.seed == 1 for cell in block.cells if cell.method == "accident"}
    assert pending == (trained if num_oom else set())
    lanes = {attempt["num_lanes"] for attempt in case.attempts() if "-s1-" in attempt["block"]}
    assert lanes == {1 if num_oom else 2}, "they were halved"
    case.check(lost=pending)


@pytest.mark.long
def test_f12_a_clock_an_hour_back_changes_nothing(case: Case) -> None:
    case.plot({"what": "clock", "times": 2})
    case.run()
    case.check()


@pytest.mark.long
def test_f15_a_paused_writer_is_overtaken_and_dropped_without_error(case: Case) -> None:
    """One driver's actor is stopped for longer than its claim lives; another finishes; then the first goes on."""
    case.write(seeds=[1, 2], actors=1)
    case.plot({"what": "stop", "seed": 1, "step": 2})
    first = case.start()
    case.wait(lambda: (case.folder / "stopped").exists() and (case.folder / "stopped").read_text())
    paused = int((case.folder / "stopped").read_text())
    case.wait(lambda: "T" in Path(f"/proc/{paused}/stat").read_text().rpartition(")")[2].split()[0])
    for name in os.listdir(case.store.root / "claims"):
        long_ago = time.time() - claims.STALE_SECONDS - 1
        os.utime(case.store.root / "claims" / name, (long_ago, long_ago))
    second = case.start()
    case.wait(lambda: case.store.keys() == set(case.plan().keys))
    second.kill()  # before it compacts: the late writer finds the other's files
    second.wait()
    before = case.committed()
    os.kill(paused, signal.SIGCONT)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    case.check(before)


@pytest.mark.long  # without Ray in test_block.py
def test_f17_a_diverging_lane_among_four_leaves_the_others_as_they_are(case: Case) -> None:
    case.write(seeds=[1], actors=1, rates="[0.002, 0.005, 0.05, 1e30]")
    case.facts["injections"] = 2
    case.run()
    cells = {row["key"]: row for row in read_results(case.store).cells.to_pylist() if row["kind"] == "finetuned"}
    assert {row["learning_rate"] for row in cells.values() if row["status"] == "diverged"} == {1e30}
    calm, planned = Store(case.folder / "calm"), case.plan()
    case.write(rates="[0.002, 0.005, 0.05, 0.01]")
    case.store, ours = calm, case.store
    case.run()
    shared = {key for key, row in cells.items() if row["learning_rate"] != 1e30}
    for key, row in {row["key"]: row for row in read_results(calm).cells.to_pylist()}.items():
        if key in shared:
            assert {name: row[name] for name in ("sim_aou", "loss", "update_ratio", "delta_norm")} == {
                name: cells[key][name] for name in ("sim_aou", "loss", "update_ratio", "delta_norm")
            }, "bit for bit"
    case.store = ours
    case.write(rates="[0.002, 0.005, 0.05, 1e30]")
    assert set(planned.keys) == set(case.plan().keys)
    case.check()


@pytest.mark.long
def test_f2_a_reader_that_polls_while_actors_die_around_commits_never_sees_half_a_cell(case: Case) -> None:
    case.plot(*({"what": "die_at", "point": point, "seed": seed} for seed, point in ((1, "mid_write"), (2, "before_link"), (3, "after_link"))))
    reads, ended = [], threading.Event()

    def poll() -> None:
        while not ended.wait(0.05):
            if (case.store.root / "cells").is_dir():
                results = read_results(case.store)
                assert len(set(results.cells["key"].to_pylist())) == len(results.cells)
                reads.append(len(results.cells))

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            poll()
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=guarded)
    reader.start()
    try:
        case.run()
    finally:
        ended.set()
        reader.join()
    assert not failures and len(reads) > 5 and reads == sorted(reads)
    assert len(case.attempts("lost")) == 3
    case.check()
