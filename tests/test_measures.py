"""Controls, pairs and metrics of one's own, against numpy loops over layers and queries."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from iclgd_dist import random_deltas
from iclgd_dist.blocks import RandomTarget
from iclgd_dist.config import SweepError
from iclgd_dist.extensions import MetricSpec
from iclgd_dist.measures import alpha_measures, context_measures, control_measures, metric_measures, pair_measures, score_directions
from iclgd_dist.metrics import NoiseFloor
from tests.test_rows import FOLD_OF, FT, ICL, ZS, H, L, Q, baseline, capture

OTHER = capture(5)
FOLDS = {"A": [q for q in range(Q) if FOLD_OF[q] == "A"], "B": [q for q in range(Q) if FOLD_OF[q] == "B"], "all": list(range(Q))}


def change(state, layer: int, query: int) -> np.ndarray:
    return (state.attention_LQD[layer, query].double() - ZS.attention_LQD[layer, query].double()).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def by_heads(a, b, layer: int, query: int) -> float:
    zero_shot = ZS.scores_LQHT[layer, query].double().numpy()
    values = [
        cosine(x - z, y - z)
        for x, y, z in zip(a.scores_LQHT[layer, query].double().numpy(), b.scores_LQHT[layer, query].double().numpy(), zero_shot, strict=True)
    ]
    return float(np.nanmean(values)) if not np.all(np.isnan(values)) else math.nan


def expect(rows: list[dict], values, **identity) -> None:
    """Check n, mean and sd of every layer and fold; `values(layer, fold)` gives one number per query of the fold."""
    rows = [row for row in rows if all(row[name] == value for name, value in identity.items())]
    assert len(rows) == L * 3
    for row in rows:
        of_fold = np.array(values(row["layer"], row["fold"]))
        of_fold = of_fold[~np.isnan(of_fold)]
        assert row["n"] == len(of_fold)
        assert (row["mean"] is None) == (len(of_fold) == 0)
        if len(of_fold):
            assert row["mean"] == pytest.approx(of_fold.mean(), abs=1e-9)
        if len(of_fold) > 1:
            assert row["sd"] == pytest.approx(of_fold.std(ddof=1), abs=1e-9)


def test_a_control_is_the_similarity_with_the_states_in_its_context() -> None:
    (rows, again) = control_measures(baseline(ZS, ICL), {"other_task": OTHER, "separator": ICL}, [FT, ICL])
    expect(
        rows,
        lambda layer, fold: [cosine(change(OTHER, layer, q), change(FT, layer, q)) for q in FOLDS[fold]],
        kind="control",
        name="other_task",
        metric="sim_aou",
    )
    expect(rows, lambda layer, fold: [by_heads(OTHER, FT, layer, q) for q in FOLDS[fold]], name="other_task", metric="sim_am_delta")
    expect(again, lambda layer, fold: [1.0 for q in FOLDS[fold]], name="separator", metric="sim_aou")


def test_icl_itself_is_compared_with_each_control_context() -> None:
    rows = context_measures(baseline(ZS, ICL), {"other_task": OTHER, "same": ICL})
    expect(rows, lambda layer, fold: [cosine(change(OTHER, layer, q), change(ICL, layer, q)) for q in FOLDS[fold]], name="other_task", metric="sim_aou")
    expect(rows, lambda layer, fold: [1.0 for q in FOLDS[fold]], name="same", metric="sim_am_delta")


def test_other_query_takes_the_next_query_of_the_fold() -> None:
    (rows,) = control_measures(baseline(ZS, ICL), {}, [FT])

    def values(layer: int, fold: str) -> list[float]:
        order = FOLDS[fold]
        return [cosine(change(ICL, layer, q), change(FT, layer, order[(n + 1) % len(order)])) for n, q in enumerate(order)]

    expect(rows, values, name="other_query", metric="sim_aou")


def test_centred_takes_the_mean_over_the_fold_away() -> None:
    (rows,) = control_measures(baseline(ZS, ICL), {}, [FT])

    def values(layer: int, fold: str) -> list[float]:
        icl, ft = (np.array([change(state, layer, q) for q in FOLDS[fold]]) for state in (ICL, FT))
        if not ft.any():
            return [math.nan] * len(ft)
        return [cosine(a, b) for a, b in zip(icl - icl.mean(0), ft - ft.mean(0), strict=True)]

    expect(rows, values, name="centred", metric="sim_aou")


def test_changes_within_the_noise_have_no_controls() -> None:
    noise = NoiseFloor(torch.full((L,), 1e3, dtype=torch.float64), torch.full((L, H), 1e3, dtype=torch.float64))
    (rows,) = control_measures(baseline(ZS, ICL, noise=noise), {"other_task": OTHER}, [FT])
    assert {(row["n"], row["mean"], row["sd"]) for row in rows} == {(0, None, None)}


def test_relative_positions_leave_layer_0_of_the_scores_out() -> None:
    base = replace(baseline(ZS, ICL), is_first_layer_still=True)
    rows = [row for row in pair_measures(base, "k", OTHER, FT) if row["metric"] == "alpha" and row["fold"] == "all"]
    assert [row["n"] for row in sorted(rows, key=lambda row: row["layer"])][:2] == [0, 9]


def test_a_pair_is_two_finetuned_cells_and_alpha_compares_their_attention_scores() -> None:
    rows = pair_measures(baseline(ZS, ICL), "key of the other", OTHER, FT)
    assert {(row["kind"], row["name"]) for row in rows} == {("pair", "key of the other")}
    expect(rows, lambda layer, fold: [by_heads(OTHER, FT, layer, q) for q in FOLDS[fold]], metric="alpha")
    expect(rows, lambda layer, fold: [cosine(change(OTHER, layer, q), change(FT, layer, q)) for q in FOLDS[fold]], metric="sim_aou")


def alpha_of(base, other, finetuned) -> list[dict]:
    return alpha_measures(base, "key of the other", score_directions(base, other), score_directions(base, finetuned))


@pytest.mark.parametrize("counts_first_layer", [False, True])
def test_alpha_of_two_learning_rates_is_of_the_whole_model(counts_first_layer: bool) -> None:
    rows = alpha_of(replace(baseline(ZS, ICL), counts_first_layer=counts_first_layer), OTHER, FT)
    assert [(row["kind"], row["name"], row["metric"], row["layer"], row["sd"]) for row in rows] == [("pair", "key of the other", "alpha", None, None)] * 3
    for row in rows:
        layers = [[by_heads(OTHER, FT, layer, q) for q in FOLDS[row["fold"]]] for layer in range(0 if counts_first_layer else 1, L)]
        means = [np.nanmean(of_layer) for of_layer in layers if not np.isnan(of_layer).all()]
        assert (row["n"], row["mean"]) == (len(FOLDS[row["fold"]]), pytest.approx(np.mean(means), abs=1e-6))


@pytest.mark.parametrize(("still", "counts", "has_eps"), [(False, False, False), (True, False, False), (True, True, True), (False, True, True)])
def test_both_ways_to_alpha_agree(still: bool, counts: bool, has_eps: bool) -> None:
    """What a pair of one learning rate has per layer, averaged as readers do, is what a pair of two has at once; also where heads, queries and layers are undefined."""
    floors = torch.full((L, H), 0.22, dtype=torch.float64)
    floors[3] = 1e3
    base = replace(
        baseline(ZS, ICL, noise=NoiseFloor(torch.zeros(L, dtype=torch.float64), floors)), is_first_layer_still=still, counts_first_layer=counts, has_eps=has_eps
    )
    per_layer = [row for row in pair_measures(base, "k", OTHER, FT) if row["metric"] == "alpha" and (row["layer"] or counts)]
    whole = {row["fold"]: row["mean"] for row in alpha_of(base, OTHER, FT)}
    if not has_eps:
        assert {row["n"] for row in per_layer if row["fold"] == "all"} & set(range(1, Q)) and 0 in {row["n"] for row in per_layer}
    for fold, mean in whole.items():
        assert mean == pytest.approx(np.mean([row["mean"] for row in per_layer if row["fold"] == fold and row["mean"] is not None]), abs=1e-6)


OWN = """
import torch

