"""A search whose learning rates ASHA may stop after a step: what it refuses, asks for and knows; on made-up scores, without training."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from iclgd_dist.blocks import Cell, Judged
from iclgd_dist.config import Sweep, SweepError, load_sweep
from iclgd_dist.search import studies_of
from tests.searches import Made, stopped_early


@pytest.fixture
def stopped(sweep_file: Path) -> Callable[..., Sweep]:
    text = sweep_file.read_text()

    def write(more: str = 'sampler = "grid"') -> Sweep:
        sweep_file.write_text(stopped_early(text, more))
        return load_sweep(sweep_file)

    return write


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", '"tpe" learns nothing: set "random" or "grid"'),
        ('sampler = "grid"\nconstraints = ["balanced_accuracy >= 0.5"]', "stops by the objective alone: leave constraints out"),
        ('sampler = "grid"\nobjective = "sim_aou"', "must be known of a fold at each step: accuracy, balanced_accuracy"),
    ],
)
def test_what_asha_cannot_do_is_told(stopped: Callable[..., Sweep], more: str, said: str) -> None:
    with pytest.raises(SweepError, match=r"tiny\.toml:\d+: ") as caught:
        stopped(more)
    assert said in str(caught.value)


def test_with_asha_each_learning_rate_is_a_block_and_what_was_stopped_is_not_asked_for_again(stopped: Callable[..., Sweep]) -> None:
    def loss(cell: Cell, seed: int, num_queries: int) -> float:
        return 0.5 + math.log10(cell.learning_rate / 2e-3) ** 2 / cell.step

    sweep, made = stopped(), Made(loss)
    made.fails = lambda cell: cell.learning_rate is not None and not 1e-3 < cell.learning_rate < 1e-2 and cell.step > 1  # stopped after the first step
    (study,) = made.search(sweep)
    (plan,) = made.plans
    assert [len(block.learning_rates("wide")) for block in plan.blocks] == [1] * 6
    assert [block.judged for block in plan.blocks] == [Judged("nll_label", 1.0, 2, (1, 2, 4))] * 6  # nothing is known yet
    assert sum(cell.kind != "finetuned" for block in plan.blocks for cell in block.cells) == 2
    kept = [score.learning_rate for score in study.ranking(0) if score.step == 4]
    assert len(kept) == 2 and [score.learning_rate for score in study.ranking(0)][:2] == kept  # the stopped ones stand behind, whatever they scored
    again = Made(loss)
    again.cells = dict(made.cells)
    again.stopped = {block.name for block in plan.blocks if block.learning_rates("wide")[0] not in kept}
    (same,) = again.search(sweep)
    assert not [plan for plan in again.plans if plan.blocks] and same.ranking(0) == study.ranking(0)
    again.cells = {key: held for key, held in made.cells.items() if held[0].learning_rate != kept[0] or held[0].step == 1}
    again.search(sweep)  # one that was killed, not stopped, goes on
    (block,) = again.plans[-1].blocks
    known = sorted(
        (cell.learning_rate, cell.step, loss(cell, 1, 8)) for cell, _, _ in again.cells.values() if cell.kind == "finetuned" and cell not in block.cells
    )
    assert block.judged is not None and block.judged.known == tuple(known) and len(known) == 6 + 2, "what it is compared with"
    assert {cell.learning_rate for plan in again.plans for block in plan.blocks for cell in block.cells} == {kept[0]}
    forgotten = Made(loss)  # and one whose cells were set aside, stopped or not; the baselines ride with whatever runs
    forgotten.cells = {key: held for key, held in made.cells.items() if held[0].kind == "finetuned" and held[0].learning_rate != 1e-4}
    forgotten.stopped = again.stopped
    forgotten.search(sweep)
    (plan,) = forgotten.plans
    assert [sorted({str(cell.learning_rate) for cell in block.cells}) for block in plan.blocks] == [["0.0001", "None"]]
    bare = Made(loss)
    bare.cells = {key: held for key, held in made.cells.items() if held[0].kind == "finetuned"}
    bare.stopped = again.stopped
    bare.search(sweep)
    (plan,) = bare.plans
    assert [(block.judged, {cell.kind for cell in block.cells}) for block in plan.blocks] == [(None, {"zero_shot", "icl"})]


def test_asha_compares_trials_of_one_draw_only(stopped: Callable[..., Sweep], sweep_file: Path) -> None:
    stopped()
    sweep_file.write_text(sweep_file.read_text().replace("seeds = [1]", "seeds = [1, 2]"))
    with pytest.raises(SweepError, match="one seed and one order are required, fruit has 2"):
        studies_of(load_sweep(sweep_file))
