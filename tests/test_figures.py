"""Accuracies, gradient norms and the Pareto front: hand-made stores, every number recomputed here with plain loops."""

from __future__ import annotations

import csv
import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from iclgd_analysis import accuracy, gradient_norms, load, pareto, ratio, table
from iclgd_analysis.report import main, write_report
from scipy import stats

from tests.made import LAST, RATES, STEPS, Row, changed, diverged, figure, make_cell, make_rows, make_store, of_fold, only

SEEDS, TASKS = (1, 2, 4), ("subj", "trec")
METRICS = ("accuracy", "balanced_accuracy")
CROSS = "\N{MULTIPLICATION SIGN}"


def cells_of(rows: list[Row], task: str, method: str, learning_rate: float | None = None, step: int | None = LAST) -> list[Row]:
    found = [row for row in rows if (row["task"], row["method"]) == (task, method)]
    return [row for row in found if row["step"] == step and learning_rate in (None, row["learning_rate"])]


def selected_by_hand(rows: list[Row], task: str, method: str, fold: str) -> float:
    """The learning rate with the smallest mean nll_label of those that diverged nowhere."""
    means = {}
    for learning_rate in RATES[method]:
        cells = cells_of(rows, task, method, learning_rate)
        if all(cell["status"] == "done" for cell in cells):
            means[learning_rate] = sum(of_fold(cell, fold, "nll_label") for cell in cells) / len(cells)
    return min(means, key=lambda learning_rate: (means[learning_rate], learning_rate))


def query_shares(cells: list[Row], folds: str, metric: str) -> list[tuple[float, ...]]:
    """Return each query's share of right predictions over cells, as (label, share); one label for accuracy."""
    found = []
    for index, query in enumerate(cells[0]["examples"]):
        if query["fold"] in folds:
            shares = [cell["examples"][index]["prediction"] == query["gold"] for cell in cells]
            found.append((query["gold"] if metric == "balanced_accuracy" else 0, sum(shares) / len(shares)))
    return found


def variance(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def interval(values: list[float], queries: list[tuple[float, ...]]) -> tuple[float, float, float]:
    """Return mean, standard error and degrees of freedom of a task: seeds, and the queries' share by label."""
    labels = sorted({label for label, _ in queries})
    of_queries = sum(variance(part) / len(part) for part in ([share for of, share in queries if of == label] for label in labels)) / len(labels) ** 2
    return sum(values) / len(values), math.sqrt(variance(values) / len(values) + of_queries), len(values) - 1


def by_hand(rows: list[Row], task: str, method: str, metric: str) -> tuple[float, float, float]:
    if method == "icl":
        cells = [row for row in rows if (row["task"], row["kind"]) == (task, "icl")]
        return interval([cell[metric] for cell in cells], query_shares(cells, "AB", metric))
    per_seed, queries = dict.fromkeys(SEEDS, 0.0), []
    for chooses, reports in ("AB", "BA"):
        cells = cells_of(rows, task, method, selected_by_hand(rows, task, method, chooses))
        queries += query_shares(cells, reports, metric)
        for cell in cells:
            per_seed[cell["seed"]] += of_fold(cell, reports, metric) / 2
    return interval(list(per_seed.values()), queries)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], pd.DataFrame, Path]:
    """Two tasks; on subj the folds select different learning rates of layer_causal, one of them at the edge of its grid."""
    rows = make_rows(seeds=SEEDS, tasks=TASKS)
    for row in cells_of(rows, "subj", "layer_causal"):
        for fold in row["folds"]:
            fold["nll_label"] = 0.1 + row["seed"] / 10 if row["learning_rate"] == {"A": 1e-2, "B": 1e-3}[fold["fold"]] else 0.9
    root = make_store(tmp_path_factory.mktemp("scored"), rows)
    return rows, accuracy.data(load(root)), root


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("method", ["vanilla", "layer_causal", "icl"])
def test_accuracies_are_reported_on_the_fold_that_did_not_select(scored: tuple[list[Row], pd.DataFrame, Path], method: str, metric: str) -> None:
    rows, found, _ = scored
    tasks = []
    for task in TASKS:
        line = only(found, task=task, method=method, metric=metric)
        mean, error, freedom = by_hand(rows, task, method, metric)
        half = stats.t.ppf(0.975, freedom) * error
        assert (line["mean"], line["lower"], line["upper"]) == pytest.approx((mean, max(mean - half, 0), min(mean + half, 1)))
        assert (line["num_used"], line["num_planned"]) == (3, 3)
        if method != "icl":
            assert (line["selected_on_A"], line["selected_on_B"]) == tuple(selected_by_hand(rows, task, method, fold) for fold in "AB")
        tasks.append((mean, error, freedom))
    whole = only(found, task="all tasks", method=method, metric=metric)
    error = math.sqrt(sum(each**2 for _, each, _ in tasks)) / 2
    freedom = sum(each**2 for _, each, _ in tasks) ** 2 / sum(each**4 / of for _, each, of in tasks)
    assert whole["mean"] == pytest.approx(sum(mean for mean, _, _ in tasks) / 2)
    assert whole["upper"] - whole["mean"] == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    assert (whole["num_used"], whole["num_planned"], whole["num_tasks"], whole["num_tasks_used"]) == (6, 6, 2, 2)


