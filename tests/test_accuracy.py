"""Accuracies at the selected learning rates: a hand-made store, every number recomputed here with plain loops."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from iclgd_analysis import accuracy, load
from iclgd_analysis.report import write_report
from scipy import stats

from tests.made import LAST, RATES, Row, changed, diverged, make_cell, make_rows, make_store, of_fold, only

SEEDS, TASKS = (1, 2, 4), ("subj", "trec")
METRICS = ("accuracy", "balanced_accuracy")


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


def test_a_store_of_one_baseline_has_accuracies_and_nothing_else(tmp_path: Path) -> None:
    rows = [make_cell("zero_shot", task="trec", seed=None, skill=0.3), make_cell("icl", task="trec", seed=1, skill=0.6)]
    page = write_report(make_store(tmp_path, rows)).read_text()
    assert "<h3>Accuracy: Tiny" in page
    assert "pareto-0" not in page and "gradient_norms-0" not in page
