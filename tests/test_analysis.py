"""The analysis reads a real store of made-up cells; numbers are recomputed here with plain loops."""

from __future__ import annotations

import base64
import csv
import hashlib
import html
import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import iclgd_analysis
import numpy as np
import pytest
from iclgd_analysis import load
from iclgd_analysis.chosen import Selected, nearest_ratio, select
from iclgd_analysis.intervals import square_and_add, wilson
from iclgd_analysis.load import Frames
from iclgd_analysis.report import lead, main, sentence, write_report
from iclgd_analysis.table import HEADERS, display, show, summary
from iclgd_analysis.text import number, rate
from rich.console import Console

from iclgd_dist.protocol import Protocol
from tests.made import NUM_QUERIES, RATES, STEPS, Row, diverged, figure, make_rows, make_store

FIGURES = ("table.csv", "heatmap.csv", "ratio.csv", "pareto.csv", "layer_profile.csv", "gradient_norms.csv")  # beside every page


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return make_rows(seeds=(1, 2))


@pytest.fixture(scope="module")
def frames(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Frames:
    return load(make_store(tmp_path_factory.mktemp("store"), rows))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(make_store(tmp_path_factory.mktemp("store"), make_rows(), missing=3)).read_text()


def test_the_means_of_the_table_are_those_of_a_plain_loop(frames: Frames, rows: list[Row]) -> None:
    table = summary(frames, frames.settings()[0])
    assert len(table) == 2 + 2 * 3 * 2
    for _, line in table[table["step"].notna()].iterrows():
        same = [r for r in rows if (r["method"], r["learning_rate"], r["step"]) == (line["method"], line["learning_rate"], line["step"])]
        for metric in ("balanced_accuracy", "accuracy", "nll_label", "sim_aou", "sim_am_delta", "recovered_aou"):
            values = [r[metric] for r in same if r[metric] is not None]
            expected = sum(values) / len(values) if values else math.nan
            assert line[metric] == pytest.approx(expected, nan_ok=True)
            assert line[f"{metric}_n"] == len(values)
        ratios = [r["update_ratio"] for r in same if r["update_ratio"] is not None]
        assert line["update_ratio"] == pytest.approx(math.prod(ratios) ** (1 / len(ratios)) if ratios else math.nan, nan_ok=True)
        assert line["num_diverged"] == sum(r["status"] == "diverged" for r in same)


def test_finetuned_cells_carry_the_baselines_of_their_own_draw(frames: Frames, rows: list[Row]) -> None:
    for _, cell in frames.finetuned.iterrows():
        icl = next(r for r in rows if r["kind"] == "icl" and r["seed"] == cell["seed"])
        assert (cell["icl_key"], cell["icl_balanced_accuracy"]) == (icl["key"], icl["balanced_accuracy"])
        assert cell["zs_accuracy"] == next(r for r in rows if r["kind"] == "zero_shot")["accuracy"]


def test_with_two_seeds_the_interval_is_the_t_interval_with_the_queries_share(frames: Frames, rows: list[Row]) -> None:
    icl = [r for r in rows if r["kind"] == "icl"]
    values = [r["balanced_accuracy"] for r in icl]
    mean = sum(values) / 2
    between = sum((v - mean) ** 2 for v in values) / 2
    queries = 0.0
    for label in (0, 1):
        shares = [
            sum(e["prediction"] == e["gold"] for r in icl for e in r["examples"] if e["query"] == q["query"]) / 2
            for q in icl[0]["examples"]
            if q["gold"] == label
        ]
        centre = sum(shares) / len(shares)
        queries += sum((s - centre) ** 2 for s in shares) / (len(shares) - 1) / len(shares) / 4
    half = 12.706204736 * math.sqrt(between / 2 + queries)
    found = frames.estimate(frames.settings()[0].icl, "balanced_accuracy")
    assert (found.mean, found.used) == (pytest.approx(mean), 2)
    assert (found.lower, found.upper) == (pytest.approx(max(0, mean - half)), pytest.approx(min(1, mean + half)))
    similarity = frames.estimate(frames.settings()[0].at("vanilla", 1e-2, 4), "sim_aou_pooled")
    pooled = [r["sim_aou_pooled"] for r in rows if (r["method"], r["learning_rate"], r["step"]) == ("vanilla", 1e-2, 4)]
    assert similarity.upper - similarity.mean == pytest.approx(12.706204736 * abs(pooled[0] - pooled[1]) / 2)


def test_intervals_of_one_draw_hold_known_values_and_stay_inside_the_unit_range() -> None:
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)  # a published table's values
    assert (wilson(0, 20)[0], wilson(20, 20)[1]) == (0, 1)
    assert wilson(20, 20)[0] < 0.9
    halves = [np.array([1.0] * 8 + [0.0] * 2), np.array([1.0] * 10)]
    assert square_and_add([halves[0]]) == pytest.approx(wilson(8, 10))
    low, high = square_and_add(halves)
    below = math.hypot(0.8 - wilson(8, 10)[0], 1 - wilson(10, 10)[0]) / 2
    assert low == pytest.approx(0.9 - below)
    assert 0.9 < high <= 1


