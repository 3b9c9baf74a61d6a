"""Rows of cells: columns, folds, means and NULLs, against numpy and against the same rows of fewer queries."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from iclgd_dist import comparison, rows
from iclgd_dist.comparison import Baseline
from iclgd_dist.metrics import Capture, NoiseFloor
from iclgd_dist.rows import Lane, Row, TrainingRecord
from iclgd_dist.schema import ACCURACY, CELL, EXAMPLE, FOLD, LAYER, NESTED, OUTCOME, POOLED, SIMILARITIES

L, Q, H, T, D, C = 7, 10, 3, 6, 8, 3
GOLD = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
FOLD_OF = ["A", "B", "B", "A", "A", "B", "A", "A", "B", "B"]
IDS = [f"query{number}" for number in range(Q)]
WORDS = ["bad", "fair", "good"]
TRAINING = TrainingRecord(loss=2.5, loss_L=None, gradient_norm_L=[3.0, 4.0] + [0.0] * 5, delta_norms_L={"k": [0.3] + [0.0] * 6, "v": [0.0, 0.4] + [0.0] * 5})
ITEMS = tuple((start, start + 10) for start in range(0, 120, 10))  # twelve demonstrations of 10 tokens
NO_NOISE = NoiseFloor(torch.zeros(L, dtype=torch.float64), torch.zeros(L, H, dtype=torch.float64))
RANDOM = {name for name in SIMILARITIES if name.endswith(("uniform_update", "gaussian_state", "random"))}
ONLY_FINETUNED = {"rec2ftp", "num_zs_wrong_ft_right", "num_zs_wrong_ft_right_icl_right", "jaccard_changed", "agreement_icl", "kappa_icl", "kl_label_icl"}


def capture(seed: int, queries: int = Q, width: int = D) -> Capture:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(L, queries, H, T, generator=draw)
    for query in range(queries):
        scores[:, query, :, 2 + query % 4 :] = 0
    attention, labels = torch.randn(L, queries, width, generator=draw), torch.randn(queries, C, generator=draw).double()
    return Capture(attention, scores, labels, torch.randn(L, queries, ITEMS[-1][1], generator=draw))


def moved_from(zero_shot: Capture, state: Capture, *, still: list[tuple[int, int]]) -> Capture:
    """Return the state with the change of some (layer, query) undone."""
    attention, scores = state.attention_LQD.clone(), state.scores_LQHT.clone()
    for layer, query in still:
        attention[layer, query], scores[layer, query] = zero_shot.attention_LQD[layer, query], zero_shot.scores_LQHT[layer, query]
    return replace(state, attention_LQD=attention, scores_LQHT=scores)


def baseline(zero_shot: Capture, in_context: Capture, *, keep: list[int] | None = None, noise: NoiseFloor = NO_NOISE, folds: list[str] = FOLD_OF) -> Baseline:
    keep = list(range(Q)) if keep is None else keep
    return comparison.make_baseline(
        zero_shot=some(zero_shot, keep),
        in_context=some(in_context, keep),
        noise=noise,
        gold_Q=[GOLD[query] for query in keep],
        folds_Q=[folds[query] for query in keep],
        query_ids=[IDS[query] for query in keep],
        label_words=WORDS,
        num_queries_left_out=2,
    )


def some(state: Capture, keep: list[int]) -> Capture:
    assert state.ranked_LQT is not None
    return Capture(state.attention_LQD[:, keep], state.scores_LQHT[:, keep], state.label_scores_QC[keep], state.ranked_LQT[:, keep])


ZS, ICL, PREFIX = capture(1), capture(2), capture(4)
# Layer 3 never moves; two more queries do not move in a layer each.
FT = moved_from(ZS, capture(3), still=[*((3, query) for query in range(Q)), (1, 0), (5, 1)])


def finetuned_row(base: Baseline, state: Capture, *, training: TrainingRecord, random_seed: int, prefix: comparison.InContext | None = None) -> Row:
    (row,) = rows.finetuned_rows(base, [Lane(state, training, random_seed)], prefix=prefix)
    return row


def compared(
    base: Baseline, finetuned: Capture, *, keep: list[int] | None = None, prefix: Capture = PREFIX, training: TrainingRecord = TRAINING, seed: int = 11
) -> Row:
    state = prefix if keep is None else some(prefix, keep)
    context = replace(comparison.changed(base.zero_shot, state), items=ITEMS, random_ranks=comparison.random_ranks(state, ITEMS))
    return finetuned_row(base, finetuned if keep is None else some(finetuned, keep), training=training, random_seed=seed, prefix=context)


def finetuned(seed: int = 11, training: TrainingRecord = TRAINING) -> Row:
    return compared(baseline(ZS, ICL), FT, training=training, seed=seed)


def every_kind() -> dict[str, Row]:
    base = baseline(ZS, ICL)
    return {
        "zero_shot": rows.zero_shot_row(base),
        "icl": rows.icl_row(base),
        "finetuned": finetuned(),
        "diverged": rows.diverged_row(num_queries=Q, label_words=WORDS, step=3, last_finite_loss=4.5, num_queries_left_out=2),
    }


def layers_of(row: Row, fold: str) -> list[Row]:
    return sorted((layer for layer in row["layers"] if layer["fold"] == fold), key=lambda layer: layer["layer"])


def values_in(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in values_in(part)]
    return [leaf for part in value for leaf in values_in(part)] if isinstance(value, list) else [value]


def names(columns: list[Any]) -> list[str]:
    return [name for name, _, _ in columns]


@pytest.mark.parametrize("kind", ["zero_shot", "icl", "finetuned", "diverged"])
def test_a_row_has_exactly_the_columns_of_the_schema_as_plain_values(kind: str) -> None:
    row = every_kind()[kind]
    assert sorted(row) == sorted(names(OUTCOME + NESTED))
    for nested, columns in (("folds", FOLD), ("layers", LAYER), ("examples", EXAMPLE)):
        assert all(list(inner) == names(columns) for inner in row[nested])
    assert {type(value) for value in values_in(row)} <= {type(None), bool, int, float, str}
    assert not any(isinstance(value, float) and not math.isfinite(value) for value in values_in(row))


@pytest.mark.parametrize("kind", ["zero_shot", "icl", "finetuned", "diverged"])
def test_a_row_survives_arrow_unchanged(kind: str) -> None:
    row = every_kind()[kind]
    schema = pa.schema([CELL.field(name) for name in names(OUTCOME + NESTED)])
    assert pa.Table.from_pylist([row], schema=schema).to_pylist()[0] == row


def test_the_rows_of_a_fold_are_those_of_its_queries_alone() -> None:
    whole = every_kind()
    for fold in ("A", "B"):
        keep = [query for query in range(Q) if FOLD_OF[query] == fold]
        base = baseline(ZS, ICL, keep=keep)
        alone = {"icl": rows.icl_row(base), "finetuned": compared(base, FT, keep=keep)}
        of_all_only = RANDOM | {"fold", "delta_norm_k", "delta_norm_v", "gradient_norm", "noise_floor", "noise_floor_scores"}
        for kind, row in alone.items():
            for mine, theirs in zip(layers_of(whole[kind], fold), layers_of(row, "all"), strict=True):
                for name in set(names(LAYER)) - of_all_only:
                    assert mine[name] == (None if theirs[name] is None else pytest.approx(theirs[name], rel=1e-12)), (kind, fold, name)
            (accuracy,) = [entry for entry in whole[kind]["folds"] if entry["fold"] == fold]
            for name in names(ACCURACY):
                assert accuracy[name] == (None if row[name] is None else pytest.approx(row[name], rel=1e-12)), (kind, fold, name)


def test_a_layers_mean_is_over_its_defined_queries_and_carries_their_number() -> None:
    for fold, numbers in (("A", {1: 4, 3: 0, 5: 5}), ("B", {1: 5, 3: 0, 5: 4}), ("all", {0: 10, 1: 9, 3: 0, 5: 9})):
        layers = layers_of(finetuned(), fold)
        for layer, number in numbers.items():
            for name in SIMILARITIES:
                assert layers[layer][f"{name}_n"] == number
                assert (layers[layer][name] is None) == (number == 0)


def test_a_rows_mean_is_over_the_layers_where_the_figure_is_defined() -> None:
    row = finetuned()
    for name in (*SIMILARITIES, *POOLED):
        values = np.array([layer[name] for layer in layers_of(row, "all")], dtype=float)
        if name.startswith("sim_am_delta"):
            assert not math.isnan(values[0])
            values[0] = math.nan
        lower, middle, upper = np.array_split(values, 3)
        expected = {
            "": np.nanmean(values),
            "_median": np.nanmedian(values),
            "_lower": np.nanmean(lower),
            "_middle": np.nanmean(middle),
            "_upper": np.nanmean(upper),
        }
        for part, value in expected.items():
            assert row[name + part] == pytest.approx(value, rel=1e-12), name + part


def test_an_examples_mean_is_over_the_layers_where_it_is_defined() -> None:
    whole = finetuned()
    for query, example in enumerate(whole["examples"]):
        alone = compared(baseline(ZS, ICL, keep=[query]), FT, keep=[query])
        for name in set(SIMILARITIES) - RANDOM:  # of one query, the mean over layers of its row
            assert example[name] == pytest.approx(alone[name], rel=1e-12)
        assert example["update_norm"] == pytest.approx(alone["update_norm"], rel=1e-12)
        assert (example["query"], example["fold"], example["gold"]) == (IDS[query], FOLD_OF[query], GOLD[query])
        assert example["prediction"] == int(FT.label_scores_QC.numpy()[query].argmax())
        assert example["label_scores"] == FT.label_scores_QC[query].tolist()


def test_accuracy_is_that_of_the_cells_own_predictions() -> None:
    for kind, state in (("zero_shot", ZS), ("icl", ICL), ("finetuned", FT)):
        row = every_kind()[kind]
        best = state.label_scores_QC.numpy().argmax(1)
        assert row["accuracy"] == pytest.approx(np.mean(best == np.array(GOLD)))
        assert row["prediction_counts"] == [int((best == label).sum()) for label in range(C)]
        assert row["nll_raw"] == pytest.approx(-np.mean(state.label_scores_QC.numpy()[range(Q), GOLD]))
        assert (row["n"], row["label_words"], row["num_queries_left_out"], row["status"]) == (Q, WORDS, 2, "done")
        assert row["num_zs_wrong"] == int((ZS.label_scores_QC.numpy().argmax(1) != np.array(GOLD)).sum())


def test_comparisons_of_predictions_keep_zero_shot_icl_and_finetuning_in_their_roles() -> None:
    best = [0] * 10, [1, 1, 1, 1, 1, 0, 2, 0, 2, 0], [1, 1, 1, 0, 2, 1, 2, 0, 2, 1]
    zs, icl, ft = (replace(state, label_scores_QC=torch.eye(C, dtype=torch.float64)[labels]) for state, labels in zip((ZS, ICL, FT), best, strict=True))
    row = finetuned_row(baseline(zs, icl), ft, training=TRAINING, random_seed=1)
    assert row["jaccard_changed"] == pytest.approx(5 / (7 + 8 - 5))
    assert row["agreement_icl"] == pytest.approx(6 / 10)
    assert row["kappa_icl"] == pytest.approx((0.6 - 0.37) / (1 - 0.37))
    assert row["kl_label_icl"] == pytest.approx(0.4 * (math.e - 1) / (math.e + 2))  # 4 of 10 differ, by a score of 1 at each of two labels
    assert [row[name] for name in ("num_zs_wrong", "num_zs_wrong_icl_right", "num_zs_wrong_ft_right", "num_zs_wrong_ft_right_icl_right")] == [6, 3, 2, 2]
    assert (row["rec2ftp"], row["rec2ftp_base"]) == (pytest.approx(100), pytest.approx(50))


def test_ties_are_counted_per_fold() -> None:
    tied = FT.label_scores_QC.clone()
    tied[0], tied[3], tied[9] = 0.0, -1.0, torch.tensor([-2.0, -1.0, -1.0])
    row = finetuned_row(baseline(ZS, ICL), replace(FT, label_scores_QC=tied), training=TRAINING, random_seed=1)
    assert row["num_ties"] == 3
    assert {entry["fold"]: entry["num_ties"] for entry in row["folds"]} == {"A": 2, "B": 1}
    assert [row["examples"][query]["prediction"] for query in (0, 3, 9)] == [0, 0, 1]


def test_zero_shot_and_icl_rows_hold_only_what_needs_no_finetuning() -> None:
    kinds = every_kind()
    for name in ONLY_FINETUNED:
        assert kinds["zero_shot"][name] is kinds["icl"][name] is None and kinds["finetuned"][name] is not None
    for name in ("rec2ftp_base", "num_zs_wrong_icl_right"):
        assert kinds["zero_shot"][name] is None and kinds["icl"][name] == kinds["finetuned"][name] is not None
    filled = {kind: {name for layer in kinds[kind]["layers"] for name, value in layer.items() if value is not None} for kind in kinds}
    assert filled["zero_shot"] == {"layer", "fold", "noise_floor", "noise_floor_scores"}
    assert filled["icl"] == {"layer", "fold", "noise_floor", "noise_floor_scores", "sim_am_zs", "sim_am_zs_n", "update_norm_icl", "relative_update_icl"}
    assert filled["finetuned"] == set(names(LAYER)) - {"loss", "delta_norm_q", "delta_norm_o", "delta_norm_mlp"}
    assert [len(kinds[kind]["layers"]) for kind in kinds] == [L, 3 * L, 3 * L, 0]
    figures = {*SIMILARITIES, *POOLED, "update_ratio", "update_norm", "delta_norm", "gradient_norm", "loss"}
    assert {name for name in figures if kinds["icl"][name] is not None} == {"sim_am_zs"}
    assert {name for name in figures if kinds["zero_shot"][name] is not None} == set()


def test_finetuning_that_changes_nothing_is_zero_shot_with_every_similarity_undefined() -> None:
    base = baseline(ZS, ICL)
    row, zero_shot = compared(base, ZS), rows.zero_shot_row(base)
    for name in ("accuracy", "balanced_accuracy", "nll_label", "nll_raw", "prediction_counts", "num_ties"):
        assert row[name] == zero_shot[name]
    for name in (*SIMILARITIES, "sim_aou_pooled", "sim_aou_pooled_prefix"):
        assert row[name] is row[f"{name}_median"] is row[f"{name}_upper"] is None
        assert all(layer[name] is None and layer.get(f"{name}_n", 0) == 0 for layer in row["layers"])
        assert name in POOLED or all(example[name] is None for example in row["examples"])
    assert row["update_norm"] == row["update_ratio"] == row["recovered_aou"] == 0


def test_changes_within_the_noise_leave_every_similarity_undefined() -> None:
    noise = NoiseFloor(torch.full((L,), 1e3, dtype=torch.float64), torch.full((L, H), 1e3, dtype=torch.float64))
    row = compared(baseline(ZS, ICL, noise=noise), capture(3))
    assert {name for name in (*SIMILARITIES, *POOLED) if row[name] is not None} == {"recovered_aou"}
    assert [layer["noise_floor"] for layer in layers_of(row, "all")] == [1e3] * L
    assert [layer["noise_floor"] for layer in layers_of(row, "A")] == [None] * L


def test_finetuning_that_lands_on_icl_scores_1() -> None:
    row = finetuned_row(baseline(ZS, ICL), ICL, training=TRAINING, random_seed=1)
    for name in ("sim_aou", "sim_aou_norm", "sim_am", "sim_am_delta", "sim_aou_pooled", "recovered_aou", "update_ratio", "agreement_icl"):
        assert row[name] == pytest.approx(1, abs=1e-12), name
    assert row["kl_label_icl"] == pytest.approx(0, abs=1e-12)


def test_sizes_of_the_changes_are_means_over_the_queries_of_the_fold() -> None:
    zs, icl, ft = (state.attention_LQD.double().numpy() for state in (ZS, ICL, FT))
    row = finetuned()
    for fold in ("A", "B", "all"):
        keep = [query for query in range(Q) if fold in ("all", FOLD_OF[query])]
        size, size_icl, size_zs = (np.linalg.norm(x[:, keep], axis=2).mean(1) for x in (ft - zs, icl - zs, zs))
        expected = {
            "update_norm": size,
            "update_norm_icl": size_icl,
            "update_ratio": size / size_icl,
            "relative_update": size / size_zs,
            "relative_update_icl": size_icl / size_zs,
        }
        for name, values in expected.items():
            assert [layer[name] for layer in layers_of(row, fold)] == pytest.approx(values.tolist(), rel=1e-12), (fold, name)
    assert row["update_norm"] == pytest.approx(np.linalg.norm(ft - zs, axis=2).mean(), rel=1e-12)


def test_the_update_ratio_is_the_geometric_mean_over_layers() -> None:
    scales = [0.5, 2.0, 4.0, 1.0, 0.25, 8.0, 3.0]
    zs = ZS.attention_LQD.double()
    scaled = zs + torch.tensor(scales).double()[:, None, None] * (ICL.attention_LQD.double() - zs)
    row = finetuned_row(baseline(ZS, ICL), replace(FT, attention_LQD=scaled), training=TRAINING, random_seed=1)
    assert [layer["update_ratio"] for layer in layers_of(row, "all")] == pytest.approx(scales)
    assert row["update_ratio"] == pytest.approx(math.prod(scales) ** (1 / L))
    moved = [layer["update_ratio"] for layer in layers_of(finetuned(), "all") if layer["layer"] != 3]  # layer 3 never moves
    assert finetuned()["update_ratio"] == pytest.approx(math.prod(moved) ** (1 / 6))


def test_the_update_ratio_is_undefined_when_icl_leaves_a_layer_as_it_is() -> None:
    still = moved_from(ZS, ICL, still=[(0, query) for query in range(Q)])
    row = finetuned_row(baseline(ZS, still), FT, training=TRAINING, random_seed=1)
    assert layers_of(row, "all")[0]["update_ratio"] is None and row["update_ratio"] is None
    assert layers_of(row, "all")[0]["recovered_aou"] is None and row["recovered_aou"] is not None


def test_norms_of_training_add_up_over_layers() -> None:
    row = finetuned(training=replace(TRAINING, loss_L=torch.arange(7.0)))
    assert (row["loss"], row["gradient_norm"], row["delta_norm"]) == (2.5, pytest.approx(5), pytest.approx(0.5))
    layers = layers_of(row, "all")
    assert [layer["loss"] for layer in layers] == list(range(7))
    assert [layers[0]["delta_norm_k"], layers[1]["delta_norm_v"], layers[1]["gradient_norm"]] == [0.3, 0.4, 4.0]
    assert layers_of(row, "A")[0]["delta_norm_k"] is None


def test_only_the_random_baselines_depend_on_the_random_seed() -> None:
    first, again, other = finetuned(11), finetuned(11), finetuned(12)
    assert first == again
    differing = {name for name in names(OUTCOME) if first[name] != other[name]}
    assert differing == {name + part for name in RANDOM if not name.endswith("random") for part in ("", "_median", "_lower", "_middle", "_upper")}


def test_random_baselines_score_what_unrelated_changes_score() -> None:
    width = 4000
    zs, ft = capture(1, width=width), capture(3, width=width)
    icl = replace(ICL, attention_LQD=zs.attention_LQD + 1.0)
    row = finetuned_row(baseline(zs, icl), ft, training=TRAINING, random_seed=1)
    # Between a constant and uniform numbers: E[u] / sqrt(E[u^2]) = (1/2) / sqrt(1/3). 70 cosines of width 4,000 have a standard error of .002.
    assert row["sim_aou_uniform_update"] == pytest.approx(math.sqrt(3) / 2, abs=0.01)
    assert row["sim_aou_gaussian_state"] == pytest.approx(0, abs=0.01)
    # Size alone: both updates are as large as the state, and the normalised states have it in common.
    assert row["sim_aou_norm_gaussian_state"] > 0.1


def test_a_fold_without_queries_has_n_0_and_nothing_else() -> None:
    row = finetuned_row(baseline(ZS, ICL, folds=["A"] * Q), FT, training=TRAINING, random_seed=1)
    (empty,) = [entry for entry in row["folds"] if entry["fold"] == "B"]
    assert empty["n"] == 0 and empty["accuracy"] is empty["collapsed"] is empty["kappa_icl"] is empty["nll_label"] is None
    assert all(layer["update_ratio"] is layer["sim_aou"] is layer["sim_aou_pooled"] is None for layer in layers_of(row, "B"))


def test_a_diverged_row_says_when_and_holds_no_figures() -> None:
    row = every_kind()["diverged"]
    told = {"status": "diverged", "diverged_step": 3, "last_finite_loss": 4.5, "n": Q, "label_words": WORDS, "num_queries_left_out": 2}
    assert {name: value for name, value in row.items() if value not in (None, [])} == told
    assert rows.diverged_row(num_queries=Q, label_words=WORDS, step=1, last_finite_loss=None)["last_finite_loss"] is None


def test_a_capture_that_is_not_finite_gets_no_row() -> None:
    bad = replace(FT, attention_LQD=FT.attention_LQD.clone())
    bad.attention_LQD[0, 0, 0] = math.nan
    with pytest.raises(AssertionError, match="diverged"):
        finetuned_row(baseline(ZS, ICL), bad, training=TRAINING, random_seed=1)


def test_a_capture_of_other_queries_is_refused() -> None:
    with pytest.raises(AssertionError, match="shaped as zero-shot's"):
        finetuned_row(baseline(ZS, ICL), some(FT, [0, 1]), training=TRAINING, random_seed=1)


def test_where_positions_are_relative_layer_0_has_no_sim_am_delta_and_its_other_figures_stay() -> None:
    for is_still in (False, True):
        held = replace(baseline(ZS, ICL), is_first_layer_still=is_still)
        first, second, *_ = layers_of(finetuned_row(held, capture(3), training=TRAINING, random_seed=1), "all")
        assert (first["sim_am_delta"] is None) == is_still
        assert (first["sim_am_delta_n"] == 0) == is_still
        assert first["sim_am"] is not None
        assert second["sim_am_delta"] is not None


def test_prefix_figures_compare_with_the_prefix_and_with_nothing_else() -> None:
    base = baseline(ZS, ICL)
    row, of_icl = compared(base, FT, prefix=ICL), compared(base, FT)
    for name in ("sim_aou", "sim_aou_norm", "sim_am", "sim_am_delta", "sim_aou_pooled"):
        assert row[f"{name}_prefix"] == pytest.approx(row[name], rel=1e-12)  # where the prefix is all there is
        assert of_icl[f"{name}_prefix"] != row[f"{name}_prefix"] and of_icl[name] == row[name]
    alone = finetuned_row(base, FT, training=TRAINING, random_seed=11)
    assert {name for name in (*SIMILARITIES, *POOLED) if alone[name] is None} == {
        n for n in (*SIMILARITIES, *POOLED) if n.endswith("_prefix") or "kendall" in n or "topk" in n
    }


def test_the_reference_has_an_eps_where_this_project_has_null_and_counts_layer_0() -> None:
    noise = NoiseFloor(torch.full((L,), 1e3, dtype=torch.float64), torch.full((L, H), 1e3, dtype=torch.float64))
    clean, eps = baseline(ZS, ICL), replace(baseline(ZS, ICL, noise=noise), has_eps=True, counts_first_layer=True)
    row = compared(eps, FT)
    still = layers_of(row, "all")[3]
    assert (still["sim_aou"], still["sim_am_delta"], still["sim_aou_n"]) == (0.0, 0.0, Q)
    assert layers_of(row, "all")[0]["sim_aou"] == pytest.approx(layers_of(compared(clean, FT), "all")[0]["sim_aou"], rel=1e-12)
    assert row["sim_am_delta"] == pytest.approx(np.mean([layer["sim_am_delta"] for layer in layers_of(row, "all")]), rel=1e-12)


def test_R_is_over_the_layers_that_move_beyond_the_noise() -> None:
    # Only layer 6 learns; below it packing alone moves the states, by a tenth of what counts.
    state = moved_from(ZS, capture(3), still=[(layer, query) for layer in range(6) for query in range(Q)])
    noise = NoiseFloor(torch.full((L,), 1e-6, dtype=torch.float64), torch.zeros(L, H, dtype=torch.float64))
    for shake in (0.0, 1e-7, 3e-6):
        shaken = state.attention_LQD.clone()
        shaken[:6, :, 0] += shake
        row = compared(baseline(ZS, ICL, noise=noise), replace(state, attention_LQD=shaken))
        assert row["update_ratio"] == pytest.approx(layers_of(row, "all")[6]["update_ratio"], rel=1e-12)
    assert compared(baseline(ZS, ICL, noise=noise), ZS)["update_ratio"] == 0


def test_a_lane_has_the_same_row_among_others_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base, prefix = baseline(ZS, ICL), replace(comparison.changed(ZS, PREFIX), items=ITEMS, random_ranks=comparison.random_ranks(PREFIX, ITEMS))
    lanes = [
        Lane(state, TRAINING, seed) for seed, state in enumerate((FT, capture(5), moved_from(ZS, capture(6), still=[(2, 1)]), replace(FT, ranked_LQT=None)))
    ]
    alone = [finetuned_row(base, lane.finetuned, training=lane.training, random_seed=lane.random_seed, prefix=prefix) for lane in lanes]
    assert rows.finetuned_rows(base, lanes[:3], prefix=prefix) == alone[:3]
    monkeypatch.setattr(comparison, "NUMBERS_AT_ONCE", 1)
    assert rows.finetuned_rows(base, lanes, prefix=prefix) == alone
    assert rows.finetuned_rows(base, [], prefix=prefix) == []