def test_the_folds_of_the_test_do_select_different_learning_rates(scored: tuple[list[Row], pd.DataFrame, Path]) -> None:
    line = only(scored[1], task="subj", method="layer_causal", metric="accuracy")
    assert (line["selected_on_A"], line["selected_on_B"]) == (1e-2, 1e-3)
    cells = cells_of(scored[0], "subj", "layer_causal", 1e-2)
    assert line["mean"] != pytest.approx(sum(cell["accuracy"] for cell in cells) / 3)  # neither one learning rate on all queries
    assert line["mean"] != pytest.approx(sum(of_fold(cell, "A", "accuracy") for cell in cells) / 3)  # nor on the fold that selected it


def test_zero_shot_is_one_cell_with_an_interval_over_its_queries_alone(scored: tuple[list[Row], pd.DataFrame, Path]) -> None:
    rows, found, _ = scored
    (cell,) = [row for row in rows if (row["task"], row["kind"]) == ("trec", "zero_shot")]
    line = only(found, task="trec", method="zero_shot", metric="accuracy")
    share, z = cell["accuracy"], 1.959963985
    centre, half = (share + z * z / 48) / (1 + z * z / 24), z * math.sqrt(share * (1 - share) / 24 + z * z / (4 * 24**2)) / (1 + z * z / 24)
    assert (line["mean"], line["lower"], line["upper"]) == pytest.approx((share, centre - half, centre + half))
    assert (line["num_used"], line["num_planned"]) == (1, 1)
    whole = only(found, task="all tasks", method="zero_shot", metric="accuracy")
    assert math.isnan(whole["lower"]) and (whole["num_used"], whole["num_planned"]) == (2, 2)


def test_collapsed_cells_and_edges_of_the_grid_are_counted_and_said(scored: tuple[list[Row], pd.DataFrame, Path]) -> None:
    rows, found, _ = scored
    chosen = [cell for fold in "AB" for cell in cells_of(rows, "subj", "layer_causal", selected_by_hand(rows, "subj", "layer_causal", fold))]
    num_collapsed = sum(cell["collapsed"] for cell in chosen)
    assert (num_collapsed, len(chosen)) == (3, 6)
    (grid,) = accuracy.grids(found)
    assert grid.title == "Accuracy: Tiny-135M-Instruct.Q4_1, k = 4"
    assert grid.headers == ("task", "method", "lr", "balanced accuracy", "accuracy", "marks")
    of = {(row[0], row[1]): row for row in grid.rows}
    assert list(of) == [(task, method) for task in (*TASKS, "all tasks") for method in ("zero-shot", "vanilla", "layer_causal", "in-context")]
    assert of["subj", "layer_causal"][2::3] == ["1e-2, 1e-3", "edge of the grid: extend the grid; collapsed 3/6"]
    edges = {
        method: [task for task in TASKS if {selected_by_hand(rows, task, method, fold) for fold in "AB"} & {min(RATES[method]), max(RATES[method])}]
        for method in RATES
    }
    assert edges["layer_causal"][0] == "subj"
    for method, tasks in edges.items():
        for task in TASKS:
            assert ("extend the grid" in of[task, method][-1]) == (task in tasks)
        said = f"edge of the grid in {len(tasks)} task{'' if len(tasks) == 1 else 's'}: extend the grid"
        assert (said in of["all tasks", method][-1]) == bool(tasks)
        assert of["all tasks", method][-1].startswith("2 of 2 tasks")
    assert "Descriptive: some means are over 3 seeds" in grid.note


