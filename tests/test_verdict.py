"""The verdict on made-up stores whose answer is known, its figures recomputed with plain loops, and the coverage of the intervals it rests on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from iclgd_analysis import forest, load, verdict
from iclgd_analysis.intervals import estimate, over_tasks
from iclgd_analysis.report import lead
from scipy import stats

from iclgd_dist.store import Store
from tests.made import Row, changed, diverged, json_of, make_cell, make_rows, make_store

TASKS, SEEDS, STEP = ("trec", "subj"), (1, 2, 3, 4, 5), 4
RATES = {"vanilla": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "layer_causal": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
SIZES = (0.1, 0.25, 0.45, 0.8, 1.4)  # R along the learning rates
GAINS = (0.05, 0.15, 0.25, 0.2, -0.1)  # how much each improves nll_label
ZERO_SHOT = 0.7


def world(
    root: Path,
    *,
    closer: float,
    empty: float = 0.02,
    noise: float = 0.004,
    icl_skill: float = 0.9,
    diverges: Callable[[str, int, int], bool] = lambda method, rank, seed: False,
    gains: Callable[[str, int], float] = lambda method, rank: GAINS[rank],
) -> tuple[list[Row], Path]:
    """Make a store in which layer-causal's sim_aou is `closer` above vanilla's at every size, and contexts that teach nothing score `empty` with layer-causal."""
    chance = np.random.default_rng(7)
    rows: list[Row] = []
    for task in TASKS:
        base = make_cell("zero_shot", task=task, seed=None, skill=0.2)
        rows.append(with_figures(base, nll=np.full(24, ZERO_SHOT)))
        query = chance.normal(0, 0.02, 24)
        for seed in SEEDS:
            of_seed = chance.normal(0, noise)
            rows.append(with_figures(make_cell("icl", task=task, seed=seed, skill=icl_skill), nll=np.full(24, 0.4)))
            rows[-1]["measures"] = controls(other_draw=0.95, other_task=0.6, shuffled_words=0.4, separator=0.2)
            for method, rates in RATES.items():
                for rank, rate in enumerate(rates):
                    row = make_cell("finetuned", task=task, seed=seed, skill=0.7, method=method, learning_rate=rate, step=STEP, size=SIZES[rank])
                    level = 0.1 + 0.1 * SIZES[rank] + (closer + of_seed if method == "layer_causal" else 0.0)
                    similar = level + query + chance.normal(0, 0.01, 24)
                    row = with_figures(row, nll=ZERO_SHOT - gains(method, rank) + chance.normal(0, 0.01, 24), sim_aou=similar)
                    row["measures"] = controls(other_task=empty, shuffled_words=empty / 2, separator=empty / 4)
                    rows.append(diverged(row) if diverges(method, rank, seed) else row)
    return rows, make_store(root, rows)


def controls(**levels: float) -> list[Row]:
    return [
        {"kind": "control", "name": name, "metric": "sim_aou", "layer": 0, "fold": fold, "n": 24, "mean": level, "sd": 0.1}
        for name, level in levels.items()
        for fold in ("A", "B", "all")
    ]


def with_figures(row: Row, *, nll: np.ndarray, sim_aou: np.ndarray | None = None) -> Row:
    """Give each query its figures, and folds, layers and the row their means."""
    folds = np.array([query["fold"] for query in row["examples"]])
    for number, query in enumerate(row["examples"]):
        query |= {"nll_label": float(nll[number])} | ({} if sim_aou is None else {"sim_aou": float(sim_aou[number])})
    row["nll_label"] = float(nll.mean())
    for fold in row["folds"]:
        fold["nll_label"] = float(nll[folds == fold["fold"]].mean())
    if sim_aou is not None:
        row["sim_aou"] = float(sim_aou.mean())
        for layer in row["layers"]:
            layer["sim_aou"] = float(sim_aou[folds == layer["fold"]].mean() if layer["fold"] != "all" else sim_aou.mean())
    return row


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({"closer": 0.06}, "closer"),
        ({"closer": 0.06, "empty": 0.5}, "closer, but not task-specific"),
        ({"closer": 0.0, "noise": 0.001}, "not closer"),
        ({"closer": -0.06}, "further"),
        ({"closer": 0.01, "noise": 0.1}, "undecided"),
        ({"closer": 0.06, "diverges": lambda method, rank, seed: rank == 4}, "closer"),
    ],
)
def test_the_verdict_is_that_of_the_world_it_was_made_from(tmp_path: Path, made: dict[str, Any], expected: str) -> None:
    _, root = world(tmp_path, **made)
    (found,) = verdict.findings(load(root))
    assert found.verdict == expected
    said = " ".join(verdict.paragraph(found))
    assert f"layer-causal finetuning is {verdict.IN_WORDS[expected]}: sim_aou" in said
    assert "Undecided, as it takes both differences" not in said  # where it is undecided, neither alone says more
    assert "On subj, trec (5 seeds), Tiny-135M-Instruct.Q4_1" in said and "Descriptive" not in said
    assert "ICL with other demonstrations 0.950, with another task's 0.600" in said


def test_what_never_improves_or_diverges_is_said_and_decides_nothing(tmp_path: Path) -> None:
    never = world(tmp_path / "a", closer=0.06, gains=lambda method, rank: -0.1 if method == "vanilla" else GAINS[rank])[1]
    (found,) = verdict.findings(load(never))
    assert found.verdict == "undecided" and math.isnan(found.gain.mean.mean)
    assert "at equal improvement no draw could be compared. Undecided, as it takes both differences: " in " ".join(verdict.paragraph(found))
    assert "at equal size alone it would be closer, at equal improvement alone undecided." in " ".join(verdict.paragraph(found))
    assert "(vanilla: 20 x no learning rate improves on zero-shot)" in " ".join(verdict.paragraph(found))
    burnt = world(tmp_path / "b", closer=0.06, diverges=lambda method, rank, seed: rank >= 3)[1]
    (found,) = verdict.findings(load(burnt))
    assert found.verdict == "undecided" and found.norm.mean.used == 0 and found.norm.reasons["vanilla"]["diverged"] == 2 * 5
    assert "Draws used: 0 of 10 at equal size (vanilla: 10 x diverged before it; layer_causal: 10 x diverged before it)" in " ".join(verdict.paragraph(found))


def test_differences_over_different_tasks_decide_nothing_together(tmp_path: Path) -> None:
    """Vanilla never improves in one task: at equal improvement the other task alone speaks, and not for both."""
    rows, _ = world(tmp_path / "whole", closer=0.06)
    for row in rows:
        if (row["task"], row["method"]) == ("subj", "vanilla"):
            row |= with_figures(row, nll=np.full(24, ZERO_SHOT + 0.1))
    (found,) = verdict.findings(load(make_store(tmp_path / "one", rows)))
    assert found.norm.with_value == ["subj", "trec"] and found.gain.with_value == ["trec"]
    assert found.norm.mean.lower > 0.02 and found.gain.mean.lower > 0.02 and found.verdict == "undecided"
    said = " ".join(verdict.paragraph(found))
    assert "Undecided, as it takes both differences over the same tasks: at equal size alone it would be closer, at equal improvement alone closer." in said


def test_what_else_was_trained_on_stands_beside_the_true_demonstrations(tmp_path: Path) -> None:
    rows, _ = world(tmp_path / "whole", closer=0.06)
    level = {"random_labels": 0.3, "shuffled_words": 0.2}
    rows += [
        changed(row, train_on=name, sim_aou=at + (0.1 if row["task"] == "subj" else 0.0), measures=[])
        for name, at in level.items()
        for row in rows
        if row["kind"] == "finetuned"
    ]
    frames = load(make_store(tmp_path / "more", rows))
    (found,) = verdict.findings(frames)
    near = {"vanilla": 1e-2, "layer_causal": 1e-3}  # R .45
    true = {
        m: np.mean([row["sim_aou"] for row in rows if (row["method"], row["learning_rate"], row["train_on"]) == (m, rate, "true")]) for m, rate in near.items()
    }
    for method, of in found.trained_on.items():
        assert {name: one.mean.mean for name, one in of.items()} == pytest.approx({"true": true[method], "random_labels": 0.35, "shuffled_words": 0.25})
    said = " ".join(verdict.paragraph(found))
    assert (
        f"layer_causal true {true['layer_causal']:.3f}, random_labels 0.350, shuffled_words 0.250; vanilla true {true['vanilla']:.3f}, random_labels 0.350"
        in said
    )
    assert "trained on" not in " ".join(verdict.paragraph(verdict.findings(load(tmp_path / "whole"))[0]))


def test_each_method_stands_beside_random_weights_of_its_own_effect(tmp_path: Path) -> None:
    rows, _ = world(tmp_path / "whole", closer=0.06)
    level = {"vanilla": 0.2, "layer_causal": 0.1}
    for row in rows:
        if row["kind"] == "finetuned":
            row["measures"] += controls(**{f"random_delta_{draw}": level[row["method"]] + 0.02 * (draw - 1) for draw in range(3)})
    (found,) = verdict.findings(load(make_store(tmp_path / "more", rows)))
    said = "For scale: ICL with other demonstrations 0.950, with another task's 0.600, random weights of the same effect as layer_causal's 0.100"
    assert f"{said}, random weights of the same effect as vanilla's 0.200." in " ".join(verdict.paragraph(found))


def test_seeds_are_those_of_both_methods(tmp_path: Path) -> None:
    """A store of five seeds in which one method has three so far: seeds of ICL alone do not count."""
    rows, _ = world(tmp_path / "whole", closer=0.06)
    (found,) = verdict.findings(load(make_store(tmp_path / "few", [row for row in rows if row["method"] != "vanilla" or row["seed"] < 4])))
    assert "On subj, trec (3 seeds)" in verdict.paragraph(found)[0]
    third = [changed(row, method="batched") for row in rows if row["method"] == "vanilla" and row["seed"] == 1]
    frames = load(make_store(tmp_path / "third", rows + third))
    (found,) = verdict.findings(frames)
    assert "On subj, trec (5 seeds)" in verdict.paragraph(found)[0] and "Descriptive" not in " ".join(verdict.paragraph(found))
    assert "Descriptive: some figures" not in " ".join(lead(load(make_store(tmp_path / "whole_again", rows))))
    assert lead(frames)[-1].startswith("Descriptive: some figures are over 1 seed, fewer than 5")


def test_who_never_improves_or_always_diverges_is_named(tmp_path: Path) -> None:
    """Where every learning rate of one method diverged there is no common improvement, and it is no result about the other method."""
    for burnt in RATES:
        (found,) = verdict.findings(load(world(tmp_path / burnt, closer=0.06, diverges=lambda method, rank, seed, burnt=burnt: method == burnt)[1]))
        reasons = {method: dict(counts) for method, counts in found.gain.reasons.items() if counts}
        assert reasons == {burnt: {"diverged": 2 * 2 * 5}}  # tasks, folds, seeds


def test_both_levels_are_over_the_draws_of_their_difference(tmp_path: Path) -> None:
    """Layer-causal diverges before R* in a whole task and in one seed of the other: vanilla's own figures of these draws do not count."""
    rows, _ = world(tmp_path / "whole", closer=0.06, noise=0.05)
    for number, row in enumerate(rows):
        is_gone = row["method"] == "layer_causal" and (row["task"] == "subj" or row["seed"] == 3)
        rows[number] = diverged(row) if is_gone and row["learning_rate"] >= RATES["layer_causal"][2] else row
    (found,) = verdict.findings(load(make_store(tmp_path / "gaps", rows)))
    levels = {method: level.mean.mean for method, level in found.levels.items()}
    assert levels["layer_causal"] - levels["vanilla"] == pytest.approx(found.norm.mean.mean, abs=1e-12)
    assert (found.norm.mean.used, found.levels["vanilla"].mean.used) == (4, 4)
    assert "Draws used: 4 of 10 at equal size (layer_causal: 6 x diverged before it)" in " ".join(verdict.paragraph(found))
    assert "Descriptive: some figures are over 4 seeds, fewer than 5." in verdict.paragraph(found)
    table = verdict.data([found]).set_index(["quantity", "task"])
    for name, planned in (("trec", 5), ("subj", 5), ("all tasks", 10)):
        assert table.loc[("D_norm", name), "num_planned"] == planned
    assert table.loc[("balanced accuracy, zero-shot", "trec"), "num_planned"] == 1