def test_the_learning_rate_is_selected_by_the_loss_on_one_fold_alone(tmp_path: Path) -> None:
    rows = make_rows(seeds=(1, 2))
    best = {"A": 1e-4, "B": 1e-3}
    for row in rows:
        for fold in row["folds"] if row["method"] == "layer_causal" and row["step"] == STEPS[-1] else []:
            fold["nll_label"] = 0.1 + row["seed"] / 10 if row["learning_rate"] == best[fold["fold"]] else 0.9
        if row["learning_rate"] == 1e-2 or row["step"] == STEPS[0]:
            row["nll_label"] = 0.0  # neither the loss over all queries nor an earlier step counts
    frames = load(make_store(tmp_path, rows))
    found = {fold: select(frames, frames.settings()[0], "layer_causal", fold=fold) for fold in "AB"}
    assert found == {"A": Selected(1e-4, is_edge=True), "B": Selected(1e-3, is_edge=False)}


def test_a_learning_rate_that_diverged_in_one_draw_cannot_be_selected(tmp_path: Path) -> None:
    rows = make_rows(seeds=(1, 2))
    for index, row in enumerate(rows):
        if (row["method"], row["learning_rate"], row["step"], row["seed"]) == ("layer_causal", 1e-3, 4, 2):
            rows[index] = diverged(row)
    frames = load(make_store(tmp_path, rows))
    found = select(frames, frames.settings()[0], "layer_causal")
    assert found is not None
    assert found.learning_rate != 1e-3
    assert found.is_edge
    lines = display(frames, frames.settings()[0], summary(frames, frames.settings()[0]))
    assert any("diverged 1/2 (step 3)" in line[-1] and line[3] == "1/2" for line in lines)
    assert any("extend the grid" in line[-1] for line in lines)
    assert "Extend the grid: the selected learning rate of layer_causal" in sentence(frames, frames.settings()[0], summary(frames, frames.settings()[0]))


def test_the_rate_nearest_half_is_nearest_in_the_logarithm(frames: Frames) -> None:
    sizes = {learning_rate: 0.15 * 2**rank * 2 for rank, learning_rate in enumerate(RATES["layer_causal"])}
    best = min(sizes, key=lambda lr: abs(math.log(sizes[lr] / 0.5)))
    assert nearest_ratio(frames.settings()[0], "layer_causal") == (best, pytest.approx(sizes[best]))


def test_null_is_an_en_dash_and_divergence_and_collapse_are_marked(frames: Frames) -> None:
    setting = frames.settings()[0]
    lines = display(frames, setting, summary(frames, setting))
    of = {(line[0], line[1], line[2]): line for line in lines}
    gone = of["vanilla", "1e-1", "4"]
    assert gone[4:-1] == ["\N{EN DASH}"] * 9
    assert (gone[3], gone[-1]) == ("0/2", "diverged 2/2 (step 3)")
    assert "collapsed 2/2" in of["layer_causal", "1e-2", "4"][-1]
    assert of["zero-shot", "", ""][6:-1][1:] == ["\N{EN DASH}"] * 6
    assert all(len(line) == len(HEADERS) and "nan" not in " ".join(line) for line in lines)


