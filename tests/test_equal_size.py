"""Methods at equal size of update, R*: every number recomputed with plain loops from hand-made stores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from iclgd_analysis import equal_size, layer_profile, load, verdict
from iclgd_analysis.chosen import crossing, matched, nearest_ratio
from iclgd_analysis.intervals import Estimate, holm, over_tasks
from iclgd_analysis.load import Frames
from iclgd_analysis.report import write_report
from scipy import stats

from tests.made import (
    LAST,
    NUM_LAYERS,
    T2,
    Row,
    diverged,
    estimate_of,
    make_cell,
    make_rows,
    make_store,
    only,
    setting_of,
    t_interval,
    undiverged,
    untrained,
)

SEEDS = (1, 2, 3)


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
        ([0.0, 0.7, 0.8], "missing"),
        ([0.9, 0.3, 0.2], "below_range"),
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
    assert set(table.loc[table["is_primary"], "metric"]) == {"sim_aou"}, "one contrast is the primary one, not one for each metric"
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
    (found,) = verdict.findings(frames)
    control = found.untrained["embeddings_norms (fairseq)"]
    assert (control.tasks["subj"].mean, control.tasks["subj"].lower, control.tasks["subj"].upper) == pytest.approx(expected)
    assert f"On random weights (embeddings_norms (fairseq)) the difference at equal size is {control.mean}" in " ".join(verdict.paragraph(found))
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


def test_a_task_without_an_interval_leaves_the_mean_over_tasks_without_one() -> None:
    whole = Estimate(0.2, 0.1, 0.3, 3, 3, 0.02, 2.0)
    assert over_tasks([whole, Estimate(0.4, used=1, replicates=1)]).mean == pytest.approx(0.3)
    assert math.isnan(over_tasks([whole, Estimate(0.4, used=1, replicates=1)]).lower)
    assert over_tasks([whole, Estimate()]).mean == pytest.approx(0.2)
    assert math.isnan(over_tasks([Estimate()]).mean)


def test_the_page_has_a_table_of_equal_size_and_none_of_controls_that_are_not_there(sized: tuple[list[Row], Frames, Path]) -> None:
    page = write_report(sized[2]).read_text()
    assert "Equal size of update: Tiny-135M-Instruct.Q4_1, k = 4" in page
    assert "<h3>Controls" not in page
    assert "no control context" in page
    assert (sized[2] / "figures" / "equal_size.csv").exists()