def test_a_method_that_diverges_everywhere_has_an_en_dash_and_leaves_the_mean_over_tasks(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS, tasks=TASKS)
    rows = [diverged(row) if (row["task"], row["method"]) == ("trec", "vanilla") else row for row in rows]
    found = accuracy.data(load(make_store(tmp_path, rows)))
    gone, left, whole = (only(found, task=task, method="vanilla", metric="accuracy") for task in ("trec", "subj", "all tasks"))
    assert math.isnan(gone["mean"]) and (gone["num_used"], gone["num_planned"]) == (0, 3)
    assert whole["mean"] == left["mean"]
    assert (whole["num_used"], whole["num_planned"], whole["num_tasks_used"], whole["num_tasks"]) == (3, 6, 1, 2)
    lines = {(row[0], row[1]): row for row in accuracy.grids(found)[0].rows}
    assert lines["trec", "vanilla"] == ["trec", "vanilla", "", "\N{EN DASH} 0/3", "\N{EN DASH} 0/3", "no learning rate without divergence"]
    assert lines["all tasks", "vanilla"][-1].startswith("1 of 2 tasks")


def theirs() -> dict[tuple[str, str], float]:
    with open(Path(accuracy.__file__).with_name("published.csv")) as file:
        return {(row["task"], row["method"]): float(row["value"]) for row in csv.DictReader(file) if row["kind"] == "accuracy"}


@pytest.mark.parametrize("source", ["KoboldAI/fairseq-dense-1.3B", "/models/fairseq-dense-1.3B/"])
def test_published_accuracies_stand_beside_those_of_the_published_model(tmp_path: Path, source: str) -> None:
    rows = [row | {"model_source": source} for row in make_rows(seeds=SEEDS, tasks=("cb", "sst2"))]
    found = accuracy.data(load(make_store(tmp_path, rows)))
    for method in ("zero_shot", "vanilla", "icl"):
        for task in ("cb", "sst2"):
            assert only(found, task=task, method=method, metric="accuracy")["published"] == theirs()[task, method]
        mean = (theirs()["cb", method] + theirs()["sst2", method]) / 2
        assert only(found, task="all tasks", method=method, metric="accuracy")["published"] == pytest.approx(mean)
    assert found.loc[(found["method"] == "layer_causal") | (found["metric"] == "balanced_accuracy"), "published"].isna().all()
    (grid,) = accuracy.grids(found)
    assert grid.headers[-2:] == ("published accuracy", "marks")
    of = {(row[0], row[1]): row[-2] for row in grid.rows}
    assert (of["cb", "zero-shot"], of["sst2", "in-context"], of["sst2", "layer_causal"]) == ("0.375", "0.927", "\N{EN DASH}")
    assert "arXiv 2212.10559" in grid.note


def test_a_mean_over_tasks_has_no_published_figure_unless_each_of_its_tasks_has_one(tmp_path: Path) -> None:
    rows = [row | {"model_source": "KoboldAI/fairseq-dense-1.3B"} for row in make_rows(tasks=("cb", "trec"))]
    found = accuracy.data(load(make_store(tmp_path / "done", rows)))
    assert only(found, task="cb", method="icl", metric="accuracy")["published"] == theirs()["cb", "icl"]
    assert math.isnan(only(found, task="trec", method="icl", metric="accuracy")["published"])
    assert math.isnan(only(found, task="all tasks", method="icl", metric="accuracy")["published"])
    rows = [diverged(row) if (row["task"], row["method"]) == ("trec", "vanilla") else row for row in rows]  # trec leaves the mean of vanilla
    found = accuracy.data(load(make_store(tmp_path / "diverged", rows)))
    assert only(found, task="all tasks", method="vanilla", metric="accuracy")["published"] == theirs()["cb", "vanilla"]


@pytest.mark.parametrize(
    "other",
    [
        {"model_source": "KoboldAI/fairseq-dense-2.7B"},
        {"model_source": "somebody/fairseq-dense-1.3B-chat"},
        {"model_source": "fairseq-dense-1.3B.Q4_1.gguf"},
        {"init": "norms", "init_scheme": "model", "init_seed": 0},
        {"train_on": "random_labels"},
    ],
)
def test_other_models_weights_and_trainings_have_no_published_accuracies(tmp_path: Path, other: Row) -> None:
    rows = [row | {"model_source": "KoboldAI/fairseq-dense-1.3B"} for row in make_rows(tasks=("sst2",))]
    rows = [row | {name: value for name, value in other.items() if name != "train_on" or row["kind"] == "finetuned"} for row in rows]
    found = accuracy.data(load(make_store(tmp_path, rows)))
    assert len(found) == 2 * 4 and found["published"].isna().all()
    assert all("published" not in grid.note and "published accuracy" not in grid.headers for grid in accuracy.grids(found))