def test_numbers_and_rates_are_written_as_people_write_them() -> None:
    assert [rate(x) for x in (1e-3, 3e-3, 1.6e-4, 0.2, 1.0, 0.0)] == ["1e-3", "3e-3", "1.6e-4", "2e-1", "1e0", "0"]
    assert [number(x, 2) for x in (0.123, -0.5, None, math.nan)] == ["0.12", "\N{MINUS SIGN}0.50", "\N{EN DASH}", "\N{EN DASH}"]


def test_the_page_names_what_every_figure_rests_on(page: str) -> None:
    caption = (
        "Tiny-135M-Instruct.Q4_1, instruction-tuned, dequantised from 4-bit; stored as float32, computed in float32. Task trec, k = 4. Recorded position: "
        "last prompt token; sink: &lt;/s&gt;; separator: newline. 24 queries (query seed 1); 1 seed (1)."
    )
    of_setting = page[page.index('<section id="s0"') : page.index('<section id="across">')]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", of_setting, re.DOTALL)
    assert len(captions) == 6  # no gradient was noted: no map of gradients
    assert all(caption in found for found in captions)
    assert "of 17 planned, 3 are missing" in page
    assert "Descriptive: 1 seed, fewer than 5" in page
    assert "11 are done and 1 diverged; in 2 of them the classifier collapsed" in page
    assert "11 used of 12 finetuned cells in the store" in page


def test_names_from_data_are_escaped_wherever_they_stand(tmp_path: Path) -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    rows = make_rows(tasks=(bad,), rates={"vanilla": (1e-3, 1e-2), f"mine{bad}": (1e-3, 1e-2)}, words=["Red", bad], model=f"model{bad}")
    text = write_report(make_store(tmp_path, rows)).read_text()
    assert "&lt;script&gt;alert(1)" in text
    assert "<script>alert" not in text
    assert "<img" not in strip_plotly(text)
    assert text.count("<script>") == 2
    for block in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL):
        assert not set("<>") & set(block)
        for trace in json.loads(block).get("data", ()):  # a figure's; the cells' own texts are tried in a browser
            assert not re.search("<script|<img", str([trace.get("name"), trace.get("hovertext")]))


def strip_plotly(text: str) -> str:
    return re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def test_the_page_asks_nothing_of_a_network(page: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy[1]).split(";"))
    assert (rules["default-src"], rules["img-src"]) == ("'none'", "data:")
    assert not re.search("http|unsafe-eval", policy[1])
    assert "unsafe-inline" not in rules["script-src"]
    outside = strip_plotly(page)
    assert not re.search(r"""(src|href|action|data|poster)\s*=\s*["']?\s*(https?:)?//""", outside, re.IGNORECASE)
    assert not re.search(r"@import|fetch\s*\(|XMLHttpRequest|url\s*\(|<link|<iframe", outside)
    for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in rules["script-src"]


def test_the_figures_data_stands_beside_the_page(tmp_path: Path) -> None:
    page = write_report(make_store(tmp_path / "store", make_rows()))
    assert page == tmp_path / "store" / "report.html"
    assert sorted(p.name for p in (page.parent / "figures").iterdir()) == sorted(
        [*FIGURES, "accuracy.csv", "equal_size.csv", "paper_tables.csv", "reliability.csv", "verdict.csv"]
    )
    lines = list(csv.DictReader((page.parent / "figures" / "heatmap.csv").open()))
    assert {line["state"] for line in lines if line["learning_rate"] == "0.1" and line["step"] == "4.0"} == {"diverged"}
    assert {line["task"] for line in lines} == {"trec"}
    ratios = list(csv.DictReader((page.parent / "figures" / "ratio.csv").open()))
    assert all(bool(line["random_state"]) == (bool(line["value"]) and line["metric"] in ("sim_aou", "sim_aou_norm")) for line in ratios)
    elsewhere = iclgd_analysis.write_report(tmp_path / "store", tmp_path / "out" / "page.html")
    assert sorted(p.name for p in elsewhere.parent.rglob("*.*")) == sorted(
        [*FIGURES, "accuracy.csv", "equal_size.csv", "page.html", "paper_tables.csv", "reliability.csv", "verdict.csv"]
    )


