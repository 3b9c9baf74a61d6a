"""How much runs at once: lanes, as the sweep file says or memory holds; queries of a micro-batch."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from iclgd_dist import packing, probes
from iclgd_dist.blocks import Block, max_positions, with_cells
from iclgd_dist.config import load_sweep
from iclgd_dist.encoding import Encoded, encode
from iclgd_dist.packing import Parts, budget_gib, elsewhere_gib, num_neighbours
from iclgd_dist.plan import make_plan
from iclgd_dist.resources import Resources
from iclgd_dist.sources import load_tokenizer

CPU = torch.device("cpu")
RATES = [0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05]


@pytest.fixture
def block(sweep_file: Path) -> Block:
    sweep_file.write_text(sweep_file.read_text().replace("[0.003, 0.05]", str(RATES)))
    return make_plan(load_sweep(sweep_file)).blocks[0]


def encoded(block: Block) -> Encoded:
    return encode(block.draw, load_tokenizer(block.model), protocol=block.protocol, max_positions=max_positions(block.model.config))


def parts_of(block: Block, budget: float = 1e9) -> list[Block]:
    parts, found = Parts(block, encoded(block), budget), []
    while parts:
        part = parts.next()
        assert part is not None
        found.append(part)
    return found


def rates_of(parts: list[Block]) -> list[list[float]]:
    for part in parts:
        assert part.learning_rates("vanilla") == part.learning_rates("layer_causal"), "both methods of a learning rate stay together"
    return [part.learning_rates("vanilla") for part in parts]


def test_with_room_for_all_there_is_one_part_that_holds_every_trained_cell(block: Block) -> None:
    (part,) = parts_of(block)
    assert set(part.cells) == {cell for cell in block.cells if cell.kind == "finetuned"}


@pytest.mark.parametrize(("lanes", "expected"), [(8, 1), (7, 2), (4, 2), (3, 4), (2, 4), (1, 8)])
def test_a_number_of_lanes_is_never_exceeded(block: Block, lanes: int, expected: int) -> None:
    parts = parts_of(replace(block, resources=Resources(lanes=lanes)))
    assert max(len(rates) for rates in rates_of(parts)) <= lanes
    assert len(parts) == expected
    assert sorted(rate for rates in rates_of(parts) for rate in rates) == RATES


def test_lanes_are_as_many_as_the_cost_model_says_fit(block: Block) -> None:
    whole, fits = (with_cells(block, cells, encoded(block)).cost.peak_gib for cells in (block.cells, [c for c in block.cells if (c.learning_rate or 0) < 0.01]))
    assert fits < whole
    assert rates_of(parts_of(block, whole)) == [RATES]
    assert rates_of(parts_of(block, (fits + whole) / 2)) == [RATES[:4], RATES[4:]]
    assert rates_of(parts_of(block, 0.0)) == [[rate] for rate in RATES], "a lane alone is tried, whatever the estimate says"


def test_after_running_out_beside_the_baselines_these_go_first_and_the_part_is_not_yet_halved(block: Block) -> None:
    parts = Parts(block, encoded(block), 1e9)
    part = parts.next()
    assert part is not None
    parts.out_of_memory(part, (), "full", has_baselines=False)
    assert parts.next() is None
    assert parts.next() == part


def test_what_is_committed_is_not_run_again_and_what_never_fits_is_named(block: Block) -> None:
    parts = Parts(block, encoded(block), 1e9)
    part = parts.next()
    assert part is not None
    done = {cell.key for cell in part.cells if cell.method == "layer_causal"}
    parts.out_of_memory(part, done, "full", has_baselines=True)
    for rates in (RATES[:4], RATES[4:]):
        half = parts.next()
        assert half is not None
        assert half.learning_rates("vanilla") == rates
        assert half.trained() == [("vanilla", "true")]
    parts.check()
    alone = replace(half, cells=half.cells[:1])
    parts.out_of_memory(alone, done, "full", has_baselines=True)
    with pytest.raises(MemoryError, match=r"one lane alone: vanilla at learning rate 0.01 on true \(full\)"):
        parts.check()


def test_the_budget_is_what_is_at_hand_shared_with_the_actors_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    held = psutil.Process().memory_info().rss / 2**30
    alone, among_four = budget_gib(CPU), budget_gib(CPU, 4)
    assert held * packing.SHARE < among_four < alone < psutil.virtual_memory().total / 2**30
    monkeypatch.setattr(packing, "_limit_of_group", lambda: int((held + 1) * 2**30))
    assert budget_gib(CPU) == pytest.approx(packing.SHARE * (held + 1), rel=0.1)
    monkeypatch.setattr(packing, "_limit_of_group", lambda: int((4 * held + 1) * 2**30))
    assert budget_gib(CPU, 4) == pytest.approx(packing.SHARE * (held + 0.25), rel=0.1)  # all four hold as much


def test_neighbours_are_the_actors_that_a_machine_holds(block: Block, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _process: set(range(8)))
    monkeypatch.setattr(packing, "GROUP", tmp_path)
    for resources, expected in ((Resources(), 8), (Resources(cpus_per_actor=3), 2), (Resources(max_actors=3), 3), (Resources(cpus_per_actor=16), 1)):
        assert num_neighbours(replace(block, resources=resources)) == expected
    (tmp_path / "cpu.max").write_text("400000 100000\n")  # a container may use four of the eight
    assert num_neighbours(replace(block, resources=Resources())) == 4
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert num_neighbours(replace(block, resources=Resources())) == 8


def test_layers_that_rest_elsewhere_are_no_part_of_what_is_planned_for_a_device() -> None:
    layers = [torch.nn.Linear(1024, 1024, bias=False, device=device) for device in ("cpu", "meta", "meta")]
    megabytes = elsewhere_gib(SimpleNamespace(input_device=CPU, layers=layers)) * 1024  # type: ignore[arg-type]
    assert megabytes == 4.0  # of two layers offloaded one comes in at a time
    assert elsewhere_gib(SimpleNamespace(input_device=CPU, layers=layers[:1])) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_micro_batches_are_within_the_budget_and_cost_the_least(seed: int) -> None:
    pick = random.Random(seed)
    queries = sorted(([0] * pick.randint(1, 40) for _ in range(9)), key=len)
    labels, num_lanes, lead, budget = [[1] * pick.randint(1, 3) for _ in range(3)], pick.choice([1, 4]), 1, pick.choice([1, 100, 300, 1000])
    at_label = pick.random() < 0.5

    def tokens_of(group: list[int]) -> int:
        made = probes._rows(queries, labels, group, set(group), at_label=at_label)
        return num_lanes * len(made) * (lead + max(len(row.ids) for row in made))

    def cost(groups: list[list[int]]) -> float:
        tokens = [tokens_of(group) for group in groups]
        fit = all(total <= budget or len(group) == 1 for total, group in zip(tokens, groups, strict=True))
        return sum(tokens) + len(groups) * probes.CALLS * budget if fit else math.inf

    def cut(at: tuple[int, ...]) -> list[list[int]]:
        return [list(range(start, stop)) for start, stop in itertools.pairwise((0, *at, 9))]

    found = probes._packed(range(9), queries, labels, num_lanes, lead, budget, at_label=at_label)
    assert [number for group in found for number in group] == list(range(9))
    assert cost(found) == min(cost(cut(at)) for num in range(9) for at in itertools.combinations(range(1, 9), num)) < math.inf