@pytest.mark.parametrize("left", [("other_draw",), ("other_draw", "other_task", "shuffled_words")])
def test_without_all_contexts_that_teach_nothing_it_is_not_known_whether_it_is_about_the_task(tmp_path: Path, left: tuple[str, ...]) -> None:
    rows, _ = world(tmp_path / "whole", closer=0.06)
    for row in rows:
        row["measures"] = [measure for measure in row.get("measures") or () if measure["name"] in left]
    (found,) = verdict.findings(load(make_store(tmp_path / "few", rows)))
    assert found.verdict == "closer, task-specific or not"
    said = " ".join(verdict.paragraph(found))
    assert "How much of it is specific to the task is not known" in said and "whether in what is specific to the task is not known" in said


def test_the_first_sweep_file_of_a_setting_fixes_what_it_is_judged_by(tmp_path: Path) -> None:
    """What a later file says of R* and the smallest effect is told, and counts for nothing; so does a file of other tasks."""
    rows, root = world(tmp_path, closer=0.06)
    planned = {"name": "made_up", "tasks": list(TASKS), "models": [{"source": rows[0]["model_source"]}], "num_demonstrations": [4], "num_queries": 24}
    planned |= {"query_seed": 1, "seeds": list(SEEDS), "orders": 1, "protocol": {}}
    others = planned | {"tasks": ["mr"], "analysis": {"smallest_effect": 0.5, "matched_ratio": 0.125}}
    store = Store(root)
    store.save_sweep(digest="00000001", resolved=others, keys=["0" * 64])
    store.save_sweep(digest="00000002", resolved=planned | {"analysis": {"smallest_effect": 0.09, "matched_ratio": 0.25}}, keys=["1" * 64])
    store.save_sweep(digest="00000003", resolved=planned | {"analysis": {"smallest_effect": 0.02, "matched_ratio": 0.5}}, keys=["2" * 64])
    later = world(tmp_path / "later", closer=0.06)[1]
    Store(later).save_sweep(digest="00000004", resolved=planned | {"analysis": {"smallest_effect": 0.01, "matched_ratio": 1.0}}, keys=["3" * 64])
    for stores in ((root,), (later, root)):
        frames = load(*stores)
        (found,) = verdict.findings(frames)
        assert {(one.matched_ratio, one.smallest_effect) for one in found.settings} == {(0.25, 0.09)}
        assert found.verdict == "not closer"  # .06 is less than .09
        said = " ".join(verdict.paragraph(found))
        assert "at equal size of update (R = 0.25)" in said
        assert "A later sweep file has another R* or smallest effect: what stood in the first one before its run counts (R* = 0.25, 0.09)." in said


