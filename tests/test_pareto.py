"""The Pareto front: hand-made stores, every point recomputed here with plain loops."""

from __future__ import annotations

import math
import random
from pathlib import Path

import numpy as np
import pytest
from iclgd_analysis import load, pareto, ratio, table

from tests.made import LAST, RATES, STEPS, Row, diverged, json_of, make_rows, make_store


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
