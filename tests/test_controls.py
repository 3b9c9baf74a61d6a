"""Controls, equal size, protocols, own metrics and pairs: tables of hand-made stores, every number recomputed here with plain loops."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from iclgd_analysis import controls, equal_size, load, measures, protocol_effects
from iclgd_analysis.load import Frames, planned_draws
from iclgd_analysis.report import write_report
from iclgd_analysis.setting import protocol_name

from iclgd_dist.store import Store
from tests.made import (
    LAST,
    STEPS,
    Row,
    changed,
    diverged,
    estimate_of,
    make_cell,
    make_rows,
    make_store,
    measure,
    only,
    protocol,
    setting_of,
    t_interval,
    untrained,
)

SEEDS = (1, 2, 3)

# --- Controls

CONTROLS = {"other_draw": 0.9, "other_task": 0.5, "shuffled_words": 0.45, "separator": 0.2, "centred": 0.1}


def controlled(rows: list[Row]) -> list[Row]:
    """Add controls: layer 0 and 1 with a mean that depends on cell and control, one undefined layer, other folds elsewhere."""
    for row in rows:
        if row["kind"] == "zero_shot" or row["status"] == "diverged":
            continue
        row["measures"] = []
        for name, level in CONTROLS.items():
            # in seed 1 other_task is the largest of the empty contexts, in the others shuffled_words
            value = level + 0.01 * row["seed"] + (0.1 * (row["seed"] - 1) if name == "shuffled_words" else 0.0)
            value *= 1.0 if row["kind"] == "icl" else 0.1
            for fold, shift in (("all", 0.0), ("A", 0.5), ("B", 0.03)):
                for layer, wave in ((0, 0.04), (1, -0.04), (2, None)):
                    row["measures"].append(measure("control", name, "sim_aou", None if wave is None else value + wave + shift, layer=layer, fold=fold))
        if row["kind"] == "finetuned":
            row["measures"] += [
                measure("control", f"random_delta_{draw}", metric, value, layer=0, fold=fold)
                for draw in range(3)
                for metric, value in (("sim_aou", 0.02 * draw + 0.01 * row["seed"]), ("update_ratio", row["update_ratio"] * 1.02))
                for fold in ("A", "B", "all")
            ]
    return rows


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Frames, Path]:
    rows = controlled(make_rows(seeds=SEEDS))
    rows += [
        changed(row, train_on="random_labels", sim_aou=row["sim_aou"] / 2, update_ratio=row["update_ratio"] * 1.5, measures=[])
        for row in rows
        if row["kind"] == "finetuned" and row["layers"]
    ]
    root = make_store(tmp_path_factory.mktemp("held"), rows)
    return rows, load(root), root


def test_a_context_is_compared_with_icl_over_layers_then_seeds(held: tuple[list[Row], Frames, Path]) -> None:
    _, frames, _ = held
    table = controls.data(frames, setting_of(frames, train_on="true"))
    for name in ("other_draw", "separator"):
        line = only(table, method="icl", metric="sim_aou", against=name)
        assert estimate_of(line) == pytest.approx(t_interval([CONTROLS[name] + 0.01 * seed for seed in SEEDS]))
        assert (line["num_used"], line["num_planned"]) == (3, 3)


def test_a_finetuned_cell_is_compared_with_each_control_on_its_own_fold(held: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = held
    table = controls.data(frames, setting_of(frames, train_on="true"))
    near = only(table, method="layer_causal", choice="nearest R*", metric="sim_aou", against="other_task")
    assert (near["learning_rates"], near["fold"]) == ("1e-3", "all")
    assert estimate_of(near) == pytest.approx(t_interval([0.1 * (0.5 + 0.01 * seed) for seed in SEEDS]))
    selected = only(table, method="layer_causal", choice="selected", metric="sim_aou", against="other_task")
    assert selected["fold"] == "A and B"
    assert estimate_of(selected) == pytest.approx(t_interval([0.1 * (0.5 + 0.01 * seed) + (0.5 + 0.03) / 2 for seed in SEEDS]))  # mean of both folds
    same = {r["seed"]: r for r in rows if (r["method"], r["learning_rate"], r["step"], r["train_on"]) == ("layer_causal", 1e-3, LAST, "true")}
    icl = only(table, method="layer_causal", choice="nearest R*", metric="sim_aou", against="in-context")
    assert icl["mean"] == pytest.approx(sum(r["sim_aou"] for r in same.values()) / 3)
    assert icl["R"] == pytest.approx(math.prod(r["update_ratio"] for r in same.values()) ** (1 / 3))
    variant = only(table, method="layer_causal", choice="nearest R*", metric="sim_aou", against="trained on random_labels")
    assert variant["mean"] == pytest.approx(icl["mean"] / 2) and variant["R"] == pytest.approx(1.5 * icl["R"])
    random = only(table, method="layer_causal", choice="nearest R*", metric="sim_aou", against="random_delta")
    assert estimate_of(random) == pytest.approx(t_interval([0.02 + 0.01 * seed for seed in SEEDS]))
    assert random["R"] == pytest.approx(icl["R"] * 1.02)


def test_what_is_specific_to_the_task_is_above_the_largest_empty_context_of_each_seed(held: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = held
    line = only(controls.data(frames, setting_of(frames, train_on="true")), method="vanilla", choice="nearest R*", metric="sim_aou", against="task_specific")
    gaps, queries = [], []
    for seed in SEEDS:
        cell = next(r for r in rows if (r["method"], r["learning_rate"], r["step"], r["seed"], r["train_on"]) == ("vanilla", 1e-2, LAST, seed, "true"))
        largest = 0.1 * max(0.5 + 0.01 * seed, 0.45 + 0.01 * seed + 0.1 * (seed - 1))
        gaps.append(cell["sim_aou"] - largest)
        queries.append([query["sim_aou"] for query in cell["examples"]])
    assert line["learning_rates"] == "1e-2"
    of_queries = np.var(np.mean(queries, axis=0), ddof=1) / 24 + 0.1**2 / 24  # ICL's figures, and a context's as if independent of them
    assert estimate_of(line) == pytest.approx(t_interval(gaps, of_queries))


def test_without_one_of_the_empty_contexts_nothing_is_said_of_the_task(tmp_path: Path) -> None:
    rows = controlled(make_rows(seeds=SEEDS))
    for row in rows:
        row["measures"] = [m for m in row["measures"] or [] if m["name"] != "separator" or row["seed"] == 2]
    frames = load(make_store(tmp_path, rows))
    table = controls.data(frames, frames.settings()[0])
    line = only(table, method="vanilla", choice="nearest R*", metric="sim_aou", against="task_specific")
    assert (line["num_used"], line["num_planned"]) == (1, 3)
    assert math.isnan(line["lower"])


def test_seeds_held_against_different_other_tasks_all_count(tmp_path: Path) -> None:
    """An edited control_task: the contexts of seed 1 are of one task, those of the others of another."""
    rows = controlled(make_rows(seeds=SEEDS))
    for row in rows:
        task = "other_task:trec" if row["seed"] == 1 else "other_task:subj"
        row["measures"] = [measure | {"name": task if measure["name"] == "other_task" else measure["name"]} for measure in row["measures"] or ()]
    frames = load(make_store(tmp_path, rows))
    table = controls.data(frames, frames.settings()[0])
    assert only(table, method="vanilla", choice="nearest R*", metric="sim_aou", against="task_specific")["num_used"] == 3


def test_random_weights_that_were_not_matched_have_no_part_in_the_size_shown(tmp_path: Path) -> None:
    rows = controlled(make_rows(seeds=SEEDS))
    for row in rows:
        for each in row["measures"] or ():
            if each["name"] == "random_delta_2":
                each["mean"] = 0.001 if each["metric"] == "update_ratio" else None
    frames = load(make_store(tmp_path, rows))
    table = controls.data(frames, frames.settings()[0])
    near = {name: only(table, method="layer_causal", choice="nearest R*", metric="sim_aou", against=name) for name in ("in-context", "random_delta")}
    assert near["random_delta"]["R"] == pytest.approx(1.02 * near["in-context"]["R"])


# --- Layers of measures


@pytest.mark.parametrize(("first_layer", "expected"), [("skip", 0.3), ("count", 0.2)])
def test_layer_0_of_a_score_change_counts_only_where_the_protocol_says_so(tmp_path: Path, first_layer: str, expected: float) -> None:
    row = make_cell("finetuned", task="trec", seed=1, skill=0.5, method="vanilla", learning_rate=1e-2, step=4)
    row["protocol"] = json.dumps({"preset": "clean", "sink": "auto", "separator": "newline", "record_position": "last_prompt", "first_layer": first_layer})
    row["measures"] = [measure("control", "separator", "sim_am_delta", value, layer=layer) for layer, value in ((0, 0.0), (1, 0.2), (2, 0.4))]
    row["measures"] += [measure("pair", "f" * 64, "alpha", value, layer=layer) for layer, value in ((0, 0.0), (1, 0.2), (2, 0.4))]
    row["measures"] += [measure("control", "separator", "sim_aou", value, layer=layer) for layer, value in ((0, 0.0), (1, 0.2), (2, 0.4))]
    row["measures"] += [measure("metric", "1", "overlap", 0.7), measure("control", "separator", "update_ratio", 4.0, layer=0)]
    row["measures"] += [measure("control", "separator", "update_ratio", 1.0, layer=1)]
    frames = load(make_store(tmp_path, [row]))
    assert frames.measured(frames.controls, "sim_am_delta").tolist() == [pytest.approx(expected)]
    assert frames.measured(frames.pairs, "alpha").tolist() == [pytest.approx(expected)]
    assert frames.measured(frames.controls, "sim_aou").tolist() == [pytest.approx(0.2)]
    assert frames.measured(frames.metrics, "overlap").to_dict() == {(row["key"], "1"): 0.7}
    assert frames.measured(frames.controls, "update_ratio").tolist() == [pytest.approx(2.0)]  # geometric


# --- Own metrics and pairs


def test_own_metrics_and_pairs_are_means_over_draws_at_the_largest_step(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS)
    done = {(r["method"], r["learning_rate"], r["step"], r["seed"]): r for r in rows if r["kind"] == "finetuned" and r["status"] == "done"}
    for (method, learning_rate, step, seed), row in done.items():
        row["measures"] = [*(row["measures"] or []), *(measure("metric", "2", "overlap", learning_rate + seed + step, layer=layer) for layer in (0, 1))]
        other = done.get(("layer_causal", learning_rate, step, seed))
        if method == "vanilla" and other:
            holder, partner = (other, row) if seed == 2 else (row, other)  # either of the two holds what compares them
            holder["measures"] = [
                *(holder["measures"] or []),
                measure("pair", partner["key"], "alpha", learning_rate * 10 + seed, layer=1),
                measure("pair", partner["key"], "alpha", 1.0, layer=0),
            ]
    frames = load(make_store(tmp_path, rows))
    setting = frames.settings()[0]
    table = measures.data(frames, setting)
    line = only(table, metric="overlap", method="layer_causal", learning_rate=1e-3)
    assert estimate_of(line) == pytest.approx(t_interval([1e-3 + seed + LAST for seed in SEEDS]))
    pair = only(table, metric="alpha", learning_rate=1e-3)
    assert (pair["method"], pair["learning_rates"], pair["num_used"], pair["num_planned"]) == ("vanilla and layer_causal", "1e-3", 3, 3)
    assert estimate_of(pair) == pytest.approx(t_interval([1e-2 + seed for seed in SEEDS]))
    titles = [grid.title.split(":")[0] for grid in measures.grids(setting, table)]
    assert titles == ["overlap, version 2", "alpha of two methods"]
    page = write_report(tmp_path).read_text()
    assert "alpha of two methods: trec" in page


def test_names_of_metrics_and_controls_are_escaped(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>"
    rows = make_rows()
    for row in rows:
        if row["kind"] == "finetuned" and row["status"] == "done":
            row["measures"] = [measure("metric", bad, bad, 0.5), *(measure("control", bad, "sim_aou", 0.5, layer=0, fold=fold) for fold in ("B", "all"))]
    page = write_report(make_store(tmp_path, rows)).read_text()
    assert page.count("&lt;img src=x onerror") > 3
    assert "<img src=x" not in page


def test_one_name_with_two_sets_of_options_is_two_methods(tmp_path: Path) -> None:
    rows = [row for row in make_rows(seeds=SEEDS) if row["method"] != "layer_causal"]
    cell = next(row for row in rows if row["kind"] == "finetuned" and row["status"] == "done")
    rows += [changed(cell, method="mine", method_options=json.dumps({"base": "vanilla", "weights": weights})) for weights in ("attn_v", "mlp")]
    rows.append(changed(cell, method="other", method_options=json.dumps({"base": "vanilla", "rank": 4})))
    setting = load(make_store(tmp_path, rows)).settings()[0]
    assert setting.methods == ["vanilla", "mine (base vanilla, weights attn_v)", "mine (base vanilla, weights mlp)", "other"]
    assert "other: base vanilla, rank 4." in setting.caption


# --- Protocols


def test_a_protocol_is_named_by_its_preset_or_by_what_differs_from_clean() -> None:
    assert protocol_name(protocol()) == "clean"
    assert protocol_name(protocol(sink_token="</s>")) == "clean"
    assert protocol_name(protocol(separator="eos")) == "separator = eos"
    assert protocol_name(protocol(preset="reference", separator="eos", first_layer="count")) == "reference"


def test_a_protocol_moves_what_it_moves_in_the_cells_of_the_same_seed(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS, tasks=("trec", "subj"))
    other = []
    for row in rows:
        moved = changed(row, protocol=protocol(separator="eos"))
        if row["kind"] == "finetuned" and row["status"] == "done" and row["step"] == LAST:
            moved["sim_aou_norm"] = row["sim_aou_norm"] + 0.05 + 0.01 * row["seed"]
            shift = 0.03 if row["task"] == "trec" else -0.01
            moved["examples"] = [query | {"sim_aou_norm": query["sim_aou_norm"] + shift * (i % 2)} for i, query in enumerate(row["examples"])]
            if row["learning_rate"] == 1e-3 and row["method"] == "vanilla" and row["seed"] == 3:
                moved = diverged(moved)
        other.append(moved)
    make_store(tmp_path / "clean", rows)
    make_store(tmp_path / "eos", [*other, rows[0], rows[1]])
    together = load(tmp_path / "clean", tmp_path / "eos")
    assert len(together.cells) == len(rows) + len(other)  # the two cells that both stores hold count once
    assert len(together.layers) == sum(len(row["layers"]) for row in rows + other)
    table = protocol_effects.data(together)
    place = {"method": "layer_causal", "learning_rate": 1e-3, "step": LAST, "metric": "sim_aou_norm"}
    line = only(table, task="trec", **place)
    queries = np.array([0.03 * (i % 2) for i in range(24)])
    expected = t_interval([0.05 + 0.01 * seed for seed in SEEDS], float(np.var(queries, ddof=1)) / 24)
    assert estimate_of(line) == pytest.approx(expected)
    assert line["protocol"] == "separator = eos"
    same = [r["sim_aou_norm"] for r in rows if (r["task"], r["method"], r["learning_rate"], r["step"]) == ("trec", "layer_causal", 1e-3, LAST)]
    assert line["clean"] == pytest.approx(sum(same) / 3)
    partial = only(table, task="trec", **place | {"method": "vanilla"})
    assert (partial["num_used"], partial["num_planned"]) == (2, 3)
    assert partial["mean"] == pytest.approx(0.065)
    assert only(table, task="all tasks", **place)["signs"] == "above 0 in 2 of 2 tasks"
    assert set(table.loc[table["metric"] == "sim_am_delta", "mean"].dropna().round(9)) == {0.0}
    done = subprocess.run(
        [sys.executable, "-m", "iclgd_analysis.protocol_effects", str(tmp_path / "clean"), str(tmp_path / "eos")], capture_output=True, text=True, check=True
    )
    assert "separator = eos" in done.stdout
    assert "What the protocol moves: all tasks" in done.stdout


def test_of_two_sets_of_queries_the_larger_one_counts_and_the_reasons_of_all_tasks_add_up(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS, tasks=("trec", "subj"))
    for row in rows:
        if row["update_ratio"] and (row["task"] == "trec" or (row["seed"], row["method"]) == (1, "vanilla")):
            row["update_ratio"] /= 1000  # never comes up to R*; the largest learning rate of vanilla diverged, that of layer_causal did not
    rows += untrained([row for row in rows if row["seed"] in (None, 1)], init_seed=0)
    half = [changed(row, num_queries=row["num_queries"] // 2) for row in rows if row["task"] == "subj"]  # the same draws on fewer queries
    eos = [changed(row, protocol=protocol(separator="eos")) for row in (*rows, *half)]
    frames = load(make_store(tmp_path, [*rows, *half, *eos]))
    line = only(equal_size.data(frames), task="all tasks", init="trained", metric="sim_aou", protocol="clean", matched_ratio=0.5)
    assert line["reasons"] == "above_range 3, diverged 4"  # of 3 draws of trec and 1 of subj
    assert (line["num_used"], line["num_planned"]) == (2, 2 * len(SEEDS))
    table = protocol_effects.data(frames)
    place = {"method": "layer_causal", "learning_rate": 1e-3, "step": LAST, "metric": "sim_aou_norm", "init": "trained"}
    assert only(table, task="all tasks", **place)["num_planned"] == 2 * len(SEEDS)
    assert only(table, task="subj", **place)["num_planned"] == len(SEEDS)


def test_two_protocols_with_other_queries_add_up_what_the_queries_vary_on_both_sides(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS)
    other = []
    for row in rows:
        queries = [query | {"query": f"other {query['query']}", "sim_aou_norm": (query["sim_aou_norm"] or 0.0) * 2} for query in row["examples"]]
        moved = changed(row, protocol=protocol(query_draw="shuffled")) | {"examples": queries}
        if row["kind"] == "finetuned" and row["status"] == "done":
            moved["sim_aou_norm"] = row["sim_aou_norm"] + 0.01 * row["seed"]
        other.append(moved)
    table = protocol_effects.data(load(make_store(tmp_path, rows + other)))
    place = {"method": "layer_causal", "learning_rate": 1e-3, "step": LAST}
    line = only(table, **place, metric="sim_aou_norm")
    shared = 0.0
    for side in (rows, other):
        cells = [row for row in side if all(row[name] == value for name, value in place.items())]
        per_query = np.mean([[query["sim_aou_norm"] for query in row["examples"]] for row in cells], axis=0)
        shared += float(np.var(per_query, ddof=1)) / 24
    assert shared > 0
    assert estimate_of(line) == pytest.approx(t_interval([0.01 * seed for seed in SEEDS], shared))


def test_a_query_that_one_protocol_leaves_undefined_leaves_the_others_paired(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS)
    other = [changed(row, protocol=protocol(undefined="eps")) for row in rows]
    for row in rows:
        if row["kind"] == "finetuned" and row["status"] == "done":
            row["examples"] = [query | {"sim_aou_norm": None if number == 3 else query["sim_aou_norm"]} for number, query in enumerate(row["examples"])]
    table = protocol_effects.data(load(make_store(tmp_path, rows + other)))
    line = only(table, method="layer_causal", learning_rate=1e-3, step=LAST, metric="sim_aou_norm")
    assert estimate_of(line) == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)  # every query that both define is the same


def test_what_a_later_store_measured_of_the_same_cells_is_read_too(tmp_path: Path) -> None:
    (row, *_) = [row for row in make_rows(seeds=(1,)) if row["kind"] == "finetuned" and row["status"] == "done"]
    early, late = measure("control", "separator", "sim_aou", 0.1, layer=0), measure("control", "other_draw", "sim_aou", 0.2, layer=0)
    make_store(tmp_path / "a", [row | {"measures": [early]}])
    make_store(tmp_path / "b", [row | {"measures": [early | {"mean": 0.9}, late]}])
    for order in (("a", "b"), ("b", "a")):
        controls = load(*(tmp_path / name for name in order)).controls
        assert dict(zip(controls["control"], controls["mean"], strict=True)) == {"separator": 0.1 if order[0] == "a" else 0.9, "other_draw": 0.2}


def test_a_store_with_contexts_and_no_trained_cell_yet_has_a_page(tmp_path: Path) -> None:
    rows = controlled(make_rows(seeds=SEEDS))
    for name, kept in {
        "begun": [row for row in rows if row["kind"] != "finetuned"],
        "burnt": [diverged(r) if r["kind"] == "finetuned" else r for r in rows],
    }.items():
        text = write_report(make_store(tmp_path / name, kept)).read_text()
        assert "<h3>Controls: trec" in text and "nan" not in text.split("<nav")[0]


def test_what_two_methods_measure_stands_at_the_last_step_of_each(tmp_path: Path) -> None:
    rows = [row for row in make_rows(seeds=SEEDS) if row["method"] != "layer_causal" or row["step"] == STEPS[0]]
    for row in rows:
        if row["method"] == "layer_causal":  # half as many updates as vanilla
            row |= {"method_options": json.dumps({"base": "layer_causal", "batch_size": 2}), "measures": [measure("metric", "1", "moved", 0.25)]}
    frames = load(make_store(tmp_path, rows))
    table = measures.data(frames, frames.settings()[0])
    assert set(table["method"]) == {"layer_causal"} and set(table["mean"]) == {0.25}


def test_what_a_search_judged_on_fold_a_is_told_where_a_grid_asks_for_it(tmp_path: Path) -> None:
    rows = make_rows()
    found = [row for row in rows if row["kind"] == "finetuned"][:2]
    for row in found:
        row["origin"] = "search"
    root = make_store(tmp_path, rows)
    assert "2 cells found by a search are left out" in write_report(root).read_text()
    Store(root).save_sweep(digest="00000001", resolved={"name": "grid"}, keys=[row["key"] for row in found])
    text = write_report(root).read_text()
    assert "2 cells of the grid were found by a search, which judged them on fold A" in text and "are left out of every mean" not in text


# --- What is planned, and the page


def test_planned_draws_are_those_of_the_sweeps_that_plan_the_setting() -> None:
    cell = pd.Series({"task": "trec", "model_source": "m", "protocol": protocol(), "num_demonstrations": 4, "num_queries": 24, "query_seed": 1})
    cell = pd.concat([cell, pd.Series({"init": "trained", "init_scheme": None, "sweep": "s"})])
    sweep: Row = {"name": "s", "tasks": ["trec"], "models": [{"source": "m"}], "num_demonstrations": [4, 8], "num_queries": 24, "query_seed": 1}
    sweep |= {"seeds": [1, 2], "orders": 2, "protocol": {"preset": "clean", "separator": "newline"}}
    assert planned_draws(sweep, cell) == {"/1/0", "/1/1", "/2/0", "/2/1"}
    runs = sweep | {"runs": [[5, 0], [6, 1]], "seeds": [], "per_task": {"subj": {"runs": [[1, 0]]}}}
    assert planned_draws(runs, cell) == {"/5/0", "/6/1"}
    assert planned_draws(runs | {"per_task": {"trec": {"runs": [[9, 2]]}}}, cell) == {"/9/2"}
    assert planned_draws(runs | {"per_task": {"trec": {"runs": None}}}, cell) == {"/5/0", "/6/1"}
    anew = {"source": "m", "init": "norms", "init_scheme": "model", "init_seeds": [7, 8]}
    assert planned_draws(runs | {"models": [{"source": "m"}, anew]}, cell) == {"/5/0", "/6/1"}
    random = cell.copy()
    random["init"], random["init_scheme"] = "norms", "model"
    assert planned_draws(runs | {"models": [{"source": "m"}, anew]}, random) == {"7/5/0", "7/6/1", "8/5/0", "8/6/1"}
    assert planned_draws(runs | {"models": [anew | {"init_scheme": "fairseq"}]}, random) == set()
    for other in ({"tasks": ["subj"]}, {"num_queries": 12}, {"query_seed": 2}, {"num_demonstrations": [8]}, {"protocol": {"separator": "eos"}}):
        assert planned_draws(sweep | other, cell) == set()
    assert planned_draws(sweep | {"num_queries": 99}, cell) == planned_draws(sweep, cell)  # the task has no more
    assert planned_draws(sweep | {"num_queries": 99, "name": "another"}, cell) == set()


def test_the_page_has_tables_of_what_the_store_holds_and_no_others(held: tuple[list[Row], Frames, Path]) -> None:
    page = write_report(held[2]).read_text()
    assert page.count("<h3>Controls: trec, Tiny-135M-Instruct.Q4_1, k = 4</h3>") == 1
    assert "no control context" not in page
    assert "Descriptive: some means are over 3 seeds, fewer than 5" in page
    assert "What the protocol moves" not in page
    assert (held[2] / "figures" / "controls.csv").exists()