def test_diverged_and_undefined_cells_of_a_heat_map_are_not_drawn_as_zero(page: str) -> None:
    values, states = figure(page, "s0-heatmap-1")[:2]
    assert values["z"][1][-1] is None
    assert (states["z"][1][-1], states["text"][1][-1]) == (1, "\N{MULTIPLICATION SIGN}")
    assert [z for line in states["z"] for z in line].count(None) == len(STEPS) * 4 - 1


def test_collapsed_cells_are_open_markers(page: str) -> None:
    lines = {trace["name"]: trace for trace in figure(page, "s0-ratio-0")}
    assert lines["layer_causal"]["marker"]["symbol"] == ["circle", "circle", "circle-open"]
    assert lines["vanilla"]["marker"]["symbol"] == ["circle", "circle"]  # the third diverged: it has no size


def test_cells_of_a_search_and_superseded_cells_stay_out_of_the_means(tmp_path: Path) -> None:
    rows = make_rows()
    found = next(r for r in rows if r["method"] == "vanilla" and r["status"] == "done")
    extra = [found | {"key": "a" * 64, "origin": "search", "accuracy": 0.0, "learning_rate": 5e-3}]
    extra += [found | {"key": "b" * 64, "accuracy": 0.0, "created_at": datetime(2024, 1, 1, tzinfo=UTC)}]
    frames = load(make_store(tmp_path, rows + extra))
    assert (frames.num_search, frames.num_superseded) == (1, 1)
    assert set(frames.finetuned["key"]) == {r["key"] for r in rows if r["kind"] == "finetuned"}
    assert any("1 cell found by a search" in text for text in lead(frames))


def test_every_model_and_task_has_a_section_and_an_entry_in_the_contents(tmp_path: Path) -> None:
    rows = make_rows(tasks=("trec", "subj")) + make_rows(tasks=("trec",), model="gpt2")
    text = write_report(make_store(tmp_path, rows), only="table").read_text()
    titles = ["subj, Tiny-135M-Instruct.Q4_1, k = 4", "trec, Tiny-135M-Instruct.Q4_1, k = 4", "trec, gpt2, k = 4"]
    assert re.findall(r"<h2>(.*?)</h2>", text) == titles
    assert re.findall(r'<a href="#s\d+">(.*?)</a>', text) == titles


@pytest.mark.parametrize("kinds", [(), ("zero_shot",), ("zero_shot", "icl")])
def test_a_store_that_is_barely_begun_still_has_a_page(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    text = write_report(make_store(tmp_path, [r for r in make_rows() if r["kind"] in kinds])).read_text()
    assert "nothing to compare" in text or "No finetuned cell yet" in text


def test_a_store_elsewhere_needs_a_path_for_its_page() -> None:
    with pytest.raises(ValueError, match="needs a path to write to"):
        write_report("s3://bucket/store")


@pytest.mark.parametrize("width", [80, 200])
def test_no_number_is_cut_off_in_a_terminal(frames: Frames, width: int) -> None:
    out = io.StringIO()
    show(frames, Console(file=out, width=width))
    assert "zero-shot" in out.getvalue()
    assert "diverged" in out.getvalue()
    assert "\N{HORIZONTAL ELLIPSIS}" not in out.getvalue()


@pytest.mark.parametrize("script", ["heatmap", "ratio", "pareto", "layer_profile"])
def test_a_page_can_hold_one_figure_alone(tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, str(make_store(tmp_path, make_rows()))])
    main(only=script)
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [f"{script}.csv", f"{script}.html"]
    assert re.findall(r'<figure id="(s0-\w+)"', (tmp_path / "figures" / f"{script}.html").read_text()) == [f"s0-{script}"]


