"""What is averaged over what: orders within a seed before seeds, the two folds of a seed, sizes of updates by the geometric mean. Expected values by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from iclgd_analysis import layer_profile, load, order_sensitivity, ratio
from iclgd_analysis.chosen import SELECTED, Selected, nearest_ratio, select
from iclgd_analysis.crossing import crossfit, gains
from iclgd_analysis.load import Frames, each
from iclgd_analysis.table import summary

from tests.made import LAST, Row, changed, make_cell, make_rows, make_store, only

RATES = {"layer_causal": (1e-3, 1e-2)}
T1 = 12.706204736  # 97.5 % point of t with 1 degree of freedom


def three_draws() -> list[Row]:
    """Seed 1 in two orders, seed 2 in one."""
    return [make_cell("icl", task="trec", seed=seed, order=order, skill=0.6) for seed, order in ((1, 0), (1, 1), (2, 0))]


def loss_on(row: Row, losses: dict[str, float]) -> Row:
    return row | {"folds": [fold | {"nll_label": losses[fold["fold"]]} for fold in row["folds"]]}


def test_orders_are_averaged_within_a_seed_before_seeds_are(tmp_path: Path) -> None:
    rows = three_draws()
    frames = load(make_store(tmp_path, rows))
    icl = frames.settings()[0].icl
    found = frames.estimate(icl, "sim_aou", values=pd.Series([0.4, 0.8, 0.9], index=[row["key"] for row in rows]))
    assert (found.mean, found.upper - found.mean) == (pytest.approx(0.75), pytest.approx(T1 * 0.15))  # .6 and .9, not .4, .8 and .9
    assert (found.used, found.replicates) == (3, 2)
    per_query = frames.per_query(each(icl), "accuracy")
    rights = [[float(query["prediction"] == query["gold"]) for query in row["examples"]] for row in rows]
    assert per_query.tolist() == pytest.approx([((first + second) / 2 + third) / 2 for first, second, third in zip(*rights, strict=True)])
    assert per_query.index.tolist() == [query["gold"] for query in rows[0]["examples"]]


def test_a_learning_rate_is_selected_by_seeds_not_by_orders(tmp_path: Path) -> None:
    """1e-3 is better in both orders of seed 1 and so in most draws, but not over seeds: (.2 + .8) / 2 against .45."""
    rows = []
    for row in make_rows(seeds=(1, 2), rates=RATES):
        if row["kind"] == "finetuned":
            loss = 0.45 if row["learning_rate"] == 1e-2 else {1: 0.2, 2: 0.8}[row["seed"]]
            row = loss_on(row, {"A": loss, "B": loss})
        rows += [row, changed(row, order=1)] if row["seed"] == 1 else [row]
    zero_shot = next(fold["nll_label"] for row in rows if row["kind"] == "zero_shot" for fold in row["folds"] if fold["fold"] == "A")
    frames = load(make_store(tmp_path, rows))
    setting = frames.settings()[0]
    assert select(frames, setting, "layer_causal") == Selected(1e-2, is_edge=True)
    assert gains(frames, setting, "layer_causal", "A").to_dict() == {1e-3: pytest.approx(zero_shot - 0.5), 1e-2: pytest.approx(zero_shot - 0.45)}


def test_orders_that_show_the_same_are_one(tmp_path: Path) -> None:
    for alike in (True, False):
        rows = [row | {"demonstrations": ["a", "b"] if alike or row["order"] == 0 else ["b", "a"]} for row in three_draws()]
        frames = load(make_store(tmp_path / str(alike), rows))
        assert order_sensitivity.data(frames, frames.settings()[0]).empty == alike


def test_a_seed_without_a_figure_on_one_fold_is_in_neither(tmp_path: Path) -> None:
    rows = three_draws()[1:]
    frames = load(make_store(tmp_path, rows))
    terms = each(frames.settings()[0].icl)
    of_folds = {fold: pd.Series(values, index=[row["key"] for row in rows]) for fold, values in (("A", [0.1, 0.3]), ("B", [0.2, math.nan]))}
    found = crossfit(frames, {"A": terms, "B": terms}, "sim_aou", figures=of_folds)
    assert (found.mean, found.used, found.replicates) == (pytest.approx(0.15), 1, 1) and math.isnan(found.lower)


def test_a_layer_profile_shows_the_fold_that_did_not_select(tmp_path: Path) -> None:
    best = {1e-3: {"A": 0.1, "B": 0.9}, 1e-2: {"A": 0.9, "B": 0.1}}
    level = {1e-3: {"A": 0.1, "B": 0.2, "all": 9.0}, 1e-2: {"A": 0.5, "B": 0.7, "all": 9.0}}
    rows = []
    for row in make_rows(rates=RATES):
        if row["kind"] == "finetuned":
            rate = row["learning_rate"]
            row = loss_on(row, best[rate]) | {"layers": [layer | {"sim_aou": level[rate][layer["fold"]] + layer["layer"]} for layer in row["layers"]]}
        rows.append(row)
    frames = load(make_store(tmp_path, rows))
    found = layer_profile.data(frames, frames.settings()[0])
    selected = found[found["choice"] == SELECTED]
    assert selected["sim_aou"].tolist() == pytest.approx([0.35 + layer for layer in range(4)])  # fold B at 1e-3, fold A at 1e-2
    assert {*selected["learning_rates"]} == {"1e-3 or 1e-2"} and {*selected["fold"]} == {"A and B"}
    assert found.loc[found["fold"] == "all", "sim_aou"].tolist()[:4] == pytest.approx([9.0 + layer for layer in range(4)])


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Frames:
    """R of 1e-3 is .1 and .9 in the two seeds, of 1e-2 .45 in both."""
    rows = []
    for row in make_rows(seeds=(1, 2), rates=RATES):
        if row["kind"] == "finetuned":
            by_seed = {1e-3: (0.1, 0.9), 1e-2: (0.45, 0.45)}[row["learning_rate"]]
            second = row["seed"] - 1
            row = row | {"update_ratio": by_seed[second], "sim_aou_gaussian_state": (0.01, 0.03)[second], "sim_aou_norm_gaussian_state": (0.5, 0.7)[second]}
        rows.append(row)
    return load(make_store(tmp_path_factory.mktemp("sizes"), rows))


def test_sizes_of_updates_are_averaged_in_the_logarithm(sizes: Frames) -> None:
    setting = sizes.settings()[0]
    table, curve = summary(sizes, setting), ratio.data(sizes, setting)
    assert only(table, method="layer_causal", learning_rate=1e-3, step=LAST)["update_ratio"] == pytest.approx(0.3)
    assert only(curve, learning_rate=1e-3, metric="sim_aou")["R"] == pytest.approx(0.3)
    assert nearest_ratio(setting, "layer_causal") == (1e-2, pytest.approx(0.45))  # the arithmetic mean of 1e-3 is .5


def test_each_similarity_stands_beside_its_own_random_state(sizes: Frames) -> None:
    curve = ratio.data(sizes, sizes.settings()[0])
    for metric, expected in (("sim_aou", 0.02), ("sim_aou_norm", 0.6)):
        assert only(curve, learning_rate=1e-2, metric=metric)["random_state"] == pytest.approx(expected)
