"""Controls, equal size, protocols, own metrics and pairs: tables of hand-made stores, every number recomputed here with plain loops."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from iclgd_analysis import controls, equal_size, layer_profile, load, measures, protocol_effects
from iclgd_analysis.chosen import crossing, matched, nearest_ratio
from iclgd_analysis.intervals import Estimate, holm, over_tasks
from iclgd_analysis.load import Frames, planned_draws
from iclgd_analysis.report import write_report
from iclgd_analysis.setting import Setting, protocol_name
from scipy import stats

from iclgd_dist.store import Store
from tests.test_analysis import NUM_LAYERS, STEPS, diverged, make_cell, make_rows, make_store

Row = dict[str, Any]
SEEDS = (1, 2, 3)
LAST = STEPS[-1]
T2 = 4.302652730  # 97.5 % point of t with 2 degrees of freedom


def changed(row: Row, **columns: Any) -> Row:
    """Another cell that differs in these columns."""
    return row | columns | {"key": hashlib.sha256(json.dumps([row["key"], columns], sort_keys=True, default=str).encode()).hexdigest()}


def measure(kind: str, name: str, metric: str, mean: float | None, *, layer: int | None = None, fold: str = "all") -> Row:
    return {"kind": kind, "name": name, "metric": metric, "layer": layer, "fold": fold, "n": 24, "mean": mean, "sd": 0.1}


def t_interval(values: list[float], query_variance: float = 0.0) -> tuple[float, float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = {2: 12.706204736, 3: T2}[len(values)] * math.sqrt(variance / len(values) + query_variance)
    return mean, mean - half, mean + half


def estimate_of(line: pd.Series) -> tuple[float, float, float]:
    return line["mean"], line["lower"], line["upper"]


def only(table: pd.DataFrame, **named: Any) -> pd.Series:
    for name, value in named.items():
        table = table[table[name] == value]
    assert len(table) == 1, f"{len(table)} rows of {named}"
    return table.iloc[0]


def setting_of(frames: Frames, **named: Any) -> Setting:
    (found,) = [setting for setting in frames.settings() if all(setting.named[name] == value for name, value in named.items())]
    return found


# --- At R*


def test_a_crossing_lies_between_neighbours_in_the_logarithm_and_nowhere_else() -> None:
    assert crossing([0.25, 1.0], 0.5) == {0: pytest.approx(0.5), 1: pytest.approx(0.5)}
    assert crossing([0.1, 0.5, 2.0], 0.5) == {1: 1.0}
    assert crossing([0.6, 0.2, 0.8, 0.3, 0.9], 0.5).keys() == {1, 2}  # the first upward one
    ladder, figures = [0.07, 0.21, 0.44, 0.9, 3.0], np.array([0.1, 0.5, -0.3, 0.2, 0.9])
    for at in (0.125, 0.25, 0.5, 1.0, 2.9):
        found = sum(weight * figures[position] for position, weight in crossing(ladder, at).items())
        assert found == pytest.approx(np.interp(math.log(at), np.log(ladder), figures))
    for ratios in ([0.6, 0.8], [0.1, 0.4], [0.1, math.nan, 0.9], [0.0, 0.9], [0.9, 0.1], [], [math.nan]):
        assert crossing(ratios, 0.5) == {}


@pytest.mark.parametrize(
    ("ratios", "reason"),
    [
        ([0.6, 0.8, 0.9], "below_range"),
        ([0.1, 0.2, 0.4], "above_range"),
        ([0.1, 0.2, "diverged"], "diverged"),
        ([0.1, "diverged", 0.9], "diverged"),
        (["diverged"] * 3, "diverged"),
        ([0.1, None, 0.9], "missing"),
    ],
)
def test_a_draw_without_a_value_at_equal_size_says_why(tmp_path: Path, ratios: list[Any], reason: str) -> None:
    rows = make_rows(seeds=(1, 2), rates={"vanilla": (1e-3, 1e-2, 1e-1)})
    kept = []
    for row in rows:
        if row["kind"] == "finetuned" and row["step"] == LAST:
            size: Any = ratios[(1e-3, 1e-2, 1e-1).index(row["learning_rate"])] if row["seed"] == 1 else 0.25 * row["learning_rate"] / 1e-3
            row = make_cell("finetuned", task="trec", seed=row["seed"], skill=0.5, method="vanilla", learning_rate=row["learning_rate"], step=LAST, size=0.3)
            if size is None:
                continue
            row = diverged(row) if size == "diverged" else row | {"update_ratio": size}
        kept.append(row)
    found = matched(load(make_store(tmp_path, kept)).settings()[0], "vanilla")
    assert dict(found.reasons) == {reason: 1}
    assert set(found.terms["draw"]) == {"/2/0"}


def undiverged(row: Row, size: float = 0.6) -> Row:
    """A cell that is done, in place of one that diverged."""
    named = {name: row[name] for name in ("task", "seed", "method", "learning_rate", "step")}
    return make_cell("finetuned", skill=0.5, size=size, **named) if row["status"] == "diverged" else row


def test_a_learning_rate_of_one_draw_alone_makes_no_gap_in_the_others(tmp_path: Path) -> None:
    rows = make_rows(seeds=SEEDS, rates={"vanilla": (1e-3, 1e-2)})
    for row in rows:
        if row["kind"] == "finetuned" and row["step"] == LAST:
            row["update_ratio"] = {1e-3: 0.3, 1e-2: 0.6}[row["learning_rate"]]
    extra = make_cell("finetuned", task="trec", seed=1, skill=0.5, method="vanilla", learning_rate=5e-3, step=LAST, size=0.499)
    frames = load(make_store(tmp_path, [*map(undiverged, rows), extra]))
    found = matched(frames.settings()[0], "vanilla")
    assert not found.reasons
    assert found.terms.groupby("draw")["key"].count().to_dict() == {f"/{seed}/0": 2 for seed in SEEDS}
    of_first = found.terms[found.terms["draw"] == "/1/0"]
    assert extra["key"] in set(of_first["key"]) and of_first["weight"].max() > 0.98
    assert nearest_ratio(frames.settings()[0], "vanilla") == (1e-2, pytest.approx(0.6))  # the rate of one draw does not compete


def test_p_values_start_at_six_seeds_and_are_holms_but_the_primary_one(tmp_path: Path) -> None:
    rows = [undiverged(row, 1.2) for row in make_rows(seeds=tuple(range(1, 7)), tasks=("trec", "subj"))]
    table = equal_size.data(load(make_store(tmp_path, rows)))
    part = table[(table["metric"] == "sim_aou") & table["mean"].notna()]
    assert set(part["matched_ratio"]) == {0.5, 1.0} and set(table["matched_ratio"]) == {0.125, 0.25, 0.5, 1.0}
    plain = {}
    for place, line in part.set_index(["task", "matched_ratio"]).iterrows():
        tasks = [part[(part["task"] == task) & (part["matched_ratio"] == place[1])].iloc[0] for task in ("trec", "subj")]
        of_tasks = [((task["upper"] - task["mean"]) / stats.t.ppf(0.975, 5), 5) for task in tasks]
        if place[0] == "all tasks":
            error = math.sqrt(sum(e**2 for e, _ in of_tasks)) / 2
            freedom = sum(e**2 for e, _ in of_tasks) ** 2 / sum(e**4 / f for e, f in of_tasks)
        else:
            error, freedom = of_tasks[("trec", "subj").index(place[0])]
        plain[place] = 2 * stats.t.sf(abs(line["mean"]) / error, freedom)
    primary = ("all tasks", 0.5)
    assert [tuple(place) for place in part.loc[part["is_primary"], ["task", "matched_ratio"]].to_numpy()] == [primary]
    found = part.set_index(["task", "matched_ratio"])["p"]
    assert found[primary] == pytest.approx(plain.pop(primary))
    largest = 0.0
    for rank, place in enumerate(sorted(plain, key=plain.__getitem__)):
        largest = max(largest, min(1.0, plain[place] * (len(plain) - rank)))
        assert found[place] == pytest.approx(largest)
    (shown,) = equal_size.grids(table)
    assert {row[4] for row in shown.rows} == {"0.5", "0.5 (primary)", "1"}  # .125 and .25 lie below the grid; figures/equal_size.csv has them
    few = equal_size.data(load(make_store(tmp_path / "few", make_rows(seeds=SEEDS))))
    assert few["p"].isna().all() and few["mean"].notna().any()


def test_holms_p_values_are_the_published_ones() -> None:
    found = holm(pd.Series([0.01, math.nan, 0.04, 0.03, 0.005]))  # the example of the Holm-Bonferroni method's article, and one that is no member
    assert found.tolist() == pytest.approx([0.03, math.nan, 0.06, 0.06, 0.02], nan_ok=True)
    assert holm(pd.Series([0.6, 0.7])).tolist() == [1.0, 1.0]


def test_each_layer_at_r_star_and_bands_for_all_layers_at_once(tmp_path: Path) -> None:
    seeds = (1, 2, 3, 4, 5)
    rows = [row for row in make_rows(seeds=seeds) if row["method"] != "vanilla"]
    chance = np.random.default_rng(3)
    for row in rows:
        for layer in row["layers"]:  # each layer has its own size, so that R* lies elsewhere in each; the last one never comes up to it
            layer["update_ratio"] = row["update_ratio"] * (0.05 if layer["layer"] == NUM_LAYERS - 1 else 0.6 + 0.2 * layer["layer"])
            layer["sim_aou"] = float(chance.normal(0.2, 0.05))
    setting = (frames := load(make_store(tmp_path, rows))).settings()[0]
    table = layer_profile.data(frames, setting)
    own = table[table["choice"] == layer_profile.OWN].set_index("layer")
    last = [row for row in rows if row["kind"] == "finetuned" and row["step"] == LAST]
    expected: dict[int, list[float]] = {}
    for number in range(NUM_LAYERS):
        for seed in seeds:
            here = [(r["learning_rate"], f) for r in last if r["seed"] == seed for f in r["layers"] if (f["layer"], f["fold"]) == (number, "all")]
            line = sorted((learning_rate, f["update_ratio"], f["sim_aou"]) for learning_rate, f in here)
            sizes = [math.log(size) for _, size, _ in line]
            if sizes[0] < math.log(0.5) < sizes[-1]:
                expected.setdefault(number, []).append(float(np.interp(math.log(0.5), sizes, [value for *_, value in line])))
    assert set(own.index) == set(range(NUM_LAYERS)) and 0 < len(expected) < NUM_LAYERS
    assert {number for number, mean in own["sim_aou"].items() if math.isnan(mean)} == set(range(NUM_LAYERS)) - set(expected)  # gaps, not bridges
    half = stats.t.ppf(1 - 0.025 / len(expected), 4)
    for number, values in expected.items():
        assert own.loc[number, "sim_aou"] == pytest.approx(np.mean(values)) and own.loc[number, "sim_aou_n"] == 5
        assert own.loc[number, "sim_aou_upper"] - np.mean(values) == pytest.approx(half * np.std(values, ddof=1) / math.sqrt(5))
    panels = layer_profile.panels(setting, table)
    assert any(panel.title.startswith("sim_aou, each layer at R*: layer_causal (R 0.50, 5 of 5 draws)") for panel in panels)
    assert all(any(trace.fill == "toself" for trace in panel.figure.data) for panel in panels)
    extra = make_cell("finetuned", task="trec", seed=1, skill=0.5, method="layer_causal", learning_rate=5e-4, step=LAST, size=0.001)
    more = load(make_store(tmp_path / "more", [*rows, extra]))
    again = layer_profile.data(more, more.settings()[0])
    assert again.loc[again["choice"] == layer_profile.OWN, "sim_aou_n"].tolist() == own["sim_aou_n"].tolist()  # no gap in the other draws
    few = load(make_store(tmp_path / "few", [row for row in rows if row["seed"] in (None, 1, 2, 3, 4)]))
    assert layer_profile.data(few, few.settings()[0])["sim_aou_upper"].isna().all()  # fewer than 5: no band


def test_r_of_a_fold_leaves_out_what_finetuning_does_not_change(tmp_path: Path) -> None:
    rows = make_rows()
    cells = [row for row in rows if row["kind"] == "finetuned" and row["status"] == "done"]
    for row in cells:
        for layer in row["layers"]:
            is_still = layer["layer"] < 2 or row is cells[0]
            layer |= {"noise_floor": 1e-3 if layer["fold"] == "all" else None, "update_norm": 9e-3 if is_still else 0.2}
            layer["update_ratio"] = 0.0 if is_still else 0.3 + layer["layer"]
    found = load(make_store(tmp_path, rows)).figures(pd.Series([row["key"] for row in cells]), "update_ratio", "A").tolist()
    moved = [0.3 + number for number in range(2, NUM_LAYERS)]
    assert found[0] == 0.0
    assert found[1:] == [pytest.approx(math.prod(moved) ** (1 / len(moved)))] * (len(cells) - 1)


def at_half(rows: list[Row], method: str, seed: int, **same: Any) -> tuple[float, np.ndarray]:
    """Interpolate sim_aou of a seed, and of each of its queries, at R = 1/2 by hand: the two sizes around it are .3 and .6."""
    share = math.log(0.5 / 0.3) / math.log(2)
    low, high = (
        next(
            r for r in rows if (r["method"], r["seed"], r["step"], r["update_ratio"]) == (method, seed, LAST, size) and all(r[n] == v for n, v in same.items())
        )
        for size in (0.3, 0.6)
    )
    queries = [(1 - share) * a["sim_aou"] + share * b["sim_aou"] for a, b in zip(low["examples"], high["examples"], strict=True)]
    return (1 - share) * low["sim_aou"] + share * high["sim_aou"], np.array(queries)


def untrained(rows: list[Row], *, init_seed: int, init: str = "embeddings_norms") -> list[Row]:
    """The same cells on random weights, with figures of their own."""
    found = []
    for row in rows:
        other = changed(row, init=init, init_scheme="fairseq", init_seed=init_seed, model_notes=[f"random weights ({init}, fairseq, seed {init_seed})"])
        if row["kind"] == "finetuned" and row["sim_aou"] is not None:
            other["sim_aou"] = row["sim_aou"] + (0.01 * init_seed if row["method"] == "vanilla" else 0.02 * init_seed**2)
        found.append(other)
    return found


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Frames, Path]:
    rows = make_rows(seeds=SEEDS, tasks=("trec", "subj"))
    for row in rows:
        row["update_ratio"] = round(row["update_ratio"], 6) if row["update_ratio"] is not None else None
    of_one_seed = [row for row in rows if row["seed"] in (None, 1)]
    rows += [other for init_seed in (0, 1, 2) for other in untrained(of_one_seed, init_seed=init_seed)]
    root = make_store(tmp_path_factory.mktemp("sized"), rows)
    return rows, load(root), root


def test_the_difference_at_equal_size_is_paired_by_seed_with_the_queries_share(sized: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = sized
    table = equal_size.data(frames)
    here = [row for row in rows if row["task"] == "trec" and row["init"] is None]
    pairs = [(at_half(here, "layer_causal", seed), at_half(here, "vanilla", seed)) for seed in SEEDS]
    queries = np.mean([left[1] - right[1] for left, right in pairs], axis=0)
    expected = t_interval([left[0] - right[0] for left, right in pairs], float(np.var(queries, ddof=1)) / len(queries))
    line = only(table, task="trec", init="trained", metric="sim_aou", matched_ratio=0.5)
    assert estimate_of(line) == pytest.approx(expected)
    assert (line["num_used"], line["num_planned"], line["method"]) == (3, 3, "layer_causal")
    assert line["value"] - line["vanilla"] == pytest.approx(line["mean"])


def test_on_random_weights_the_seed_of_the_weights_is_the_replicate(sized: tuple[list[Row], Frames, Path]) -> None:
    rows, frames, _ = sized
    table = equal_size.data(frames)
    here = [row for row in rows if row["task"] == "subj" and row["init"] is not None]
    pairs = [(at_half(here, "layer_causal", 1, init_seed=seed), at_half(here, "vanilla", 1, init_seed=seed)) for seed in (0, 1, 2)]
    queries = np.mean([left[1] - right[1] for left, right in pairs], axis=0)
    expected = t_interval([left[0] - right[0] for left, right in pairs], float(np.var(queries, ddof=1)) / len(queries))
    line = only(table, task="subj", init="embeddings_norms (fairseq)", metric="sim_aou", matched_ratio=0.5)
    assert estimate_of(line) == pytest.approx(expected)
    assert (line["num_used"], line["num_replicates"]) == (3, 3)
    setting = setting_of(frames, task="subj", init="embeddings_norms (fairseq)")
    assert len(setting.zero_shot) == 3
    assert set(setting.finetuned["init_seed"]) == {0, 1, 2}
    assert set(setting_of(frames, task="subj", init="trained").finetuned["init_seed"].dropna()) == set()
    assert setting.title == "subj, Tiny-135M-Instruct.Q4_1, k = 4, random weights: embeddings_norms (fairseq)"
    assert "random weights (embeddings_norms (fairseq): embeddings, norms and output head as trained" in setting.caption
    assert "3 seeds of the weights (0, 1, 2)" in setting.caption
    assert "seed 0)" not in setting.caption


def test_over_tasks_the_errors_add_up_and_the_freedom_is_welch_and_satterthwaites(sized: tuple[list[Row], Frames, Path]) -> None:
    table = equal_size.data(sized[1])
    line = only(table, task="all tasks", init="trained", metric="sim_aou", matched_ratio=0.5)
    tasks = [only(table, task=task, init="trained", metric="sim_aou", matched_ratio=0.5) for task in ("trec", "subj")]
    errors = [(task["upper"] - task["mean"]) / T2 for task in tasks]
    error = math.sqrt(sum(e**2 for e in errors)) / 2
    freedom = sum(e**2 for e in errors) ** 2 / sum(e**4 / 2 for e in errors)
    assert line["mean"] == pytest.approx(sum(task["mean"] for task in tasks) / 2)
    assert line["upper"] - line["mean"] == pytest.approx(stats.t.ppf(0.975, freedom) * error)
    assert line["signs"] == f"above 0 in {sum(task['mean'] > 0 for task in tasks)} of 2 tasks"
    assert 2 <= freedom <= 4


def test_a_task_without_an_interval_leaves_the_mean_over_tasks_without_one() -> None:
    whole = Estimate(0.2, 0.1, 0.3, 3, 3, 0.02, 2.0)
    assert over_tasks([whole, Estimate(0.4, used=1, replicates=1)]).mean == pytest.approx(0.3)
    assert math.isnan(over_tasks([whole, Estimate(0.4, used=1, replicates=1)]).lower)
    assert over_tasks([whole, Estimate()]).mean == pytest.approx(0.2)
    assert math.isnan(over_tasks([Estimate()]).mean)


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
    gaps = []
    for seed in SEEDS:
        cell = next(r for r in rows if (r["method"], r["learning_rate"], r["step"], r["seed"], r["train_on"]) == ("vanilla", 1e-2, LAST, seed, "true"))
        largest = 0.1 * max(0.5 + 0.01 * seed, 0.45 + 0.01 * seed + 0.1 * (seed - 1))
        gaps.append(cell["sim_aou"] - largest)
    assert line["learning_rates"] == "1e-2"
    assert estimate_of(line) == pytest.approx(t_interval(gaps))
    assert 0.1 * (0.5 + 0.01) > 0.1 * (0.45 + 0.01)  # seed 1: other_task; the others: shuffled_words


def test_without_one_of_the_empty_contexts_nothing_is_said_of_the_task(tmp_path: Path) -> None:
    rows = controlled(make_rows(seeds=SEEDS))
    for row in rows:
        row["measures"] = [m for m in row["measures"] or [] if m["name"] != "separator" or row["seed"] == 2]
    frames = load(make_store(tmp_path, rows))
    table = controls.data(frames, frames.settings()[0])
    line = only(table, method="vanilla", choice="nearest R*", metric="sim_aou", against="task_specific")
    assert (line["num_used"], line["num_planned"]) == (1, 3)
    assert math.isnan(line["lower"])


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


def protocol(**switches: Any) -> str:
    return json.dumps({"preset": "clean", "sink": "auto", "separator": "newline", "record_position": "last_prompt", "sink_token": "<s>"} | switches)


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


def test_the_page_has_tables_of_what_the_store_holds_and_no_others(held: tuple[list[Row], Frames, Path], sized: tuple[list[Row], Frames, Path]) -> None:
    page = write_report(held[2]).read_text()
    assert page.count("<h3>Controls: trec, Tiny-135M-Instruct.Q4_1, k = 4</h3>") == 1
    assert "no control context" not in page
    assert "Descriptive: some means are over 3 seeds, fewer than 5" in page
    assert "What the protocol moves" not in page
    assert (held[2] / "figures" / "controls.csv").exists()
    page = write_report(sized[2]).read_text()
    assert "Equal size of update: Tiny-135M-Instruct.Q4_1, k = 4" in page
    assert "<h3>Controls" not in page
    assert "no control context" in page
    assert (sized[2] / "figures" / "equal_size.csv").exists()