class Moved:
    name = "moved"

    def __call__(self, zero_shot, in_context, finetuned):
        return (finetuned.attention_LQD.double() - zero_shot.attention_LQD.double()).norm(dim=-1)

def margin(zero_shot, in_context, finetuned):
    top = finetuned.label_scores_QC.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]

def wrong(zero_shot, in_context, finetuned):
    return torch.zeros(3)
"""


def own(tmp_path: Path, name: str, text: str = OWN) -> MetricSpec:
    (tmp_path / "mine.py").write_text(text)
    return MetricSpec(name=name.lower(), code=f"mine.py:{name}").with_text(tmp_path)


def test_a_metric_of_ones_own_is_averaged_per_layer_and_fold(tmp_path: Path) -> None:
    spec = own(tmp_path, "Moved")
    rows, problems = metric_measures(baseline(ZS, ICL), [spec], FT)
    assert problems == []
    expect(rows, lambda layer, fold: [np.linalg.norm(change(FT, layer, q)) for q in FOLDS[fold]], kind="metric", metric="moved", name=spec.version)


def test_a_metric_of_the_whole_model_has_no_layer(tmp_path: Path) -> None:
    rows, _ = metric_measures(baseline(ZS, ICL), [own(tmp_path, "margin")], FT)
    scores = np.sort(FT.label_scores_QC.numpy(), 1)
    assert {row["fold"]: (row["layer"], row["mean"]) for row in rows} == {
        fold: (None, pytest.approx((scores[:, -1] - scores[:, -2])[order].mean())) for fold, order in FOLDS.items()
    }


def test_a_metric_that_fails_says_what_was_required_and_leaves_the_others(tmp_path: Path) -> None:
    rows, problems = metric_measures(baseline(ZS, ICL), [own(tmp_path, "wrong"), own(tmp_path, "margin")], FT)
    assert problems == ["metric 'wrong' must return (7, 10) or (10,), got (3,)"]
    assert {row["metric"] for row in rows} == {"margin"}
    _, (problem,) = metric_measures(baseline(ZS, ICL), [own(tmp_path, "margin", "def margin(*captures):\n    return 1 / 0")], FT)
    assert problem == "metric 'margin': ZeroDivisionError: division by zero"


def test_a_metric_that_changes_what_it_is_shown_stops_the_block(tmp_path: Path) -> None:
    spoiling = "def margin(zero_shot, in_context, finetuned):\n    finetuned.attention_LQD.mul_(2)\n    return finetuned.label_scores_QC[:, 0]\n"
    with pytest.raises(SweepError, match="metric 'margin' changes the captures it is given; work on copies"):
        metric_measures(baseline(ZS, ICL), [own(tmp_path, "margin", spoiling)], FT.clone())


@pytest.mark.parametrize(("factor", "is_near"), [(2.0, False), (0.5, True)])
def test_random_weights_of_another_size_have_their_size_and_no_similarity(factor: float, is_near: bool) -> None:
    """Their state lies on the line from zero-shot to ICL; a trained cell with R = 1/2 is what they stand for."""
    state = replace(FT, attention_LQD=ZS.attention_LQD + factor * (ICL.attention_LQD - ZS.attention_LQD))
    lane = random_deltas._Lane(RandomTarget("a cell", 0.5, {}), draw=1)
    found = random_deltas._rows(baseline(ZS, ICL), lane, state, factor)
    assert {row["name"] for row in found} == {"random_delta_1"}
    sizes, similar = ([row for row in found if row["metric"] == metric] for metric in ("update_ratio", "sim_aou"))
    assert len(sizes) == len(similar) == 3 * L
    assert [row["mean"] for row in sizes] == pytest.approx([factor] * 3 * L, rel=1e-5)
    if is_near:
        assert [row["mean"] for row in similar] == pytest.approx([1.0] * 3 * L)
    else:
        assert not any(row["n"] or row["mean"] is not None for row in found if row["metric"].startswith("sim_"))
        assert "accuracy" not in {row["metric"] for row in found}
    assert lane.is_near(0.5249) and not lane.is_near(0.5251)