def test_a_task_with_two_sets_of_queries_counts_once_in_a_mean_over_tasks(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS, tasks=TASKS)
    fewer = [changed(row, num_queries=12) for row in rows if row["task"] == "trec"]
    for row in fewer:
        row["accuracy"] = row["accuracy"] / 2 if row["kind"] == "icl" else row["accuracy"]
    found = accuracy.data(load(make_store(tmp_path, rows + fewer)))
    first, second = (found[(found["table"] == table) & (found["method"] == "icl") & (found["metric"] == "accuracy")] for table in (0, 1))
    assert (first["task"].tolist(), second["task"].tolist()) == (["subj", "trec", "all tasks"], ["trec"])
    assert second["mean"].iloc[0] == pytest.approx(first["mean"].iloc[1] / 2)
    assert first["mean"].iloc[2] == pytest.approx(sum(first["mean"].iloc[:2]) / 2)
    assert [grid.title for grid in accuracy.grids(found)] == ["Accuracy: Tiny-135M-Instruct.Q4_1, k = 4"] * 2


def test_the_table_runs_by_itself_without_torch_or_ray(scored: tuple[list[Row], pd.DataFrame, Path]) -> None:
    code = "import runpy, sys; runpy.run_module('iclgd_analysis.accuracy', run_name='__main__'); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(scored[2])], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    assert "Accuracy: Tiny-135M-Instruct.Q4_1, k = 4" in done.stdout


# --- Gradient norms


def norm_of(row: Row, layer: int) -> float:
    return (1.0 if row["method"] == "vanilla" else 0.01) * (layer + 1) * 10.0 ** row["step"] * (row["seed"] + 0.1 * row["order"])


def with_gradients(rows: list[Row]) -> list[Row]:
    """Give every finetuned layer a norm on all queries; of layer_causal, layer 0 learns nothing and layer 2 has a gradient of exactly 0."""
    for row in rows:
        for layer in row["layers"] if row["kind"] == "finetuned" else []:
            if layer["fold"] == "all":
                layer["gradient_norm"] = norm_of(row, layer["layer"])
                if row["method"] == "layer_causal" and layer["layer"] in (0, 2):
                    layer["gradient_norm"] = None if layer["layer"] == 0 else 0.0
    return rows


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    """Seed 1 has two orders; at the learning rate that is selected, vanilla is made to diverge in some draws at step 2, and stays selectable."""
    rows = make_rows(seeds=(1, 2))
    rows += [changed(row, order=1) for row in rows if row["seed"] == 1]
    rows = with_gradients(rows)
    for row in rows:
        for fold in row["folds"]:
            fold["nll_label"] = 0.1 if row["learning_rate"] == {"vanilla": 1e-2, "layer_causal": 1e-3}.get(row["method"]) else 0.9
    for index, row in enumerate(rows):
        if (row["method"], row["learning_rate"], row["step"], row["seed"]) == ("vanilla", 1e-2, 2, 2):
            rows[index] = diverged(row)
    return rows, make_store(tmp_path_factory.mktemp("pulled"), rows)


def test_gradient_norms_are_means_over_seeds_of_means_over_orders_at_the_selected_learning_rate(pulled: tuple[list[Row], Path]) -> None:
    rows, root = pulled
    frames = load(root)
    found = gradient_norms.data(frames, frames.settings()[0])
    assert len(found) == 2 * len(STEPS) * 4
    for line in found.to_dict("records"):
        method, learning_rate = line["method"], {"vanilla": 1e-2, "layer_causal": 1e-3}[line["method"]]
        cells = [cell for cell in rows if (cell["method"], cell["learning_rate"], cell["step"]) == (method, learning_rate, line["step"])]
        per_seed: dict[int, list[float]] = {}
        for cell in cells:
            for layer in cell["layers"]:
                if (layer["layer"], layer["fold"]) == (line["layer"], "all") and layer["gradient_norm"] is not None:
                    per_seed.setdefault(cell["seed"], []).append(layer["gradient_norm"])
        means = [sum(values) / len(values) for values in per_seed.values()]
        assert line["gradient_norm"] == pytest.approx(sum(means) / len(means) if means else math.nan, nan_ok=True)
        assert line["num_used"] == sum(map(len, per_seed.values()))
        assert (line["learning_rate"], line["num_cells"], line["num_draws"]) == (learning_rate, 3, 3)
        assert line["num_diverged"] == sum(cell["status"] == "diverged" for cell in cells)
        expected = "value" if method == "vanilla" else {0: "undefined", 2: "zero"}.get(line["layer"], "value")
        assert line["state"] == expected
    assert set(found.loc[(found["method"] == "vanilla") & (found["step"] == 2), "num_used"]) == {2}  # seed 2 diverged there


