"""The tables and figures of the extras, against plain loops over the store's own rows; the page that holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from iclgd_analysis import calibration, ensembles, extra_profiles, extras, order_sensitivity, pattern_pairs, reliability
from iclgd_analysis.load import Frames, load
from iclgd_analysis.report import write_report
from iclgd_analysis.setting import Setting
from sklearn.calibration import calibration_curve
from sklearn.metrics import balanced_accuracy_score

from iclgd_dist.block import run_block
from iclgd_dist.config import load_sweep
from iclgd_dist.orders import cross_orders
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results
from tests.made import make_rows, make_store
from tests.test_extras import CAPTURE, MEASURES
from tests.tiny import lm_for

PROTOCOLS = """
[[protocols]]
[[protocols]]
separator = "none"
"""


class Whole:
    """A store of two seeds in two orders under two protocols, with everything measured, and its rows as plain lists."""

    def __init__(self, path: Path) -> None:
        text = path.read_text().replace("seeds = [1, 2]", "seeds = [1, 2]\norders = 2").replace("num_queries = 8", "num_queries = 24")
        path.write_text(text.replace("steps = [2, 4]", "steps = [4]") + MEASURES + "orders = true\n" + CAPTURE + PROTOCOLS)
        sweep, self.store = load_sweep(path), Store(path.parent / "store")
        self.store.prepare()
        plan = make_plan(sweep)
        self.store.save_sweep(digest=sweep.digest(), resolved=sweep.resolved(), keys=list(plan.keys))
        lm = lm_for(plan.blocks[0])
        for block in plan.blocks:
            run_block(lm, block, self.store)
        cross_orders(self.store, read_results(self.store), make_plan(sweep).blocks)
        results = read_results(self.store)
        self.cells, self.folds, self.examples, self.extras = (t.to_pylist() for t in (results.cells, results.folds, results.examples, results.extras))
        self.frames = load(str(self.store.root))
        self.setting = next(setting for setting in self.frames.settings() if setting.named["protocol"] == "clean")

    def said(self, key: str, fold: str) -> tuple[np.ndarray, np.ndarray]:
        rows = [row for row in self.examples if row["key"] == key and fold in (row["fold"], "all")]
        assert rows
        scores = np.exp(np.array([row["label_scores"] for row in rows]))
        return scores / scores.sum(1, keepdims=True), np.array([row["gold"] for row in rows])

    def clean(self, **wanted: Any) -> list[dict[str, Any]]:
        rows = [row for row in self.cells if json.loads(row["protocol"])["separator"] == "newline"]
        return [row for row in rows if all(row[name] == value for name, value in wanted.items())]

    def picked(self, method: str) -> list[tuple[str, dict[str, Any]]]:
        """Return (fold that reports, row) of the cells with the smallest loss on the other fold."""
        found = []
        for chooses, reports in (("A", "B"), ("B", "A")):
            loss: dict[float, list[float]] = {}
            for row in self.clean(method=method):
                loss.setdefault(row["learning_rate"], []).append(next(f["nll_label"] for f in self.folds if (f["key"], f["fold"]) == (row["key"], chooses)))
            best = min(loss, key=lambda rate: np.mean(loss[rate]))
            found += [(reports, row) for row in self.clean(method=method, learning_rate=best)]
        return found


@pytest.fixture(scope="module")
def whole(shared_sweep_file: Path) -> Whole:
    return Whole(shared_sweep_file)


def error(said: np.ndarray, gold: np.ndarray) -> float:
    total = 0.0
    for n in range(10):
        inside = [q for q in range(len(gold)) if n / 10 < said[q].max() <= (n + 1) / 10]
        if inside:
            right = np.mean([said[q].argmax() == gold[q] for q in inside])
            total += len(inside) / len(gold) * abs(right - np.mean([said[q].max() for q in inside]))
    return total


def test_the_table_of_calibration_holds_means_over_seeds(whole: Whole) -> None:
    rows = calibration.data(whole.frames, whole.setting)
    icl = rows[(rows["method"] == "icl") & (rows["form"] == "")].set_index("metric")
    seeds = [np.mean([error(*whole.said(row["key"], fold)) for row in whole.clean(kind="icl", seed=seed) for fold in "AB"]) for seed in (1, 2)]
    assert icl["mean"]["ece"] == pytest.approx(np.mean(seeds)) and icl["num_used"]["ece"] == 4
    entropies = [-(said * np.log(said)).sum(1).mean() for said, _ in (whole.said(row["key"], fold) for row in whole.clean(kind="icl") for fold in "AB")]
    assert icl["mean"]["entropy"] == pytest.approx(np.mean(entropies))
    contextual = rows[(rows["method"] == "zero_shot") & (rows["form"] == "contextual") & (rows["metric"] == "brier")]
    (key,) = {row["key"] for row in whole.clean(kind="zero_shot")}
    stored = [r["mean"] for r in whole.extras if (r["cell"], r["group"], r["metric"]) == (key, "calibration", "brier") and r["fold"] in ("A", "B")]
    assert len(stored) == 2 and contextual["mean"].tolist() == pytest.approx([np.mean(stored)])
    method = rows[(rows["method"] == "vanilla") & (rows["form"] == "")].set_index("metric")
    picked = whole.picked("vanilla")
    crossed = [np.mean([error(*whole.said(row["key"], fold)) for fold, row in picked if row["seed"] == seed]) for seed in (1, 2)]
    assert method["mean"]["ece"] == pytest.approx(np.mean(crossed)) and method["num_used"]["ece"] == 4
    forms = set(rows.loc[rows["method"] == "vanilla", "form"])
    assert forms == {"", "batch", "contextual", "supervised_icl"} and "supervised_icl" not in set(rows.loc[rows["method"] == "icl", "form"])
    (grid,) = calibration.grids(whole.setting, rows)
    assert len(grid.rows) == 4 * 3 + 2 and all(len(line) == len(grid.headers) for line in grid.rows)


def test_the_reliability_diagram_is_scikit_learns(whole: Whole) -> None:
    rows = reliability.data(whole.frames, whole.setting)
    icl = rows[rows["method"] == "icl"]
    answers = [whole.said(row["key"], fold) for row in whole.clean(kind="icl") for fold in "AB"]
    confidence = np.concatenate([said.max(1) for said, _ in answers])
    right = np.concatenate([said.argmax(1) == gold for said, gold in answers])
    accuracy, mean = calibration_curve(right, confidence, n_bins=10)
    assert icl["accuracy"].tolist() == pytest.approx(accuracy.tolist()) and icl["confidence"].tolist() == pytest.approx(mean.tolist())
    assert icl["num_answers"].sum() == len(right) == 4 * 24 and set(icl["num_used"]) == {4}
    assert len(reliability.panels(whole.setting, rows)) == 4


def test_ensembles_of_draws_orders_and_protocols_are_those_of_a_plain_loop(whole: Whole) -> None:
    rows = ensembles.data(whole.frames)
    icl = rows[(rows["method"] == "icl") & (rows["protocol"].isin(["clean", "all"]))].set_index(["over", "rule", "metric"])
    found: dict[tuple[str, str, str], list[float]] = {}
    for fold in "AB":
        members = [whole.said(row["key"], fold) for row in whole.clean(kind="icl", order=0)]
        gold = members[0][1]
        mean = sum(said for said, _ in members) / len(members)
        found.setdefault(("value", "draws", "mean ece"), []).append(error(mean, gold))
        found.setdefault(("value", "draws", "mean balanced_accuracy"), []).append(balanced_accuracy_score(gold, mean.argmax(1)))
        found.setdefault(("alone", "draws", "mean ece"), []).append(float(np.mean([error(said, gold) for said, _ in members])))
        votes = np.array([[np.mean([said[q].argmax() == label for said, _ in members]) for label in range(2)] for q in range(len(gold))])
        found.setdefault(("value", "draws", "majority brier"), []).append(((votes - np.eye(2)[gold]) ** 2).sum(1).mean())
        for seed in (1, 2):
            both = [whole.said(row["key"], fold) for row in whole.clean(kind="icl", seed=seed)]
            largest = np.maximum(both[0][0], both[1][0])
            found.setdefault(("value", "orders", "max ece"), []).append(error(largest / largest.sum(1, keepdims=True), gold))
    for (column, over, named), values in found.items():
        assert icl[column][(over, *named.split(" "))] == pytest.approx(np.mean(values)), (column, over, named)
    assert icl["num_ensembles"]["orders", "max", "ece"] == 2 and icl["num_ensembles"]["draws", "max", "ece"] == 1
    assert icl["num_ensembles"]["protocols", "mean", "ece"] == 4, "each draw under both protocols"
    assert all(len(line) == len(grid.headers) for grid in ensembles.grids(rows) for line in grid.rows)


def test_sensitivity_to_the_order_is_that_of_a_plain_loop(whole: Whole) -> None:
    rows = order_sensitivity.data(whole.frames, whole.setting)
    icl = rows[(rows["method"] == "icl") & (rows["fold"] == "all")].set_index("metric")
    spreads, changed = [], []
    for seed in (1, 2):
        (a, gold), (b, _) = (whole.said(row["key"], "all") for row in sorted(whole.clean(kind="icl", seed=seed), key=lambda row: row["order"]))
        spreads.append(np.mean([np.std([a[q, gold[q]], b[q, gold[q]]], ddof=1) for q in range(len(gold))]))
        changed.append(np.mean(a.argmax(1) != b.argmax(1)))
    assert icl["mean"]["sd_orders"] == pytest.approx(np.mean(spreads)) and icl["mean"]["changed"] == pytest.approx(np.mean(changed))
    firsts = [whole.said(row["key"], "all") for row in whole.clean(kind="icl", order=0)]
    between = np.std([[said[q, gold[q]] for q in range(len(gold))] for said, gold in firsts], axis=0, ddof=1).mean()
    assert icl["mean"]["sd_draws"] == pytest.approx(between) and icl["num_used"]["sd_draws"] == 2
    method = rows[(rows["method"] == "vanilla") & (rows["choice"] == "selected")].set_index("metric")
    changed = []
    for seed in (1, 2):
        for fold in "AB":
            a, b = (whole.said(row["key"], fold)[0] for reports, row in whole.picked("vanilla") if (reports, row["seed"]) == (fold, seed))
            changed.append(np.mean(a.argmax(1) != b.argmax(1)))
    assert method["mean"]["changed"] == pytest.approx(np.mean(changed)) and set(method["num_used"]) == {4, 2}
    (grid,) = order_sensitivity.grids(whole.setting, rows)
    assert all(len(line) == len(grid.headers) for line in grid.rows)


def test_figures_of_the_whole_model_and_of_layers_are_means_of_the_stored_ones(whole: Whole) -> None:
    rows = extras.data(whole.frames, whole.setting)
    at = rows[(rows["method"] == "vanilla") & (rows["choice"] == "nearest R*")].set_index("metric")
    keys = [row["key"] for row in whole.clean(method="vanilla", learning_rate=float(at["learning_rates"].iloc[0]))]
    stored = [r["mean"] for r in whole.extras if (r["group"], r["metric"], r["fold"]) == ("outputs", "kl_output", "all") and r["cell"] in keys]
    assert at["mean"]["kl_output"] == pytest.approx(np.mean(stored)) and at["num_used"]["kl_output"] == 4
    matches = []
    for row in whole.clean(method="vanilla", learning_rate=float(at["learning_rates"].iloc[0])):
        of_order = {r["group"]: r["mean"] for r in whole.extras if (r["cell"], r["metric"], r["fold"]) == (row["key"], "sim_aou", "all")}
        matches.append(of_order[f"order:{row['order']}"] - of_order[f"order:{1 - row['order']}"])
    assert at["mean"]["order_match of sim_aou"] == pytest.approx(np.mean(matches)) and at["num_used"]["order_match of sim_aou"] == 4
    selected = rows[(rows["method"] == "vanilla") & (rows["choice"] == "selected")].set_index("metric")
    overlap = {(r["cell"], r["fold"]): r["mean"] for r in whole.extras if (r["group"], r["metric"]) == ("outputs", "top10_overlap")}
    assert selected["mean"]["top10_overlap"] == pytest.approx(np.mean([overlap[row["key"], fold] for fold, row in whole.picked("vanilla")]))
    assert [grid.title.split(":")[0] for grid in extras.grids(whole.setting, rows)] == ["Next tokens beside ICL's", "Orders crossed"]
    layers = extra_profiles.data(whole.frames, whole.setting)
    one = layers[(layers["metric"] == "intrinsic_dimension") & (layers["method"] == "icl") & (layers["layer"] == 1)]
    keys = [row["key"] for row in whole.clean(kind="icl")]
    stored = [r["mean"] for r in whole.extras if r["metric"] == "intrinsic_dimension" and r["layer"] == 1 and r["cell"] in keys]
    assert one["value"].tolist() == pytest.approx([np.mean(stored)]) and one["num_used"].tolist() == [4]
    assert set(layers.loc[layers["metric"] == "intrinsic_dimension", "method"]) == {"zero_shot", "icl", "vanilla", "layer_causal"}
    assert len(extra_profiles.panels(whole.setting, layers)) == len(extra_profiles.SHOWN)


def test_a_store_without_extras_has_none_of_these_tables(whole: Whole) -> None:
    frames = Frames(**{name: getattr(whole.frames, name) for name in Frames.__dataclass_fields__} | {"extras": whole.frames.extras.iloc[:0]})
    setting: Setting = next(iter(frames.settings()))
    assert extras.data(frames, setting).empty and extra_profiles.data(frames, setting).empty
    assert extra_profiles.panels(setting, pd.DataFrame()) == [] and extras.grids(setting, pd.DataFrame()) == []
    assert set(calibration.data(frames, setting)["form"]) == {"", "batch"}
    assert pattern_pairs.grids(pattern_pairs.data(frames)) == []


def test_the_page_holds_them(whole: Whole, tmp_path: Path) -> None:
    page = write_report(str(whole.store.root), tmp_path / "report.html").read_text()
    for title in (
        calibration.TITLE,
        reliability.TITLE,
        ensembles.TITLE,
        order_sensitivity.TITLE,
        extra_profiles.TITLE,
        "Orders crossed",
        "Next tokens beside ICL",
    ):
        assert title in page, title
    written = {path.stem for path in (tmp_path / "figures").glob("*.csv")}
    assert {"calibration", "reliability", "ensembles", "order_sensitivity", "extras", "extra_profiles"} <= written


def test_a_pair_of_generated_tasks_stands_in_one_table_with_both_accuracies(tmp_path: Path) -> None:
    frames = load(make_store(tmp_path, make_rows(tasks=("cities_pattern", "cities_plain"), seeds=(1, 2))))
    rows = pattern_pairs.data(frames)
    cells = frames.cells[frames.cells["kind"] == "icl"].groupby("task")["balanced_accuracy"].mean()
    of_icl = rows[rows["method"] == "icl"].set_index("form")
    assert of_icl["mean"]["pattern"] == pytest.approx(cells["cities_pattern"]) and of_icl["mean"]["plain"] == pytest.approx(cells["cities_plain"])
    assert set(rows.loc[rows["method"] == "zero_shot", "k"]) == {0}
    (grid,) = pattern_pairs.grids(rows)
    assert len(grid.rows) == 4 and all(len(line) == len(grid.headers) and line[-1] for line in grid.rows)
