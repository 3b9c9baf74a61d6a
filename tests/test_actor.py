"""The host of a model, without Ray: models are loaded once and swapped, what cannot run is an attempt, never a cell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iclgd_dist import actor, probes
from iclgd_dist.actor import ModelHost
from iclgd_dist.block import Progress
from iclgd_dist.blocks import Block
from iclgd_dist.config import ModelSpec, load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, StoreError


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


def out_of_memory_above(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every block with more lanes of a method than `lanes` run out of memory."""
    real = actor.block_steps

    def steps(lm, block: Block, store: Store):
        if max(len(block.learning_rates(method)) for method in ("vanilla", "layer_causal")) > lanes:
            yield Progress(block.cost.flops)
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from real(lm, block, store)

    monkeypatch.setattr(actor, "block_steps", steps)


def test_out_of_memory_halves_the_lanes_and_finishes(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    out_of_memory_above(1, monkeypatch)
    assert run(ModelHost(str(store.root), "run", 2), blocks[0])["outcome"] == "done"
    assert store.keys() == {cell.key for cell in blocks[0].cells}
    assert sorted(attempt["outcome"] for attempt in store.attempts().to_pylist()) == ["done", "done", "oom"]


def test_after_a_split_one_half_that_fails_is_what_the_block_reports(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real = actor.block_steps

    def steps(lm, block: Block, store: Store):
        if not block.name.endswith(".2"):  # the whole block and its first half
            yield Progress(block.cost.flops)
            raise torch.OutOfMemoryError("out of memory [enforce fail at alloc.cpp:117]")
        yield from real(lm, block, store)

    monkeypatch.setattr(actor, "block_steps", steps)
    reports = list(ModelHost(str(store.root), "run", 2).steps(blocks[0]))
    assert {report["block"] for report in reports} == {blocks[0].name}, "the driver knows no halves"
    assert [report["outcome"] for report in reports if report["outcome"]] == ["oom"]
    assert reports[-1]["reason"].endswith("[enforce fail at alloc.cpp:117]")
    assert store.keys()


def test_a_store_that_is_full_is_its_own_outcome(blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args, **_kwargs):
        raise StoreError("cannot be written", str(store.root), 28, "free some space")

    monkeypatch.setattr(Store, "commit", full)
    monkeypatch.setattr(Store, "record_attempt", full)
    last = run(ModelHost(str(store.root), "run", 2), blocks[0])
    assert last["outcome"] == "storage"
    assert "cannot be written" in last["reason"]


def test_a_single_lane_that_does_not_fit_leaves_an_attempt_and_its_cells_pending(
    blocks: tuple[Block, ...], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_of_memory_above(0, monkeypatch)
    last = run(ModelHost(str(store.root), "run", 2), blocks[0])
    assert last["outcome"] == "oom"
    assert store.keys() == set()
    assert [attempt["outcome"] for attempt in store.attempts().to_pylist()] == ["oom"] * 3


def test_a_stopped_block_is_an_interrupted_attempt(blocks: tuple[Block, ...], store: Store) -> None:
    steps = ModelHost(str(store.root), "run", 2).steps(blocks[0])
    for _ in range(4):
        next(steps)
    steps.close()
    assert [attempt["outcome"] for attempt in store.attempts().to_pylist()] == ["interrupted"]