def test_the_maps_share_a_logarithmic_scale_and_show_what_has_no_number(pulled: tuple[list[Row], Path]) -> None:
    frames = load(pulled[1])
    setting = frames.settings()[0]
    rows = gradient_norms.data(frames, setting)
    vanilla, causal = gradient_norms.panels(setting, rows)
    values = rows.loc[rows["state"] == "value", "gradient_norm"]
    for panel in (vanilla, causal):
        axis = panel.figure.layout.coloraxis
        assert (axis.cmin, axis.cmax) == pytest.approx((math.log10(values.min()), math.log10(values.max())))
    at = {(line["method"], line["step"], line["layer"]): line["gradient_norm"] for line in rows.to_dict("records")}
    for method, panel in (("vanilla", vanilla), ("layer_causal", causal)):
        drawn = json_of(panel)["data"][0]
        for i, step in enumerate(STEPS):
            for j in range(4):
                norm = at[method, step, j]
                assert drawn["z"][i][j] == (pytest.approx(math.log10(norm), abs=1e-4) if norm > 0 else None)
    assert json_of(vanilla)["data"][0]["y"] == [f"2 {CROSS}", "4"]
    assert len(json_of(vanilla)["data"]) == 1
    states = json_of(causal)["data"][1]
    assert states["z"] == [[0, None, 1, None]] * 2
    assert [line[0] for line in states["text"]] == ["undefined; 0 used of 3 draws"] * 2
    assert vanilla.title == f"vanilla 1e-2: {written(at['vanilla', 2, 0])} to {written(at['vanilla', 4, 3])}, largest in layer 3 at step 4"