def test_selected_rates_at_the_edge_are_marked_and_tasks_that_are_left_out_are_named(tmp_path: Path) -> None:
    rows, _ = world(tmp_path / "whole", closer=0.06, gains=lambda method, rank: 0.1 * rank)
    kept = [row for row in rows if not (row["task"] == "subj" and row["method"] == "layer_causal")]
    (found,) = verdict.findings(load(make_store(tmp_path / "few", kept)))
    said = " ".join(verdict.paragraph(found))
    assert "(learning rate selected by nll_label on the other fold: 1e-1; at the edge of its grid in trec: extend the grid)" in said
    assert "Left out, as one of the two methods has no cell there: subj." in said
    (found,) = verdict.findings(load(world(tmp_path / "inside", closer=0.06)[1]))
    assert "edge" not in " ".join(verdict.paragraph(found)) and "Left out" not in " ".join(verdict.paragraph(found))


def test_tasks_where_icl_shows_nothing_are_told_apart(tmp_path: Path) -> None:
    (found,) = verdict.findings(load(world(tmp_path, closer=0.06, icl_skill=0.2)[1]))
    assert "ICL beats zero-shot, with its interval above 0, in 0 of 2 tasks;" in " ".join(verdict.paragraph(found))


def test_the_gate_is_icls_balanced_accuracy_less_zero_shots(tmp_path: Path) -> None:
    """Zero-shot always says the first of two labels, ICL is always right."""
    rows = make_rows(tasks=TASKS, seeds=(1, 2))
    for row in rows:
        if row["kind"] != "finetuned":
            is_icl = row["kind"] == "icl"
            right = {"accuracy": 1.0 if is_icl else 0.5, "balanced_accuracy": 1.0 if is_icl else 0.5}
            row |= right | {"examples": [query | {"prediction": query["gold"] if is_icl else 0} for query in row["examples"]]}
            row["folds"] = [fold | right for fold in row["folds"]]
    (found,) = verdict.findings(load(make_store(tmp_path, rows)))
    for gate in (*found.gate.tasks.values(), found.gate.mean):
        assert (gate.mean, gate.lower, gate.upper) == pytest.approx((0.5, 0.5, 0.5))
    assert "ICL beats zero-shot, with its interval above 0, in 2 of 2 tasks (subj, trec);" in " ".join(verdict.paragraph(found))
    accuracy = forest.panels(found)[-1]
    assert accuracy.title.endswith("in 2 of 2 tasks") and json_of(accuracy)["layout"]["yaxis"]["ticktext"] == ["<b>subj</b>", "<b>trec</b>", "all tasks"]


