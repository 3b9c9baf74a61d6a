"""The papers' tables of hand-made stores: every number recomputed here with plain loops; published figures beside those of the published model alone."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from iclgd_analysis import load, paper_tables
from iclgd_analysis.load import Frames
from iclgd_analysis.report import write_report
from iclgd_analysis.text import NULL, Grid
from scipy import stats

from tests.made import LAST, Row, changed, diverged, make_rows, make_store, only, protocol, untrained
from tests.test_reproduction import make_run, published_runs, read_published

SEEDS, TASKS = (1, 2, 3), ("trec", "subj")
RATES = {"vanilla": (1e-3, 1e-2, 1e-1), "layer_causal": (1e-3,)}  # the largest of vanilla diverges
METRICS = {"table_2": ("sim_aou_norm", "sim_aou", "sim_am", "sim_am_delta"), "table_1": ("sim_aou", "sim_am_delta")}
PUBLISHED = "fairseq-dense-1.3B"


def apart(rows: list[Row]) -> list[Row]:
    """Give the folds figures of their own, and layer 0 a change of the scores that does not count."""
    for row in rows:
        for layer in row["layers"]:
            for name in METRICS["table_2"]:
                shift = {"A": 0.3, "B": -0.07, "all": 0.0}[layer["fold"]]
                layer[name] = 5.0 if layer[name] is None else layer[name] + shift + 0.01 * (row["seed"] or 0)
    return rows


Parts = dict[str, list[Row]]  # fold that reports -> cells


def chosen(rows: list[Row], **named: Any) -> Parts:
    """Return the cells at the only learning rate, on all queries; or for each fold those with the smallest loss on the other."""
    cells = [row for row in rows if row["step"] == LAST and all(row[name] == value for name, value in named.items())]
    rates = sorted({row["learning_rate"] for row in cells})
    if len(rates) == 1:
        return {"all": cells}
    found = {}
    for chooses, reports in (("A", "B"), ("B", "A")):
        loss = {}
        for learning_rate in rates:
            same = [row for row in cells if row["learning_rate"] == learning_rate]
            if all(row["status"] == "done" for row in same):
                loss[learning_rate] = sum(fold["nll_label"] for row in same for fold in row["folds"] if fold["fold"] == chooses) / len(same)
        best = min(loss, key=loss.__getitem__)
        found[reports] = [row for row in cells if row["learning_rate"] == best]
    return found


def rates_of(parts: Parts) -> str:
    return " or ".join(f"{one:.0e}".replace("e-0", "e-") for one in sorted({row["learning_rate"] for cells in parts.values() for row in cells}))


def figure(row: Row, metric: str, fold: str) -> float:
    if fold == "all":
        return row[metric]
    values = [layer[metric] for layer in row["layers"] if layer["fold"] == fold and not (metric == "sim_am_delta" and layer["layer"] == 0)]
    return sum(values) / len(values)


def one_task(parts: Parts, metric: str) -> tuple[float, float, float]:
    """Return mean, standard error and degrees of freedom: each draw is a replicate, whose folds are averaged."""
    values = [sum(line) / len(line) for line in zip(*([figure(row, metric, fold) for row in cells] for fold, cells in parts.items()), strict=True)]
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    queries = []
    for fold, cells in parts.items():
        for number, query in enumerate(cells[0]["examples"]):
            if fold in ("all", query["fold"]):
                queries.append(sum(row["examples"][number][metric] for row in cells) / len(cells))
    centre = sum(queries) / len(queries)
    query_variance = sum((value - centre) ** 2 for value in queries) / (len(queries) - 1) / len(queries)
    return mean, math.sqrt(variance / len(values) + query_variance), len(values) - 1


def interval(mean: float, error: float, freedom: float) -> tuple[float, float, float]:
    half = stats.t.ppf(0.975, freedom) * error
    return mean, mean - half, mean + half


def over(tasks: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    error = math.sqrt(sum(e**2 for _, e, _ in tasks)) / len(tasks)
    freedom = sum(e**2 for _, e, _ in tasks) ** 2 / sum(e**4 / f for _, e, f in tasks)
    return interval(sum(m for m, _, _ in tasks) / len(tasks), error, freedom)


def grid(frames: Frames, title: str) -> Grid:
    (found,) = [one for one in paper_tables.grids(paper_tables.data(frames)) if one.title.startswith(title)]
    return found


def of_one_seed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["seed"] in (None, 1)]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Frames, Path]:
    rows = apart(make_rows(seeds=SEEDS, tasks=TASKS, rates=RATES))
    one = of_one_seed(rows)
    rows += [other for init_seed in (0, 1, 2) for other in untrained(one, init_seed=init_seed)]
    rows += [other for init_seed in (0, 1) for other in untrained(one, init_seed=init_seed, init="random") if other["task"] == "trec"]
    rows += [other for init_seed in (0, 1) for other in untrained(one, init_seed=init_seed, init="norms")]
    for row in rows:
        if row["init_seed"] is not None:
            row["layers"] = [layer | {name: layer[name] + 0.002 * (row["init_seed"] + 1) ** 2 for name in METRICS["table_1"]} for layer in row["layers"]]
    root = make_store(tmp_path_factory.mktemp("held"), rows)
    return rows, load(root), root


def test_every_number_of_table_2_is_that_of_a_plain_loop(held: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = held
    table = paper_tables.data(frames)
    table = table[table["table"] == "table_2"]
    assert len(table) == 4 * 2 * 3
    for metric in METRICS["table_2"]:
        for method, choice in (("vanilla", "selected"), ("layer_causal", "only")):
            tasks = []
            for task in TASKS:
                parts = chosen(rows, task=task, method=method, init=None)
                tasks.append(one_task(parts, metric))
                cells = list({row["key"]: row for part in parts.values() for row in part}.values())
                line = only(table, metric=metric, method=method, task=task)
                assert (line["mean"], line["lower"], line["upper"]) == pytest.approx(interval(*tasks[-1]))
                fold = "all" if choice == "only" else "A and B"
                assert (line["learning_rates"], line["choice"], line["fold"], line["step"]) == (rates_of(parts), choice, fold, LAST)
                assert (line["num_used"], line["num_replicates"], line["num_planned"], line["num_cells"]) == (3, 3, 3, len(cells))
                sizes = [row["update_ratio"] for part in parts.values() for row in part]
                assert line["R"] == pytest.approx(math.prod(sizes) ** (1 / len(sizes)))
            line = only(table, metric=metric, method=method, task="all tasks")
            assert (line["mean"], line["lower"], line["upper"]) == pytest.approx(over(tasks))
            assert (line["num_used"], line["num_planned"], line["num_tasks"]) == (6, 6, 2)
            assert pd.isna(line["learning_rates"])


def test_every_number_of_table_1_is_that_of_a_plain_loop_over_the_seeds_of_the_weights(held: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = held
    table = paper_tables.data(frames)
    table = table[table["table"] == "table_1"]
    assert set(table["method"]) == {"vanilla"}
    assert list(table["init"].unique()) == ["trained", "embeddings_norms (fairseq)", "random (fairseq)"]
    for name, init, its_tasks in (
        ("trained", None, TASKS),
        ("embeddings_norms (fairseq)", "embeddings_norms", TASKS),
        ("random (fairseq)", "random", TASKS[:1]),
    ):
        for metric in METRICS["table_1"]:
            tasks = []
            for task in its_tasks:
                parts = chosen(rows, task=task, method="vanilla", init=init)
                tasks.append(one_task(parts, metric))
                line = only(table, init=name, metric=metric, task=task)
                assert (line["mean"], line["lower"], line["upper"]) == pytest.approx(interval(*tasks[-1]))
                assert (line["learning_rates"], line["fold"], line["num_used"]) == (rates_of(parts), "A and B", len(parts["A"]))
            line = only(table, init=name, metric=metric, task="all tasks")
            assert (line["mean"], line["lower"], line["upper"]) == pytest.approx(over(tasks))
            assert line["num_tasks"] == len(its_tasks)


def test_the_tables_are_laid_out_as_the_papers_are(held: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = held
    second = grid(frames, "Table 2")
    assert second.title == "Table 2 of the papers: Tiny-135M-Instruct.Q4_1, k = 4"
    assert second.headers == ("metric", "method", "subj", "trec", "mean", "n/N")
    assert [row[:2] for row in second.rows] == [[metric, method] for metric in METRICS["table_2"] for method in ("GD", "LCGD")]
    assert {row[-1] for row in second.rows} == {"3/3 each"}
    assert second.rows[0][3] == f"{one_task(chosen(rows, task='trec', method='vanilla', init=None), 'sim_aou_norm')[0]:.3f}"
    first = grid(frames, "Table 1")
    assert first.headers == ("metric", "weights", "subj", "trec", "mean", "n/N")
    weights = ["trained", "embeddings_norms (fairseq)", "untrained (fairseq)"]
    assert [row[:2] for row in first.rows] == [[metric, name] for metric in METRICS["table_1"] for name in weights]
    assert [row[2] == NULL for row in first.rows] == [False, False, True] * 2
    assert first.rows[2][-1] == "trec 2/2; mean over 1 of 2 tasks"


def test_the_note_says_which_learning_rates_and_how_many_draws(held: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = held
    note, rates = grid(frames, "Table 2").note, {}
    for task in TASKS:
        rates[task] = rates_of(chosen(rows, task=task, method="vanilla", init=None))
        rates[task] += " (edge of the grid: extend the grid)" * ("1e-3" in rates[task])
    assert "Draws over all tasks: GD 6 used of 6 planned, LCGD 6 used of 6 planned." in note
    assert "The only learning rate in the store (all queries): LCGD subj 1e-3, trec 1e-3." in note
    assert f"nll_label on one fold (figures of the other, folds swapped and averaged): GD subj {rates['subj']}, trec {rates['trec']}." in note
    assert "Collapsed, one label predicted for nearly all queries: LCGD subj 3 of 3 cells, trec 3 of 3 cells." in note
    assert "Descriptive: some means are over 3 seeds, fewer than 5." in note
    note = grid(frames, "Table 1").note
    assert "trained 6 used of 6 planned, embeddings_norms (fairseq) 6 used of 6 planned, untrained (fairseq) 2 used of 2 planned." in note


def test_without_random_weights_there_is_no_table_1_and_with_one_task_no_mean(tmp_path: Path) -> None:
    rows = make_rows(seeds=(1, 2))
    (found,) = paper_tables.grids(paper_tables.data(load(make_store(tmp_path / "trained", rows))))
    assert found.title.startswith("Table 2")
    assert found.headers == ("metric", "method", "trec", "n/N")
    assert {row[-1] for row in found.rows} == {"2/2"}
    alone = untrained(of_one_seed(rows), init_seed=0)
    (found,) = paper_tables.grids(paper_tables.data(load(make_store(tmp_path / "random", alone))))
    assert found.title.startswith("Table 1")
    assert [row[1] for row in found.rows] == ["embeddings_norms (fairseq)"] * 2
    others = [row for row in rows if row["method"] not in ("vanilla", "layer_causal")]
    assert paper_tables.grids(paper_tables.data(load(make_store(tmp_path / "begun", others)))) == []


def test_what_is_undefined_is_a_dash_and_is_counted(tmp_path: Path) -> None:
    rows = [row for row in make_rows(seeds=SEEDS, tasks=TASKS, rates={"vanilla": (1e-3, 1.0), "layer_causal": (1e-3,)}) if row["learning_rate"] != 1.0]
    for index, row in enumerate(rows):
        place = (row["method"], row["task"], row["seed"]) if row["step"] == LAST else ()
        if place[:2] == ("vanilla", "trec") or place == ("vanilla", "subj", 1):
            rows[index] = diverged(row)
        if place == ("layer_causal", "trec", 2):
            rows[index] = row | {"sim_am_delta": None, "examples": [query | {"sim_am_delta": None} for query in row["examples"]]}

    def values(method: str, task: str, metric: str) -> list[float]:
        return [row[metric] for row in rows if (row["method"], row["task"], row["step"]) == (method, task, LAST) and row[metric] is not None]

    frames = load(make_store(tmp_path, rows))
    table = paper_tables.data(frames)
    line = only(table, method="vanilla", metric="sim_aou", task="trec")
    assert (line["num_used"], line["num_planned"], line["num_diverged"], line["learning_rates"]) == (0, 3, 3, "1e-3")
    assert line[["mean", "lower", "upper", "R"]].isna().all()
    for task in ("subj", "all tasks"):
        line = only(table, method="vanilla", metric="sim_aou", task=task)
        assert line["mean"] == pytest.approx(sum(values("vanilla", "subj", "sim_aou")) / 2)
        assert line["num_used"] == 2
    line = only(table, method="layer_causal", metric="sim_am_delta", task="trec")
    assert (line["mean"], line["num_used"]) == (pytest.approx(sum(values("layer_causal", "trec", "sim_am_delta")) / 2), 2)
    found = grid(frames, "Table 2")
    assert [row[3] for row in found.rows[::2]] == [NULL] * 4
    assert {row[-1] for row in found.rows[::2]} == {"subj 2/3, trec 0/3; mean over 1 of 2 tasks"}
    assert [row[-1] for row in found.rows[1::2]] == ["3/3 each"] * 3 + ["subj 3/3, trec 2/3"]
    assert "GD 2 used of 6 planned, LCGD 5 to 6 used of 6 planned." in found.note
    assert "Diverged: GD subj 1 of 3 cells, trec 3 of 3 cells." in found.note
    assert "nan" not in " ".join(map(" ".join, found.rows)) + found.note


def test_a_method_whose_every_learning_rate_diverged_has_dashes(tmp_path: Path) -> None:
    rows = [diverged(row) if (row["method"], row["step"]) == ("vanilla", LAST) else row for row in make_rows()]
    frames = load(make_store(tmp_path, rows))
    found = grid(frames, "Table 2")
    assert [row[2:] for row in found.rows[::2]] == [[NULL, "0/1"]] * 4
    line = only(paper_tables.data(frames), method="vanilla", metric="sim_aou")
    assert pd.isna(line["choice"])


def test_learning_rate_0_is_no_learning_rate(tmp_path: Path) -> None:
    rows = make_rows(rates={"vanilla": (0.0, 1e-3, 1.0)})
    frames = load(make_store(tmp_path, [row for row in rows if row["learning_rate"] != 1.0]))
    line = only(paper_tables.data(frames), metric="sim_aou")
    assert (line["learning_rates"], line["choice"], line["fold"]) == ("1e-3", "only", "all")


@pytest.fixture(scope="module")
def like_theirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[pd.DataFrame, list[Grid]]]:
    """Data and tables of the same store made with the published model and with others."""
    found = {}
    for name in (PUBLISHED, "fairseq-dense-355M"):
        rows = make_rows(tasks=("cb", "sst2", "subj", "sst5", "agnews", "mr"), rates={"vanilla": (1e-3, 1.0), "layer_causal": (1e-3,)}, model=name)
        rows += [other for init in ("embeddings_norms", "random") for other in untrained(rows, init_seed=0, init=init)]
        table = paper_tables.data(load(make_store(tmp_path_factory.mktemp("theirs"), rows)))
        found[name] = table, paper_tables.grids(table)
    return found


def test_published_figures_stand_beside_those_of_the_published_model(like_theirs: dict[str, tuple[pd.DataFrame, list[Grid]]]) -> None:
    table, (second, first) = like_theirs[PUBLISHED]
    known = [row for row in read_published() if row["kind"] in ("table_1", "table_2")]
    seen = 0
    for line in table.to_dict("records"):
        init = line["init"].split(" ")[0]
        named = {"kind": line["table"], "task": line["task"].replace("all tasks", ""), "method": line["method"], "init": init, "metric": line["metric"]}
        values = [float(row["value"]) for row in known if all(row[name] == value for name, value in named.items())]
        seen += len(values)
        assert [line[name] for name in ("theirs", "theirs_or")] == pytest.approx([*values, math.nan, math.nan][:2], nan_ok=True)
    assert seen == len(known) == 56 + 31
    assert second.headers == ("metric", "method", "sst2", "sst5", "mr", "subj", "agnews", "cb", "mean", "n/N")
    theirs = [[cell.partition("(")[2].rstrip(")") for cell in row[2:-1]] for row in second.rows]
    assert theirs[0] == ["0.11", "0.09", "0.22", "0.18", "0.31", "0.21", "0.187"]
    assert theirs[7] == ["0.30", "0.33", "0.26", "0.32", "0.43", "0.38", "0.336"]
    ours = only(table[table["table"] == "table_2"], method="vanilla", metric="sim_aou_norm", task="mr")["mean"]
    assert second.rows[0][4] == f"{ours:.3f} (0.22)"
    assert "In parentheses: Table 2 of arXiv 2311.07772v4" in second.note
    assert "sst2 5e-4, sst5 1.6e-4, mr 3e-3, subj 3e-3, agnews 2e-1, cb 8e-2" in second.note
    assert first.rows[2][5].endswith(" (0.06 or 0.17)")
    assert [("(" in cell) for cell in first.rows[0][2:-1]] == [True, True, True, True, False, True, False]  # neither agnews nor a mean was published
    assert "unclear" in first.note


def test_the_published_runs_make_the_published_table(tmp_path: Path) -> None:
    runs = published_runs()
    rows = []
    for run, figures in runs.items():
        row = make_run(run, figures, named={"model": PUBLISHED})
        rows.append(row | figures)  # the row's own figure is the mean over its layers
    frames = load(make_store(tmp_path, rows))
    table = paper_tables.data(frames)
    table = table[table["metric"].isin(("sim_aou_norm", "sim_am_delta"))]
    assert len(table) == 2 * 2 * 7
    assert (table["mean"] - table["theirs"]).abs().max() <= 5.01e-3  # rounded to two digits
    for line in table[table["task"] != "all tasks"].to_dict("records"):
        values = [figures[line["metric"]] for run, figures in runs.items() if run[:2] == (line["task"], line["method"])]
        assert (line["mean"], line["num_used"], line["choice"]) == (pytest.approx(sum(values) / 3), 3, "only")
    (found,) = paper_tables.grids(table)
    assert found.title == "Table 2 of the papers: fairseq-dense-1.3B, k = 32, protocol reference"


def test_the_tables_of_another_model_stand_alone(like_theirs: dict[str, tuple[pd.DataFrame, list[Grid]]]) -> None:
    table, grids = like_theirs["fairseq-dense-355M"]
    assert not {"theirs", "theirs_or"} & set(table.columns)
    assert [one.title.split(" of")[0] for one in grids] == ["Table 2", "Table 1"]
    for one in grids:
        assert "parentheses" not in one.note
        assert not any("(" in cell for row in one.rows for cell in row[2:])


def test_a_mean_over_other_tasks_has_no_published_figure(tmp_path: Path) -> None:
    rows = make_rows(tasks=("sst2", "trec"), rates={"vanilla": (1e-3, 1.0)}, model=PUBLISHED)
    found = grid(load(make_store(tmp_path, rows)), "Table 2")
    assert found.headers == ("metric", "method", "sst2", "trec", "mean", "n/N")
    assert [("(" in cell) for cell in found.rows[0][2:-1]] == [True, False, False]


def test_each_model_and_protocol_has_a_table_and_each_task_its_largest_set_of_queries(tmp_path: Path) -> None:
    rates = {"vanilla": (1e-3, 1.0)}
    rows, other = make_rows(rates=rates), make_rows(rates=rates, model="gpt2")
    eos = [changed(row, protocol=protocol(separator="eos")) for row in rows]
    fewer = [changed(row, num_queries=12, layers=[]) for row in rows]
    shuffled = [changed(row, train_on="random_labels", layers=[]) for row in rows if row["kind"] == "finetuned"]
    frames = load(make_store(tmp_path, rows + other + eos + fewer + shuffled))
    table = paper_tables.data(frames)
    titles = [one.title for one in paper_tables.grids(table)]
    tiny = "Table 2 of the papers: Tiny-135M-Instruct.Q4_1, k = 4"
    assert titles == [tiny, f"{tiny}, protocol separator = eos", "Table 2 of the papers: gpt2, k = 4"]
    assert set(table["num_queries"]) == {24}
    expected = next((figure(row, "sim_aou", "A") + figure(row, "sim_aou", "B")) / 2 for row in rows if (row["learning_rate"], row["step"]) == (1e-3, LAST))
    line = only(table, model="Tiny-135M-Instruct.Q4_1", protocol="clean", metric="sim_aou")
    assert (line["mean"], line["num_used"]) == (pytest.approx(expected), 1)


def test_the_tables_stand_on_the_page_in_a_file_and_in_a_terminal(held: tuple[list[Row], Frames, Path]) -> None:
    _, frames, root = held
    page = write_report(root).read_text()
    across = page[page.index('id="across"') :]
    for number in (1, 2):
        assert f"<h3>Table {number} of the papers: Tiny-135M-Instruct.Q4_1, k = 4</h3>" in across
    lines = list(csv.DictReader((root / "figures" / "paper_tables.csv").open()))
    table = paper_tables.data(frames)
    assert [float(line["mean"]) for line in lines] == pytest.approx(table["mean"].tolist())
    assert np.isfinite([float(line[name]) for line in lines for name in ("lower", "upper")]).all()
    code = "import runpy, sys; runpy.run_module('iclgd_analysis.paper_tables', run_name='__main__'); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(root)], capture_output=True, text=True, check=True)
    assert "Table 1 of the papers" in done.stdout and "Table 2 of the papers" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
    assert "nan" not in done.stdout