def written(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if value >= 1e4 else f"{float(f'{value:.2e}'):g}"


def json_of(panel: Any) -> Row:
    return json.loads(panel.figure.to_json())


def test_a_step_where_every_draw_diverged_is_neither_zero_nor_blank(tmp_path: Path) -> None:
    rows = with_gradients(make_rows(seeds=(1, 2)))
    for index, row in enumerate(rows):  # at the selected learning rate, and with a figure at the largest step: else it could not be selected
        for fold in row["folds"]:
            fold["nll_label"] = 0.1 if row["learning_rate"] == 1e-2 and row["method"] == "vanilla" else 0.9
        if (row["method"], row["learning_rate"], row["step"]) == ("vanilla", 1e-2, 2):
            rows[index] = diverged(row)
    frames = load(make_store(tmp_path, rows))
    setting = frames.settings()[0]
    found = gradient_norms.data(frames, setting)
    gone = found[(found["method"] == "vanilla") & (found["step"] == 2)]
    assert set(gone["state"]) == {"diverged"} and gone["gradient_norm"].isna().all() and set(gone["num_used"]) == {0}
    values, states = json_of(gradient_norms.panels(setting, found)[0])["data"]
    assert (values["z"][0], states["z"]) == ([None] * 4, [[2] * 4, [None] * 4])
    assert values["y"] == ["2", "4"]


def test_a_store_without_gradients_has_no_map_and_a_method_without_a_learning_rate_neither(tmp_path: Path) -> None:
    frames = load(make_store(tmp_path / "none", make_rows()))
    assert gradient_norms.panels(frames.settings()[0], gradient_norms.data(frames, frames.settings()[0])) == []
    rows = [diverged(row) if row["method"] == "vanilla" else row for row in with_gradients(make_rows())]
    frames = load(make_store(tmp_path / "half", rows))
    found = gradient_norms.data(frames, frames.settings()[0])
    assert set(found["method"]) == {"layer_causal"}
    assert [panel.title.split()[0] for panel in gradient_norms.panels(frames.settings()[0], found)] == ["layer_causal"]
    frames = load(make_store(tmp_path / "all", [diverged(row) if row["kind"] == "finetuned" else row for row in make_rows()]))
    assert gradient_norms.data(frames, frames.settings()[0]).empty


# --- The Pareto front


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    """Ten learning rates a method, similarities and accuracies at random; one lacks a draw and would be best, one lacks its similarity."""
    rates = {"vanilla": tuple(10.0**-n for n in range(1, 11)), "layer_causal": tuple(2 * 10.0**-n for n in range(1, 11))}
    rows = [row for row in make_rows(seeds=(1, 2), rates=rates) if row["step"] in (None, LAST)]
    draw = random.Random(3)
    for index, row in enumerate(rows):
        if row["kind"] != "finetuned" or row["status"] == "diverged":
            continue
        row |= {"sim_aou": draw.random(), "balanced_accuracy": draw.random(), "collapsed": row["learning_rate"] in (1e-3, 2e-4)}
        if (row["method"], row["learning_rate"]) == ("vanilla", 1e-2):
            row |= {"sim_aou": 0.99, "balanced_accuracy": 0.99}
            rows[index] = diverged(row) if row["seed"] == 2 else row
        if (row["method"], row["learning_rate"]) == ("layer_causal", 2e-3):
            row["sim_aou"] = None
    return rows, make_store(tmp_path_factory.mktemp("spread"), rows)


def points_of(rows: list[Row]) -> dict[tuple[str, float], Row]:
    points: dict[tuple[str, float], Row] = {}
    for row in rows:
        if row["kind"] == "finetuned" and row["step"] == LAST:
            points.setdefault((row["method"], row["learning_rate"]), {"cells": []})["cells"].append(row)
    for point in points.values():
        for metric in ("sim_aou", "balanced_accuracy"):
            values = [cell[metric] for cell in point["cells"] if cell[metric] is not None]
            point |= {metric: sum(values) / len(values) if values else math.nan, f"{metric}_n": len(values)}
    return points


def test_the_front_is_what_no_other_point_beats_in_both(spread: tuple[list[Row], Path]) -> None:
    rows, root = spread
    frames = load(root)
    setting = frames.settings()[0]
    found, points = pareto.data(setting, ratio.data(frames, setting)), points_of(rows)
    assert len(found) == len(points) == 20
    compete = {name: point for name, point in points.items() if min(point["sim_aou_n"], point["balanced_accuracy_n"]) == 2}
    assert len(compete) == 17  # of vanilla 1e-10 both draws diverged, of 1e-2 one; of layer_causal 2e-3 no similarity is defined
    front = set()
    for name, point in compete.items():
        at = (point["sim_aou"], point["balanced_accuracy"])
        others = [(other["sim_aou"], other["balanced_accuracy"]) for key, other in compete.items() if key != name]
        if not any(other[0] >= at[0] and other[1] >= at[1] for other in others):
            front.add(name)
    assert 2 <= len(front) < 17
    for line in found.to_dict("records"):
        name, point = (line["method"], line["learning_rate"]), points[line["method"], line["learning_rate"]]
        for metric in ("sim_aou", "balanced_accuracy"):
            assert line[metric] == pytest.approx(point[metric], nan_ok=True)
            assert line[f"{metric}_n"] == point[f"{metric}_n"]
        assert (line["competes"], line["is_front"]) == (name in compete, name in front)
        assert line["num_collapsed"] == sum(bool(cell["collapsed"]) for cell in point["cells"])
        assert line["num_diverged"] == sum(cell["status"] == "diverged" for cell in point["cells"])
        assert (line["num_cells"], line["num_draws"], line["step"]) == (2, 2, LAST)


def test_equal_points_are_all_on_the_front_and_one_that_falls_behind_in_one_figure_is_not(tmp_path: Path) -> None:
    rows = make_rows()
    for row in rows:
        if row["kind"] == "finetuned" and row["status"] == "done":
            row |= {"sim_aou": 0.9 if row["step"] == STEPS[0] else 0.3, "balanced_accuracy": 0.9 if row["step"] == STEPS[0] else 0.5}
            behind = {"vanilla": "sim_aou", "layer_causal": "balanced_accuracy"}[row["method"]]
            row[behind] -= 0.1 if row["learning_rate"] == RATES[row["method"]][0] else 0.0
    frames = load(make_store(tmp_path, rows))
    found = pareto.data(frames.settings()[0], ratio.data(frames, frames.settings()[0]))
    assert found["sim_aou"].max() == pytest.approx(0.3)  # an earlier step does not count
    front = {(line["method"], line["learning_rate"]) for line in found[found["is_front"]].to_dict("records")}
    assert front == {("vanilla", 1e-2), ("layer_causal", 1e-3), ("layer_causal", 1e-2)}  # vanilla at 1e-1 diverged


def test_the_panel_draws_points_front_and_baselines(spread: tuple[list[Row], Path]) -> None:
    rows, root = spread
    frames = load(root)
    setting = frames.settings()[0]
    found, points = pareto.data(setting, ratio.data(frames, setting)), points_of(rows)
    (panel,) = pareto.panels(setting, found, table.summary(frames, setting))
    drawn = json_of(panel)
    traces = {trace["name"]: trace for trace in drawn["data"]}
    for method in ("vanilla", "layer_causal"):
        there = sorted(name for name, point in points.items() if name[0] == method and not math.isnan(point["sim_aou"] + point["balanced_accuracy"]))
        trace = traces[method]
        assert trace["x"] == pytest.approx([points[name]["balanced_accuracy"] for name in there])
        assert trace["y"] == pytest.approx([points[name]["sim_aou"] for name in there])
        assert trace["marker"]["symbol"] == ["circle-open" if name[1] in (1e-3, 2e-4) else "circle" for name in there]
        assert trace["marker"]["opacity"] == [0.4 if name == ("vanilla", 1e-2) else 1 for name in there]
    assert {"circle-open"} < {*traces["vanilla"]["marker"]["symbol"]} and {"circle-open"} < {*traces["layer_causal"]["marker"]["symbol"]}
    front = traces["Pareto front"]
    assert front["mode"].startswith("lines") and front["line"]["shape"] == "vh"
    assert front["x"] == sorted(found.loc[found["is_front"], "balanced_accuracy"])
    assert front["y"] == sorted(found.loc[found["is_front"], "sim_aou"], reverse=True)
    zero_shot = next(row for row in rows if row["kind"] == "zero_shot")["balanced_accuracy"]
    icl = np.mean([row["balanced_accuracy"] for row in rows if row["kind"] == "icl"])
    labels = {label["text"]: label["x"] for label in drawn["layout"]["annotations"]}
    assert labels == {"zero-shot": pytest.approx(zero_shot), "in-context": pytest.approx(icl)}
    assert sorted(shape["x0"] for shape in drawn["layout"]["shapes"]) == pytest.approx(sorted([zero_shot, icl]))
    assert panel.title.startswith(f"sim_aou against balanced accuracy at step 4: {found['is_front'].sum()} of 18 points on the front, ")


# --- The page


def test_the_page_holds_the_three_and_their_data(tmp_path: Path) -> None:
    page = write_report(make_store(tmp_path, with_gradients(make_rows(tasks=TASKS))))
    text = page.read_text()
    assert re.findall(r'<figure id="s0-(\w+)"', text) == ["heatmap", "ratio", "pareto", "layer_profile", "gradient_norms", "reliability"]
    assert text.count("<h3>Accuracy: Tiny-135M-Instruct.Q4_1, k = 4</h3>") == 1
    assert figure(text, "s0-pareto-0") and figure(text, "s1-gradient_norms-1")
    for name, count in {"accuracy": 3 * 4 * 2, "gradient_norms": 2 * 2 * len(STEPS) * 4, "pareto": 2 * 6}.items():
        with open(page.parent / "figures" / f"{name}.csv") as file:
            assert len(list(csv.DictReader(file))) == count, name


def test_a_page_of_gradient_norms_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gradient_norms", str(make_store(tmp_path, with_gradients(make_rows())))])
    main(only="gradient_norms")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["gradient_norms.csv", "gradient_norms.html"]
    assert re.findall(r'<figure id="(s0-\w+)"', (tmp_path / "figures" / "gradient_norms.html").read_text()) == ["s0-gradient_norms"]


def test_a_store_of_one_baseline_has_accuracies_and_nothing_else(tmp_path: Path) -> None:
    rows = [make_cell("zero_shot", task="trec", seed=None, skill=0.3), make_cell("icl", task="trec", seed=1, skill=0.6)]
    page = write_report(make_store(tmp_path, rows)).read_text()
    assert "<h3>Accuracy: Tiny" in page
    assert "pareto-0" not in page and "gradient_norms-0" not in page