def test_the_forest_plot_draws_what_was_found(tmp_path: Path) -> None:
    (found,) = verdict.findings(load(world(tmp_path / "a", closer=0.06)[1]))
    size, gain, accuracy = forest.panels(found)
    assert size.title == f"layer_causal less vanilla at equal size of update (R = 0.5): {found.norm}"
    assert gain.title == f"layer_causal less vanilla at equal improvement: {found.gain}"
    for panel, one in ((size, found.norm), (gain, found.gain)):
        (drawn,), layout = json_of(panel)["data"], json_of(panel)["layout"]
        line = [one.tasks["subj"], one.tasks["trec"], one.mean]
        assert layout["yaxis"]["ticktext"] == ["subj", "trec", "all tasks"] and drawn["y"] == layout["yaxis"]["tickvals"]
        assert drawn["x"] == [each.mean for each in line]
        assert drawn["error_x"]["array"] == pytest.approx([each.upper - each.mean for each in line])
        assert drawn["error_x"]["arrayminus"] == pytest.approx([each.mean - each.lower for each in line])
        assert sorted(shape["x0"] for shape in layout["shapes"]) == [0.0, 0.02]
    drawn = json_of(accuracy)["data"]
    assert {symbol for trace in drawn[:4] for symbol in trace["marker"]["symbol"]} == {"circle", "diamond"}, "no selected learning rate at an edge"
    assert [trace["name"] for trace in drawn] == ["zero-shot", "in-context", "vanilla", "layer_causal"] * 2
    assert [trace.get("showlegend", True) for trace in drawn] == [False] * 4 + [True] * 4
    for trace, key in zip(drawn[:4], drawn[4:], strict=True):
        assert key["legendgroup"] == trace["legendgroup"] and key["marker"]["color"] == trace["marker"]["color"] and "symbol" not in key["marker"]
        one = found.accuracies[trace["name"]]
        assert trace["x"] == [one.tasks["subj"].mean, one.tasks["trec"].mean, one.mean.mean]
    never = world(tmp_path / "b", closer=0.06, gains=lambda method, rank: -0.1 * (rank + 1) if method == "vanilla" else GAINS[rank])[1]
    (found,) = verdict.findings(load(never))
    *_, last = forest.panels(found)
    symbols = {trace["name"]: trace["marker"]["symbol"] for trace in json_of(last)["data"][:4]}
    assert symbols["vanilla"] == ["circle-open", "circle-open", "diamond"] and symbols["layer_causal"] == ["circle", "circle", "diamond"]
    assert len(forest.panels(found)) == 2  # no point at equal improvement, so no drawing of it