def test_a_script_runs_by_itself_without_torch_or_ray(tmp_path: Path) -> None:
    make_store(tmp_path, make_rows())
    code = "import runpy, sys; runpy.run_module('iclgd_analysis.table', run_name='__main__'); print({'torch', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str(tmp_path / "figures" / "table.html"), "set()"]


def test_a_caption_lists_runs_that_are_no_grid(tmp_path: Path) -> None:
    rows = [row for row in make_rows(seeds=(1, 2)) if row["kind"] == "zero_shot" or row["seed"] == 1]
    later = [row | {"order": 1, "seed": 2, "key": hashlib.sha256(row["key"].encode()).hexdigest()} for row in rows if row["kind"] != "zero_shot"]
    (setting,) = load(make_store(tmp_path, rows + later)).settings()
    assert "2 seeds (1, 2), as (seed, order): (1, 0), (2, 1)." in setting.caption


def test_learning_rate_0_is_a_control_and_never_selected(rows: list[Row], tmp_path: Path) -> None:
    rows = [row | {"folds": [fold | {"nll_label": 1e-3} for fold in row["folds"]]} if row["learning_rate"] == 1e-3 else row for row in rows]
    best = [row for row in rows if row["kind"] == "finetuned" and row["method"] == "vanilla" and row["learning_rate"] == 1e-3]
    zero = [row | {"learning_rate": 0.0, "key": hashlib.sha256(row["key"].encode()).hexdigest()} for row in best]
    zero = [row | {"folds": [fold | {"nll_label": 1e-6} for fold in row["folds"]]} for row in zero]
    frames = load(make_store(tmp_path, rows + zero))
    (setting,) = frames.settings()
    chosen = select(frames, setting, "vanilla")
    assert chosen == Selected(1e-3, is_edge=True)  # 0 is no smaller one of the grid


def test_planned_draws_are_those_of_the_tasks_own_runs_else_of_the_sweeps(frames: Frames) -> None:
    shared = {"tasks": ["trec"], "num_demonstrations": [4], "num_queries": NUM_QUERIES, "query_seed": 1}

    def num_draws(**sweep: Any) -> int:
        found = replace(frames, sweeps=(shared | {"models": [{"source": frames.cells["model_source"].iloc[0]}], "analysis": {"matched_ratio": 0.5}} | sweep,))
        return found.settings()[0].num_draws

    assert num_draws(seeds=[1, 2, 3], orders=2) == 6
    assert num_draws(seeds=[], orders=1, runs=[[1, 0], [2, 0], [3, 1]]) == 3
    assert num_draws(seeds=[7], orders=1, runs=[], per_task={"trec": {"runs": [[8, 0], [9, 0]]}, "mr": {"runs": [[5, 0]]}}) == 2 + 2
    assert num_draws(seeds=[7], orders=1, runs=[], per_task={"trec": {"runs": None}}) == 2 + 1


def test_a_baseline_of_an_older_version_serves_the_cells_of_this_one(rows: list[Row], tmp_path: Path) -> None:
    newer = [dict(row) for row in rows]
    for row in newer:
        if row["kind"] == "finetuned":
            row["protocol"] = json.dumps(Protocol().model_dump() | {"sink_token": "</s>"})
    (setting,) = load(make_store(tmp_path, newer)).settings()
    assert len(setting.zero_shot) == 1
    assert setting.finetuned["zs_key"].notna().all()
    assert setting.finetuned["icl_key"].notna().all()


def test_a_caption_names_every_switch_that_is_not_the_clean_one(rows: list[Row], tmp_path: Path) -> None:
    changed = [row | {"protocol": json.dumps(Protocol(loss_tokens="label", record_position="label").model_dump() | {"sink_token": "</s>"})} for row in rows]
    (setting,) = load(make_store(tmp_path, changed)).settings()
    assert "Recorded position: the first label's token after the prompt; sink: </s>; separator: newline; loss_tokens: label. " in setting.caption
