"""Which learning rates compete: those of the grid, over the draws that have them all, however many draws of one of them, or cells not yet there, a store holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from iclgd_analysis import load
from iclgd_analysis.chosen import Selected, matched, nearest_ratio, select
from iclgd_analysis.crossing import _without, gains
from iclgd_analysis.load import Frames

from tests.made import LAST, Row, changed, diverged, make_cell, make_store

LOSS = {1e-4: 0.6, 1e-3: 0.3, 1e-2: 0.4, 1e-1: 0.2}
SIZE = {1e-4: 0.1, 1e-3: 0.45, 1e-2: 0.9, 1e-1: 2.0}
METHOD = "layer_causal"


def cell(seed: int, rate: float, **figures: Any) -> Row:
    row = make_cell("finetuned", task="trec", seed=seed, skill=0.5, method=METHOD, learning_rate=rate, step=LAST, size=SIZE[rate])
    return row | {"folds": [fold | {"nll_label": LOSS[rate]} for fold in row["folds"]]} | figures


def read(root: Path, cells: list[Row]) -> Frames:
    baselines = [make_cell("zero_shot", task="trec", seed=None, skill=0.3)]
    baselines += [make_cell("icl", task="trec", seed=seed, skill=0.6) for seed in sorted({row["seed"] for row in cells})]
    return load(make_store(root, baselines + cells))


GRID, SEEDS = (1e-4, 1e-3, 1e-2), (1, 2, 3, 4, 5)


@pytest.mark.parametrize("more", [(1e-4,), (1e-3,), (1e-4, 1e-3)])
def test_more_draws_of_some_learning_rates_leave_the_others_in(tmp_path: Path, more: tuple[float, ...]) -> None:
    frames = read(tmp_path, [cell(seed, rate) for seed in SEEDS for rate in GRID] + [cell(seed, rate) for seed in range(6, 16) for rate in more])
    (setting,) = frames.settings()
    assert select(frames, setting, METHOD) == Selected(1e-3, is_edge=False)
    assert nearest_ratio(setting, METHOD) == (1e-3, pytest.approx(0.45))
    found = gains(frames, setting, METHOD, "A")
    assert found.index.tolist() == list(GRID) and found.notna().all()


def test_a_wider_pilot_of_one_seed_is_no_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seed 1 has more learning rates than the grid, one of them better, and fewer draws of each."""
    pilot = {3e-5: 0.8, 3e-4: 0.5, 3e-3: 0.1, 3e-2: 0.5, 3e-1: 0.9}
    for rate, loss in pilot.items():
        monkeypatch.setitem(LOSS, rate, loss)
        monkeypatch.setitem(SIZE, rate, 0.5)
    frames = read(tmp_path, [cell(seed, rate) for seed in range(1, 6) for rate in GRID] + [cell(1, rate) for rate in pilot])
    (setting,) = frames.settings()
    assert select(frames, setting, METHOD) == Selected(1e-3, is_edge=False)
    assert gains(frames, setting, METHOD, "A").index.tolist() == list(GRID)
    assert set(matched(setting, METHOD).terms["draw"]) == {f"/{seed}/0" for seed in range(1, 6)}, "no gap where the pilot alone has been"


@pytest.mark.parametrize("missing", GRID)
def test_a_cell_that_is_not_there_yet_keeps_no_learning_rate_out(tmp_path: Path, missing: float) -> None:
    frames = read(tmp_path, [cell(seed, rate) for seed in (1, 2, 3) for rate in GRID if (seed, rate) != (3, missing)])
    (setting,) = frames.settings()
    assert select(frames, setting, METHOD) == Selected(1e-3, is_edge=False)
    assert gains(frames, setting, METHOD, "A").notna().all()


def test_one_that_diverged_in_a_draw_is_out_and_still_no_missing_end_of_the_grid(tmp_path: Path) -> None:
    cells = [cell(seed, rate) for seed in (1, 2, 3) for rate in LOSS]
    frames = read(tmp_path, [diverged(row) if (row["seed"], row["learning_rate"]) == (2, 1e-1) else row for row in cells])
    (setting,) = frames.settings()
    assert select(frames, setting, METHOD) == Selected(1e-3, is_edge=False)  # 1e-1 is better in the other two
    assert gains(frames, setting, METHOD, "A").isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize("num_draws", [1, 2])
def test_a_learning_rate_of_fewer_than_half_of_the_draws_is_no_end_of_the_grid(tmp_path: Path, num_draws: int) -> None:
    frames = read(tmp_path, [cell(seed, rate) for seed in (1, 2, 3, 4) for rate in (1e-4, 1e-3)] + [cell(seed, 1e-2) for seed in (1, 2, 3, 4)[:num_draws]])
    (setting,) = frames.settings()
    assert select(frames, setting, METHOD) == Selected(1e-3, is_edge=num_draws < 2)


@pytest.mark.parametrize(("rates", "is_edge"), [((1e-3,), False), ((1e-4, 1e-3), True), (GRID, False)])
def test_a_control_trained_at_one_learning_rate_has_no_grid_to_extend(tmp_path: Path, rates: tuple[float, ...], is_edge: bool) -> None:
    frames = read(tmp_path, [changed(cell(seed, rate), train_on=to) for seed in (1, 2) for rate in rates for to in ("true", "random_labels")])
    settings = {setting.train_on: setting for setting in frames.settings()}
    assert select(frames, settings["random_labels"], METHOD) == Selected(1e-3, is_edge=is_edge)
    assert select(frames, settings["true"], METHOD) == Selected(1e-3, is_edge=len(rates) < 3)


def test_where_no_draw_has_them_all_all_compete(tmp_path: Path) -> None:
    frames = read(tmp_path, [cell(1, 1e-4), cell(2, 1e-3), cell(3, 1e-2)])
    (setting,) = frames.settings()
    assert select(frames, setting, METHOD) == Selected(1e-3, is_edge=False)


@pytest.mark.parametrize(
    ("curve", "reason"),
    [([0.1, 0.2], "below_range"), ([math.nan, 0.1], "missing"), ([-0.1, math.nan, 0.1], "missing"), ([-0.2, -0.1], "above_range"), ([], "above_range")],
)
def test_why_a_method_never_comes_to_an_improvement(curve: list[float], reason: str) -> None:
    assert _without(pd.Series(curve, dtype=float)) == reason
