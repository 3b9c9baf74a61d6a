"""What the driver makes of what Tune tells it, without Ray: a block that is not at its end is left for later, and Tune's own state is kept nowhere."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow import fs

from iclgd_dist import trials
from iclgd_dist.blocks import Block, Judged
from iclgd_dist.config import load_sweep
from iclgd_dist.nowhere import nowhere
from iclgd_dist.plan import make_plan
from iclgd_dist.progress import Counts
from iclgd_dist.stopping import Stopped
from iclgd_dist.store import Store
from iclgd_dist.trials import BEHIND, MAX_FAILURES, Running, _counting


def told(folder: Path, block: Block, outcome: str) -> tuple[Counts, Store]:
    """Let Tune tell of a block's last report and that the trial is complete."""
    counts, store, resources = Counts(), Store(folder / "told"), load_sweep(folder / "tiny.toml").resources
    store.prepare()
    newcomers: Any = None
    callback = _counting(Running(store, "a-run", counts, resources, Stopped(), newcomers), None, [block])
    report = {"block": block.name, "fraction": 0.5, "stage": "", "num_cells": 1, "outcome": outcome, "reason": "", "gflops": 0.0, "actor": "1", "node": ""}
    trial = SimpleNamespace(trial_id="t", config={"block": block.name}, last_result=report)
    callback.on_trial_result(1, [trial], trial, report)
    callback.on_trial_complete(1, [trial], trial)
    return counts, store


@pytest.mark.parametrize("outcome", ["elsewhere", "done", "failed"])
def test_a_block_that_says_how_it_ended_has_ended_like_that(sweep_file: Path, outcome: str) -> None:
    block = make_plan(load_sweep(sweep_file)).blocks[0]
    judged = replace(block, judged=Judged("nll_label", 1.0, 2, (2, 4)))
    for each in (block, judged):
        counts, store = told(sweep_file.parent, each, outcome)
        assert counts.outcomes[block.name][0] == outcome and not store.attempts().num_rows


def test_a_block_that_a_scheduler_ended_is_stopped_and_leaves_an_attempt(sweep_file: Path) -> None:
    block = replace(make_plan(load_sweep(sweep_file)).blocks[0], judged=Judged("nll_label", 1.0, 2, (2, 4)))
    counts, store = told(sweep_file.parent, block, "")
    assert counts.outcomes[block.name] == ("stopped", BEHIND)
    assert [(attempt["block"], attempt["outcome"], attempt["reason"]) for attempt in store.attempts().to_pylist()] == [(block.name, "stopped", BEHIND)]


@pytest.mark.parametrize(("known", "action"), [((), "CONTINUE"), (((0.1, 2, 0.1), (0.1, 4, 0.1), (0.2, 2, 0.3)), "STOP")])
def test_asha_compares_with_what_was_there_before_this_run(sweep_file: Path, known: tuple[tuple[float, int, float], ...], action: str) -> None:
    block = replace(make_plan(load_sweep(sweep_file)).blocks[0], judged=Judged("nll_label", 1.0, 2, (2, 4), known))
    scheduler = trials._scheduler([block])
    trial = SimpleNamespace(trial_id="t", config={"block": block.name})
    scheduler.on_trial_add(None, trial)
    assert scheduler.on_trial_result(None, trial, {"judged_step": 2, "judged": 0.5}) == action


def test_an_actor_that_dies_in_its_creation_does_not_count_against_its_block_and_new_nodes_are_looked_at(sweep_file: Path, monkeypatch: Any) -> None:
    """A node that joined and lacks the package kills whatever is sent to it, until it has said so itself."""
    block, counts, store = make_plan(load_sweep(sweep_file)).blocks[0], Counts(), Store(sweep_file.parent / "told")
    store.prepare()
    looks: list[None] = []
    newcomers: Any = SimpleNamespace(asked={}, look=lambda: looks.append(None) or ())
    monkeypatch.setattr(trials, "nodes", list)
    monkeypatch.setattr(trials, "num_slots", lambda resources: 1)
    callback = _counting(Running(store, "a-run", counts, load_sweep(sweep_file).resources, Stopped(), newcomers), SimpleNamespace(max_concurrent=1), [block])
    said = sweep_file.parent / "error.txt"
    trial = SimpleNamespace(trial_id="t", config={"block": block.name}, error_file=str(said), num_failures=0, status="PENDING")
    for number in range(1, MAX_FAILURES + 2):
        said.write_text(f"Failure # {number} (occurred at 2026-01-01)\nThe actor died because of an error raised in its creation task, __init__()\n")
        trial.num_failures = number
        callback.on_step_begin(number, [trial])
        assert len(looks) == number - 1
        (callback.on_trial_recover if number <= MAX_FAILURES else callback.on_trial_error)(number, [trial], trial)
    assert counts.outcomes[block.name][0] == "again" and not counts.deaths
    assert [attempt["outcome"] for attempt in store.attempts().to_pylist()] == ["lost"] * (MAX_FAILURES + 1)


def test_tunes_own_state_is_kept_nowhere_so_that_it_cannot_grow_by_itself(tmp_path: Path) -> None:
    """A trial's state holds the file system: what that keeps would be in the next snapshot."""
    kept = nowhere()
    size = len(pickle.dumps(kept))
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "result.json").write_text("x" * 100_000)
    fs.copy_files(str(tmp_path), "/nowhere/run", source_filesystem=fs.LocalFileSystem(), destination_filesystem=kept)
    assert len(pickle.dumps(kept)) == size < 1000
    assert kept.open_input_stream("/nowhere/run/trial/result.json").read() == b""
    assert pickle.loads(pickle.dumps(kept)) == kept
    found = kept.get_file_info(["/nowhere/run/.validate_storage_marker", "/nowhere/run/trial/error.pkl"])
    assert [info.type for info in found] == [fs.FileType.File, fs.FileType.NotFound], "an error that is there would be unpickled, from nothing"
