"""What belongs into one setting, what it is called, and what is said where something is not there: stores that mix queries, precisions, templates and methods."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from iclgd_analysis import ensembles, equal_size, load, verdict
from iclgd_analysis.crossing import at_equal_gain
from iclgd_analysis.load import planned_draws
from iclgd_analysis.panels import COLOURS, colour
from iclgd_analysis.report import sentence
from iclgd_analysis.table import display, summary
from iclgd_analysis.text import NULL

from iclgd_dist.store import Store
from tests.made import LAST, RATES, Row, changed, diverged, make_rows, make_store, measure, undiverged

SEEDS = (1, 2, 3)


def fewer(row: Row) -> Row:
    """The same cell on the first half of its queries."""
    half = row["examples"][: len(row["examples"]) // 2]
    return changed(row, num_queries=row["num_queries"] // 2) | {"examples": half}


def test_settings_that_differ_in_their_queries_or_their_precision_are_told_apart(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS, tasks=("trec", "subj"))
    rows += [fewer(row) for row in rows if row["task"] == "trec"]
    rows += [changed(row, compute_dtype="bfloat16") for row in rows]
    frames = load(make_store(tmp_path, rows))
    titles = [setting.title for setting in frames.settings()]
    assert len(set(titles)) == len(titles) == 6
    model = "Tiny-135M-Instruct.Q4_1, k = 4, computed in"
    assert titles[:3] == [f"subj, {model} bfloat16", f"subj, {model} float32", f"trec, {model} bfloat16, 12 queries"]
    names = [tuple(setting.named.values()) for setting in frames.settings()]
    assert len(set(names)) == 6
    grids = ensembles.grids(ensembles.data(frames))
    assert sorted(grid.title for grid in grids) == sorted(f"{ensembles.TITLE}: {title}" for title in titles)
    first, second = verdict.findings(frames)
    assert verdict.paragraph(first)[0].split("step")[0] == verdict.paragraph(second)[0].split("step")[0]
    assert {", computed in bfloat16:", ", computed in float32:"} == {
        verdict.paragraph(one)[0].partition("step 4")[2].partition(" at")[0] for one in (first, second)
    }
    assert [grid.title for grid in equal_size.grids(equal_size.data(frames))] == [f"{equal_size.TITLE}: {model} {dtype}" for dtype in ("bfloat16", "float32")]
    alone = load(make_store(tmp_path / "alone", make_rows()))
    assert [setting.title for setting in alone.settings()] == ["trec, Tiny-135M-Instruct.Q4_1, k = 4"]


def test_cells_of_an_earlier_template_are_no_part_of_the_later_ones_setting(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS)
    begun = [row for row in rows if row["kind"] != "finetuned" or (row["method"], row["learning_rate"]) == ("vanilla", 1e-3)]
    later = [changed(row, created_at=row["created_at"] + timedelta(days=1)) for row in begun]
    root = make_store(tmp_path, [*rows, *later])
    store = Store(root)
    for path in (root / "sweeps").iterdir():
        path.unlink()
    store.save_sweep(digest="00000001", resolved={"name": "old"}, keys=[row["key"] for row in rows])
    store.save_sweep(digest="00000002", resolved={"name": "new"}, keys=[row["key"] for row in later])
    frames = load(root)
    assert set(frames.cells["key"]) == {row["key"] for row in later}
    assert frames.num_superseded == len(rows)


def test_nothing_is_said_to_diverge_that_did_not(tmp_path: Path) -> None:
    rows = [row for row in make_rows(seeds=SEEDS) if row["method"] != "vanilla" or row["step"] != LAST]
    frames = load(make_store(tmp_path, rows))
    setting = frames.settings()[0]
    text = sentence(frames, setting, summary(frames, setting))
    assert f"vanilla has no cell at step {LAST} yet" in text and "without divergence" not in text
    assert at_equal_gain(frames, setting, ("vanilla", "layer_causal"))["B"]["vanilla"].reasons.total() == 0, "no draw has a cell"
    burnt = [diverged(row) if row["method"] == "vanilla" else row for row in make_rows(seeds=SEEDS)]
    frames = load(make_store(tmp_path / "burnt", burnt))
    setting = frames.settings()[0]
    assert "vanilla has no learning rate without divergence" in sentence(frames, setting, summary(frames, setting))
    assert set(at_equal_gain(frames, setting, ("vanilla", "layer_causal"))["B"]["vanilla"].reasons) == {"diverged"}


def test_a_gain_is_not_taken_across_a_learning_rate_that_a_draw_lacks(tmp_path: Path) -> None:
    rates = {"vanilla": (1e-3, 1e-2, 1e-1), "layer_causal": (1e-3, 1e-2, 1e-1)}
    losses = {1e-3: 0.65, 1e-2: 0.3, 1e-1: 0.1}
    rows = make_rows(seeds=SEEDS, rates=rates)
    for number, row in enumerate(rows):
        rows[number] = row = undiverged(row)
        for fold in row["folds"]:
            fold["nll_label"] = losses.get(row["learning_rate"], 0.7)
    whole = load(make_store(tmp_path, rows))
    terms = at_equal_gain(whole, whole.settings()[0], ("vanilla", "layer_causal"))["B"]["vanilla"].terms
    share = (0.3 - 0.05) / (0.4 - 0.05)  # half of the largest gain, .6, between those of 1e-3 and 1e-2
    assert terms.groupby("draw")["weight"].apply(sorted).tolist() == [pytest.approx([1 - share, share])] * 3
    gap = [row for row in rows if (row["method"], row["learning_rate"], row["step"], row["seed"]) != ("vanilla", 1e-2, LAST, 2)]
    frames = load(make_store(tmp_path / "gap", gap))
    found = at_equal_gain(frames, frames.settings()[0], ("vanilla", "layer_causal"))["B"]["vanilla"]
    assert set(found.terms["draw"]) == {"/1/0", "/3/0"} and dict(found.reasons) == {"missing": 1}, "the others are compared as if it were not there"


def test_what_controls_are_there_is_said_rightly(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS)
    for row in rows:
        if row["kind"] == "finetuned" and row["status"] == "done":
            row["measures"] = [measure("control", name, "sim_aou", 0.1, layer=0, fold=fold) for name in ("separator", "centred") for fold in ("A", "B", "all")]
    (found,) = verdict.findings(load(make_store(tmp_path, rows)))
    text = " ".join(verdict.paragraph(found))
    assert "Control contexts: separator; none that shows ICL with other demonstrations" in text and "No control context was captured" not in text
    for row in rows:
        row["measures"] = [measure for measure in row["measures"] or () if measure["name"] == "centred"]
    (found,) = verdict.findings(load(make_store(tmp_path / "none", rows)))
    assert "No control context was captured" in " ".join(verdict.paragraph(found))


def test_two_methods_of_ones_own_have_two_colours() -> None:
    own = ["adam", "signed", "wide"]
    assert len({colour(method, own) for method in (*own, *COLOURS)}) == len(own) + len(COLOURS)


def test_a_figure_of_fewer_draws_than_its_row_says_how_many(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS)
    for row in rows:
        if (row["method"], row["learning_rate"], row["step"], row["seed"]) == ("layer_causal", RATES["layer_causal"][0], LAST, 2):
            row["sim_aou"] = None
    frames = load(make_store(tmp_path, rows))
    setting = frames.settings()[0]
    (line,) = [line for line in display(frames, setting, summary(frames, setting)) if line[:3] == ["layer_causal", "1e-4", str(LAST)]]
    assert line[3] == "3/3" and [entry for entry in line if entry.endswith(" (2)")] == [line[7]]
    assert not any(" (0)" in entry for entry in line) and NULL not in line[7]


def test_draws_are_planned_for_what_a_sweep_trains_on(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS)
    rows += [changed(row, train_on="other_task") for row in rows if row["kind"] == "finetuned" and row["seed"] == 1]
    root = make_store(tmp_path, rows)
    sweep: Row = {
        "name": "made_up",
        "tasks": ["trec"],
        "models": [{"source": rows[0]["model_source"]}],
        "num_demonstrations": [4],
        "num_queries": 24,
        "query_seed": 1,
    }
    sweep |= {"seeds": [1, 2, 3, 4, 5], "orders": 1, "protocol": {"separator": "newline"}}
    Store(root).save_sweep(digest="00000002", resolved=sweep, keys=[row["key"] for row in rows])
    Store(root).save_sweep(
        digest="00000003", resolved=sweep | {"seeds": [1], "controls": {"train_on": ["other_task"]}, "analysis": {"matched_ratio": 0.25}}, keys=[rows[0]["key"]]
    )
    true, other = load(root).settings()
    assert (true.num_draws, other.num_draws) == (5, 1)
    assert (true.num_planned("icl"), other.num_planned("icl")) == (5, 3)
    assert (true.matched_ratio, other.matched_ratio) == (0.5, 0.25)
    cell = load(root).finetuned.iloc[0]
    assert planned_draws(sweep, cell) and not planned_draws(sweep, cell, "random_labels")