def t_mean(values: list[float], query_variance: float) -> tuple[float, float, float]:
    """Return mean, standard error and degrees of freedom of one task."""
    return float(np.mean(values)), math.sqrt(np.var(values, ddof=1) / len(values) + query_variance), len(values) - 1


def joined(tasks: list[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Return the mean over tasks and its interval."""
    mean, error = float(np.mean([m for m, _, _ in tasks])), math.sqrt(sum(e**2 for _, e, _ in tasks)) / len(tasks)
    freedom = sum(e**2 for _, e, _ in tasks) ** 2 / sum(e**4 / f for _, e, f in tasks)
    half = stats.t.ppf(0.975, freedom) * error
    return mean, mean - half, mean + half


def test_both_differences_equal_plain_loops_over_the_rows(tmp_path: Path) -> None:
    rows, root = world(tmp_path, closer=0.04)
    (found,) = verdict.findings(load(root))
    at = {(r["task"], r["method"], r["learning_rate"], r["seed"]): r for r in rows if r["kind"] == "finetuned"}
    share = math.log(0.5 / 0.45) / math.log(0.8 / 0.45)

    def line(row: Row, fold: str | None) -> np.ndarray:
        return np.array([query["sim_aou"] for query in row["examples"] if fold in (None, query["fold"])])

    tasks = []
    for task in TASKS:
        gaps = []
        for seed in SEEDS:
            here = {m: (1 - share) * line(at[task, m, r[2], seed], None) + share * line(at[task, m, r[3], seed], None) for m, r in RATES.items()}
            gaps.append(here["layer_causal"] - here["vanilla"])
        query = np.mean(gaps, axis=0)
        tasks.append(t_mean([gap.mean() for gap in gaps], np.var(query, ddof=1) / len(query)))
    assert (found.norm.mean.mean, found.norm.mean.lower, found.norm.mean.upper) == pytest.approx(joined(tasks))

    tasks = []
    for task in TASKS:
        of_fold: dict[str, list[np.ndarray]] = {}
        for chooses, reports in (("A", "B"), ("B", "A")):

            def gain(method: str, rate: float, fold: str, task: str = task) -> float:
                return float(np.mean([ZERO_SHOT - next(f["nll_label"] for f in at[task, method, rate, seed]["folds"] if f["fold"] == fold) for seed in SEEDS]))

            target = 0.5 * min(max(gain(m, rate, chooses) for rate in r) for m, r in RATES.items())
            weights = {}
            for method, rates in RATES.items():
                curve = [gain(method, rate, reports) for rate in rates]
                n = next(n for n in range(1, 5) if curve[n - 1] < target <= curve[n])
                part = (target - curve[n - 1]) / (curve[n] - curve[n - 1])
                weights[method] = ((rates[n - 1], 1 - part), (rates[n], part))
            of_fold[reports] = [
                sum(w * line(at[task, "layer_causal", rate, seed], reports) for rate, w in weights["layer_causal"])
                - sum(w * line(at[task, "vanilla", rate, seed], reports) for rate, w in weights["vanilla"])
                for seed in SEEDS
            ]
        values = [(of_fold["A"][n].mean() + of_fold["B"][n].mean()) / 2 for n in range(len(SEEDS))]
        query = np.concatenate([np.mean(of_fold[fold], axis=0) for fold in "AB"])
        tasks.append(t_mean(values, np.var(query, ddof=1) / len(query)))
    assert (found.gain.mean.mean, found.gain.mean.lower, found.gain.mean.upper) == pytest.approx(joined(tasks))
    table = verdict.data([found])
    row = table[(table["quantity"] == "D_norm") & (table["task"] == "all tasks")].iloc[0]
    assert row["mean"] == pytest.approx(found.norm.mean.mean) and (row["num_used"], row["num_planned"]) == (10, 10)
    assert (row["matched_ratio"], row["smallest_effect"]) == (0.5, 0.02)


@pytest.mark.parametrize(("query_noise", "least", "most"), [(0.3, 0.93, 0.998), (0.0, 0.93, 0.97)])
def test_the_intervals_cover_the_truth(query_noise: float, least: float, most: float) -> None:
    """1,000 simulated stores of 3 tasks and 5 seeds: a paired difference with noise of seeds, of queries and of both together."""
    chance, truth, covered = np.random.default_rng(11), 0.05, {"task": 0, "all": 0}
    for _ in range(1000):
        found = []
        for _ in range(3):
            gap_SQ = truth + chance.normal(0, 0.05, (5, 1)) + chance.normal(0, query_noise, 60) + chance.normal(0, query_noise, (5, 60))
            found.append(estimate(pd.Series(gap_SQ.mean(1)), used=5, groups=[gap_SQ.mean(0)] if query_noise else []))
        covered["task"] += found[0].lower <= truth <= found[0].upper
        whole = over_tasks(found)
        covered["all"] += whole.lower <= truth <= whole.upper
    assert all(least <= number / 1000 <= most for number in covered.values()), covered
