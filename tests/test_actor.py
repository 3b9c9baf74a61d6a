"""The host of a model, without Ray: models are loaded once and swapped, what cannot run is an attempt, never a cell."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from iclgd_dist import claims, files, machine, probes, updates
from iclgd_dist.actor import ModelHost
from iclgd_dist.baselines import Baselines
from iclgd_dist.blocks import Block
from iclgd_dist.commits import Committer
from iclgd_dist.config import ModelSpec, load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, StoreError, read_results

RATES = [0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    return store


@pytest.fixture
def blocks(sweep_file: Path) -> tuple[Block, ...]:
    return make_plan(load_sweep(sweep_file)).blocks


def run(host: ModelHost, block: Block) -> dict:
    *_, last = host.steps(block)
    return last


def test_a_model_is_loaded_once_and_each_baseline_computed_once_per_block(blocks: tuple[Block, ...], store: Store) -> None:
    host = ModelHost(str(store.root), "run", 2)
    assert [run(host, block)["outcome"] for block in blocks] == ["done", "done"]
    attempts = store.attempts().to_pylist()
    assert [attempt["num_model_loads"] for attempt in sorted(attempts, key=lambda a: a["created_at"])] == [1, 0]
    assert [attempt["num_baselines"] for attempt in attempts] == [2, 2]
    assert {attempt["actor"] for attempt in attempts} == {host.actor}
    assert sum(attempt["num_training_steps"] for attempt in attempts) == 2 * 2 * 2 * 4
    assert store.keys() == {cell.key for block in blocks for cell in block.cells}


def test_a_node_that_does_not_reach_the_drivers_store_computes_nothing(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "SEEN_TRIES", 1)
    said = run(ModelHost(str(store.root), "run", 2, node="n"), blocks[0])
    assert (said["outcome"], said["reason"], said["node"]) == ("unreachable", "it does not see a file that the driver wrote", "n")
    assert not store.keys() and not len(store.attempts())
    with claims.announced(store, "run"):
        assert run(ModelHost(str(store.root), "another run", 2, node="n"), blocks[0])["outcome"] == "unreachable"
        host = ModelHost(str(store.root), "run", 2, node="n")
        assert run(host, blocks[0])["outcome"] == "done"
        monkeypatch.setattr(Store, "keys", lambda self: raise_(StoreError("cannot be read", self.root)))
        assert run(host, blocks[1])["outcome"] == "storage", "others would meet it too"
        monkeypatch.setattr(files, "names_in", lambda folder: [])
        assert run(host, blocks[1])["outcome"] == "unreachable", "it is this node's"
    monkeypatch.undo()
    assert not [name for name in files.names_in(store.root / "claims") if name.startswith(("run-", "probe-"))]


def test_a_node_that_does_not_find_the_gpus_it_declared_computes_nothing_on_its_cpu(
    blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = replace(blocks[0], resources=blocks[0].resources.model_copy(update={"gpus_per_actor": 1}))
    with claims.announced(store, "run"):
        for count, outcome in ((0, "unreachable"), (1, "done")):
            monkeypatch.setattr(machine, "num_gpus", lambda count=count: count)
            said = run(ModelHost(str(store.root), "run", 2, node="n"), block)
            assert said["outcome"] == outcome
            assert outcome == "done" or ("gpus_per_actor = 1" in said["reason"] and "finds 0: see `nvidia-smi`" in said["reason"])
            assert bool(store.keys()) == (outcome == "done")
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as the driver counts them; torch was built for a newer one
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.num_gpus() == 0


def raise_(error: Exception) -> None:
    raise error


def test_a_block_that_needs_another_model_swaps_it(blocks: tuple[Block, ...], store: Store) -> None:
    host = ModelHost(str(store.root), "run", 2)
    other = replace(blocks[1], spec=ModelSpec(source="model", compute_dtype="float64"))
    run(host, blocks[0])
    first = host.lm
    run(host, other)
    assert first is not host.lm
    assert host.lm is not None
    assert host.lm.compute_dtype == torch.float64
    assert sum(attempt["num_model_loads"] for attempt in store.attempts().to_pylist()) == 2


def test_an_untrained_model_is_another_model_and_each_of_its_seeds_too(blocks: tuple[Block, ...], store: Store) -> None:
    host, seen = ModelHost(str(store.root), "run", 2), []
    for seeds in ((), (1,), (2,)):
        spec = ModelSpec(source="model", **({"init": "random", "init_seeds": seeds} if seeds else {}))
        host._load(replace(blocks[0], spec=spec)) if host._needs_another_model(replace(blocks[0], spec=spec)) else None
        assert host.lm is not None
        seen.append(host.lm.layers[0].self_attn.q_proj.weight)
    assert len({float(weight.sum()) for weight in seen}) == 3


def test_a_finished_block_does_nothing_and_leaves_no_attempt(blocks: tuple[Block, ...], store: Store) -> None:
    run(ModelHost(str(store.root), "run", 2), blocks[0])
    host = ModelHost(str(store.root), "again", 2)
    assert run(host, blocks[0])["outcome"] == "done"
    assert host.lm is None
    assert len(store.attempts()) == 1


def test_an_exception_in_a_block_is_an_attempt_with_its_traceback_and_no_cell(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args, **_kwargs):
        raise RuntimeError("the disk of node 7 is on fire")

    monkeypatch.setattr(probes.QueryPass, "captures", broken)
    last = run(ModelHost(str(store.root), "run", 2), blocks[0])
    assert (last["outcome"], last["reason"]) == ("failed", "RuntimeError: the disk of node 7 is on fire")
    (attempt,) = store.attempts().to_pylist()
    assert attempt["outcome"] == "failed"
    assert "def broken" in attempt["traceback"] or "in broken" in attempt["traceback"]
    assert store.keys() == set()


def out_of_memory(monkeypatch: pytest.MonkeyPatch, *, above: int = 99, rate: float | None = None) -> None:
    """Let training run out of memory with more than `above` lanes at once, or with the learning rate `rate` among them."""
    real = updates.Lanes.__post_init__

    def made(lanes: updates.Lanes) -> None:
        real(lanes)
        if len(lanes.rate_N) > above or (rate is not None and any(math.isclose(float(each), rate, rel_tol=1e-6) for each in lanes.rate_N)):
            raise torch.OutOfMemoryError("out of memory [enforce fail at alloc.cpp:117]")

    monkeypatch.setattr(updates.Lanes, "__post_init__", made)


def eight_lanes(sweep_file: Path) -> Block:
    text = sweep_file.read_text().replace("vanilla = [0.003, 0.05]", f"vanilla = {RATES}").replace("layer_causal = [0.003, 0.05]", f"layer_causal = {RATES}")
    sweep_file.write_text(text)
    return make_plan(load_sweep(sweep_file)).blocks[0]


def test_eight_lanes_that_run_out_of_memory_are_halved_over_the_same_baselines(sweep_file: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    block, whole = eight_lanes(sweep_file), Store(store.root.with_name("whole"))
    whole.prepare()
    run(ModelHost(str(whole.root), "run", 2), block)
    out_of_memory(monkeypatch, above=2)
    assert run(ModelHost(str(store.root), "run", 2), block)["outcome"] == "done"
    assert store.keys() == {cell.key for cell in block.cells}
    (attempt,) = store.attempts().to_pylist()
    assert (attempt["outcome"], attempt["num_lanes"], attempt["num_baselines"]) == ("done", 2, 2)
    assert attempt["num_training_steps"] == 2 * 8 * 4
    cells, expected = (sorted(read_results(each).cells.to_pylist(), key=lambda row: row["key"]) for each in (store, whole))
    for ours, theirs in zip(cells, expected, strict=True):
        for name in ("loss", "accuracy", "nll_label", "sim_aou", "sim_am_delta", "delta_norm", "update_ratio"):
            assert ours[name] == theirs[name] or math.isclose(ours[name], theirs[name], rel_tol=1e-3, abs_tol=1e-5), name
    found = [read_results(each).pairs for each in (store, whole)]
    pairs = [{frozenset(pair) for pair in zip(table["cell_a"].to_pylist(), table["cell_b"].to_pylist(), strict=True)} for table in found]
    assert pairs[0] == pairs[1] != set(), "both methods are compared, however the lanes are split"


def test_one_lane_that_never_fits_leaves_an_attempt_and_its_cells_pending_and_nothing_else(
    sweep_file: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = eight_lanes(sweep_file)
    out_of_memory(monkeypatch, rate=RATES[5])
    reports = list(ModelHost(str(store.root), "run", 2).steps(block))
    assert [report["outcome"] for report in reports if report["outcome"]] == ["oom"]
    assert re.search(rf"vanilla, layer_causal at learning rate {RATES[5]:g} on true .*alloc.cpp:117", reports[-1]["reason"])
    assert {cell.key for cell in block.cells} - store.keys() == {cell.key for cell in block.cells if cell.learning_rate == RATES[5]}
    (attempt,) = store.attempts().to_pylist()
    assert attempt["outcome"] == "oom"
    assert RATES[5] in {cell.learning_rate for cell in block.cells}


def test_baselines_that_do_not_fit_beside_training_are_made_alone(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    real = Baselines.climb

    def climb(baselines: Baselines, layer: object, index: int) -> None:
        tried.append(index)
        if tried == [0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(baselines, layer, index)

    monkeypatch.setattr(Baselines, "climb", climb)
    assert run(ModelHost(str(store.root), "run", 2), blocks[0])["outcome"] == "done"
    assert tried == [0, 0, 1]
    assert store.attempts().to_pylist()[0]["num_lanes"] == 2


def test_memory_that_runs_out_while_baselines_are_committed_is_that_of_baselines(
    blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tried = Committer.baselines, list[int]()

    def commit(*args: Any) -> int:
        tried.append(1)
        if len(tried) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(Committer, "baselines", commit)
    assert run(ModelHost(str(store.root), "run", 2), blocks[0])["outcome"] == "done"
    assert store.keys() == {cell.key for cell in blocks[0].cells}
    assert len(tried) == 2 and store.attempts().to_pylist()[0]["num_lanes"] == 2


def test_baselines_that_do_not_fit_at_all_end_the_block(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def climb(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Baselines, "climb", climb)
    assert run(ModelHost(str(store.root), "run", 2), blocks[0])["outcome"] == "oom"
    assert store.keys() == set()


def test_a_store_that_is_full_is_its_own_outcome(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args, **_kwargs):
        raise StoreError("cannot be written", str(store.root), 28, "free some space")

    monkeypatch.setattr(Store, "commit", full)
    monkeypatch.setattr(Store, "record_attempt", full)
    last = run(ModelHost(str(store.root), "run", 2), blocks[0])
    assert last["outcome"] == "storage"
    assert "cannot be written" in last["reason"]


def test_a_stopped_block_is_an_interrupted_attempt(blocks: tuple[Block, ...], store: Store) -> None:
    steps = ModelHost(str(store.root), "run", 2).steps(blocks[0])
    for _ in range(4):
        next(steps)
    steps.close()
    assert [attempt["outcome"] for attempt in store.attempts().to_pylist()] == ["interrupted"]
