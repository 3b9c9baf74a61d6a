"""Captures in, rows out: the outcome and nested columns of one cell as plain Python values.

Knows the columns, the folds and how figures are averaged. Knows nothing of models, training or files. NULL is None; no NaN leaves this module.
"""

# L layers  Q queries  H query heads  T positions  D width  C labels

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iclgd_dist import metrics
from iclgd_dist.metrics import Answers, AttentionChange, Capture, NoiseFloor, ScoreChange
from iclgd_dist.schema import ACCURACY, EXAMPLE, FOLD, FOLDS, LAYER, NESTED, OUTCOME, POOLED, SIMILARITIES

Row = dict[str, Any]
PARTS = ("median", "lower", "middle", "upper")
ICL_COUNTS = ("rec2ftp_base", "num_zs_wrong", "num_zs_wrong_icl_right")  # those of rec2ftp's figures that need no finetuning


@dataclass(frozen=True)
class TrainingRecord:
    """What the update that led to a step reports, of one lane."""

    loss: float
    loss_L: Sequence[float] | Tensor | None  # None where layers have no loss of their own
    gradient_norm_L: Sequence[float] | Tensor
    delta_norm_k_L: Sequence[float] | Tensor
    delta_norm_v_L: Sequence[float] | Tensor


@dataclass(frozen=True)
class Baseline:
    """Zero-shot and ICL on the same queries, and all that can be said before anything is trained. Made once for a block."""

    zero_shot: Capture
    noise: NoiseFloor
    gold_Q: Tensor
    fold_masks: dict[str, Tensor]  # (Q,) per fold: A, B, all
    folds: tuple[str, ...]
    query_ids: tuple[str, ...]
    label_words: tuple[str, ...]
    num_queries_left_out: int
    zero_shot_answers: Answers
    in_context_answers: Answers
    attention: tuple[AttentionChange, ...]  # of ICL, per layer
    scores: tuple[ScoreChange, ...]  # of ICL, per layer
    is_first_layer_still: bool
    zero_shot_norm_LQ: Tensor
    in_context_norm_LQ: Tensor
    sim_am_zs_LQ: Tensor


def make_baseline(
    *,
    zero_shot: Capture,
    in_context: Capture,
    noise: NoiseFloor,
    gold_Q: Sequence[int],
    folds_Q: Sequence[str],
    query_ids: Sequence[str],
    label_words: Sequence[str],
    num_queries_left_out: int = 0,
    is_first_layer_still: bool = False,
) -> Baseline:
    """Return the baseline of a block: captures on the CPU, `folds_Q` A or B for each query.

    `is_first_layer_still`: positions are relative (rotary, ALiBi), so that a context cannot change layer 0's scores of the query's own tokens. What
    is measured there is the rounding of rotations at other positions, and sim_am_delta is undefined.
    """
    assert len(gold_Q) == len(folds_Q) == len(query_ids) == zero_shot.attention_LQD.shape[1], "one gold label, fold and id per query"
    assert len(label_words) == zero_shot.label_scores_QC.shape[1], "one score per label"
    assert set(folds_Q) <= {"A", "B"}, "folds are A and B"
    _check(zero_shot, zero_shot)
    _check(in_context, zero_shot)
    gold = torch.tensor(gold_Q, dtype=torch.int64)
    layers = range(len(zero_shot.attention_LQD))
    attention = [metrics.vectors(layer_QD) for layer_QD in zero_shot.attention_LQD]
    changes = tuple(metrics.attention_change(attention[layer], in_context.attention_LQD[layer]) for layer in layers)
    scores = tuple(metrics.score_change(zero_shot.scores_LQHT[layer], in_context.scores_LQHT[layer]) for layer in layers)
    return Baseline(
        zero_shot=zero_shot,
        noise=noise,
        gold_Q=gold,
        fold_masks={fold: torch.tensor([fold in ("all", mine) for mine in folds_Q], dtype=torch.bool) for fold in FOLDS},
        folds=tuple(folds_Q),
        query_ids=tuple(query_ids),
        label_words=tuple(label_words),
        num_queries_left_out=num_queries_left_out,
        is_first_layer_still=is_first_layer_still,
        zero_shot_answers=metrics.answers(zero_shot.label_scores_QC, gold),
        in_context_answers=metrics.answers(in_context.label_scores_QC, gold),
        attention=changes,
        scores=scores,
        zero_shot_norm_LQ=torch.stack([layer.norm for layer in attention]),
        in_context_norm_LQ=torch.stack([change.raw.norm for change in changes]),
        sim_am_zs_LQ=torch.stack([metrics.sim_am_zs(scores[layer], zero_shot.scores_LQHT[layer]) for layer in layers]),
    )


def zero_shot_row(baseline: Baseline) -> Row:
    """Return the row of the zero-shot cell: accuracy, and the noise floor of each layer."""
    layers = _layer_rows("all", baseline, _floors(baseline))
    return _row(baseline, baseline.zero_shot_answers, layers=layers, examples=_example_rows(baseline, baseline.zero_shot_answers, {}))


def icl_row(baseline: Baseline) -> Row:
    """Return the row of the ICL cell: accuracy, what it corrects of zero-shot, and the size of its changes.

    What compares a cell with ICL (agreement, kappa, ...) is NULL here.
    """
    similarities = {"sim_am_zs": baseline.sim_am_zs_LQ}
    columns = {fold: _means(similarities, mask) | _in_context_sizes(baseline, mask) for fold, mask in baseline.fold_masks.items()}
    columns["all"] |= _floors(baseline)
    return _row(
        baseline,
        baseline.in_context_answers,
        figures=_over_layers(columns["all"]),
        layers=[row for fold in FOLDS for row in _layer_rows(fold, baseline, columns[fold])],
        examples=_example_rows(baseline, baseline.in_context_answers, similarities),
    )


def finetuned_row(baseline: Baseline, finetuned: Capture, *, training: TrainingRecord, random_seed: int) -> Row:
    """Return the row of a finetuned cell whose captures are all finite; `random_seed` (from the cell's key) draws the random baselines."""
    _check(finetuned, baseline.zero_shot)
    similarities, inner_LQ, norm_LQ = _compare(baseline, finetuned, random_seed)
    columns = {}
    for fold, mask in baseline.fold_masks.items():
        icl_norm, norm, inner = baseline.in_context_norm_LQ[:, mask], norm_LQ[:, mask], inner_LQ[:, mask]
        columns[fold] = _means(similarities, mask) | _in_context_sizes(baseline, mask)
        columns[fold] |= {
            "sim_aou_pooled": metrics.sim_aou_pooled(inner, icl_norm, norm, floor_L=baseline.noise.attention_L),
            "recovered_aou": metrics.recovered_aou(inner, icl_norm, norm),
            "update_ratio": metrics.update_ratio(norm, icl_norm),
            "relative_update": metrics.relative_update(norm, baseline.zero_shot_norm_LQ[:, mask]),
            "update_norm": norm.mean(1),
        }
    norm_k, norm_v, gradient = (_float64(part) for part in (training.delta_norm_k_L, training.delta_norm_v_L, training.gradient_norm_L))
    columns["all"] |= _floors(baseline) | {"delta_norm_k": norm_k, "delta_norm_v": norm_v, "gradient_norm": gradient}
    columns["all"] |= {} if training.loss_L is None else {"loss": _float64(training.loss_L)}
    answers = metrics.answers(finetuned.label_scores_QC, baseline.gold_Q)
    sizes = {
        "update_ratio": metrics.geometric_mean(columns["all"]["update_ratio"]),
        "update_norm": float(columns["all"]["update_norm"].mean()),
        "delta_norm": float(torch.cat([norm_k, norm_v]).norm()),
        "gradient_norm": float(gradient.norm()),
        "loss": training.loss,
    }
    return _row(
        baseline,
        answers,
        figures=_over_layers(columns["all"]) | sizes,
        layers=[row for fold in FOLDS for row in _layer_rows(fold, baseline, columns[fold])],
        examples=_example_rows(baseline, answers, similarities, norm_LQ),
    )


def diverged_row(*, num_queries: int, label_words: Sequence[str], step: int, last_finite_loss: float | None, num_queries_left_out: int = 0) -> Row:
    """Return the row of a finetuned cell at or after the first `step` whose loss, gradient or capture was not finite."""
    row: Row = dict.fromkeys(name for name, _, _ in OUTCOME) | {name: [] for name, _, _ in NESTED}
    row |= {"status": "diverged", "diverged_step": step, "last_finite_loss": _plain(last_finite_loss)}
    return row | {"n": num_queries, "label_words": list(label_words), "num_queries_left_out": num_queries_left_out}


# --- Figures per layer and query


def _compare(baseline: Baseline, finetuned: Capture, seed: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Return every similarity, <u_ICL, u_FT> and |u_FT|, each (L, Q)."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[Tensor]] = defaultdict(list)
    # One layer at a time stays in the processor's cache: five times as fast as all layers at once.
    for layer, (icl, icl_scores) in enumerate(zip(baseline.attention, baseline.scores, strict=True)):
        zero_shot, floor, floor_H = metrics.vectors(baseline.zero_shot.attention_LQD[layer]), baseline.noise.attention_L[layer], baseline.noise.scores_LH[layer]
        ft = metrics.attention_change(zero_shot, finetuned.attention_LQD[layer])
        states = {
            "uniform_update": metrics.attention_change(zero_shot, metrics.uniform_update(zero_shot, generator)),
            "gaussian_state": metrics.attention_change(zero_shot, metrics.gaussian_state(zero_shot, ft.raw.norm, generator)),
        }
        found["sim_aou"].append(metrics.sim_aou(icl, ft, floor_L=floor))
        found["sim_aou_norm"].append(metrics.sim_aou_norm(icl, ft, floor_L=floor))
        moved_Q = metrics.is_above_floor(ft.raw.norm, floor)  # a random baseline stands beside a similarity or not at all
        for name, state in states.items():
            found[f"sim_aou_{name}"].append(metrics.defined_where(moved_Q, metrics.sim_aou(icl, state, floor_L=floor)))
            found[f"sim_aou_norm_{name}"].append(metrics.defined_where(moved_Q, metrics.sim_aou_norm(icl, state, floor_L=floor)))
        ft_scores = metrics.score_change(baseline.zero_shot.scores_LQHT[layer], finetuned.scores_LQHT[layer])
        found["sim_am"].append(metrics.sim_am(icl_scores, ft_scores, floor_LH=floor_H))
        found["sim_am_delta"].append(metrics.sim_am_delta(icl_scores, ft_scores, floor_LH=floor_H))
        found["inner"].append(metrics.inner(icl.raw, ft.raw))
        found["norm"].append(ft.raw.norm)
    stacked = {name: torch.stack(layers) for name, layers in found.items()}
    if baseline.is_first_layer_still:
        stacked["sim_am_delta"][0] = math.nan
    # Over the layers and queries that sim_am speaks of, so that the two can be set side by side; ICL's own row has it for all.
    stacked["sim_am_zs"] = torch.where(stacked["sim_am"].isnan(), math.nan, baseline.sim_am_zs_LQ)
    return {name: stacked[name] for name in SIMILARITIES if name in stacked}, stacked["inner"], stacked["norm"]


def _check(capture: Capture, zero_shot: Capture) -> None:
    assert capture.is_finite(), "a capture that is not finite has no figures: its cell is diverged"
    for part in ("attention_LQD", "scores_LQHT", "label_scores_QC"):
        got, required = getattr(capture, part).shape, getattr(zero_shot, part).shape
        assert got == required, f"{part} must be shaped as zero-shot's, {tuple(required)}, got {tuple(got)}"


# --- Means over queries and layers


def _means(similarities: dict[str, Tensor], mask_Q: Tensor) -> dict[str, Tensor]:
    """Return the mean over the fold's defined queries of each similarity, and their number, per layer."""
    values = {name: figure_LQ[:, mask_Q] for name, figure_LQ in similarities.items()}
    means = {name: figure_LQ.nanmean(1) for name, figure_LQ in values.items()}
    return means | {f"{name}_n": (~figure_LQ.isnan()).sum(1) for name, figure_LQ in values.items()}


def _in_context_sizes(baseline: Baseline, mask_Q: Tensor) -> dict[str, Tensor]:
    norm, zero_shot_norm = baseline.in_context_norm_LQ[:, mask_Q], baseline.zero_shot_norm_LQ[:, mask_Q]
    return {"update_norm_icl": norm.mean(1), "relative_update_icl": metrics.relative_update(norm, zero_shot_norm)}


def _floors(baseline: Baseline) -> dict[str, Tensor]:
    return {"noise_floor": baseline.noise.attention_L, "noise_floor_scores": baseline.noise.scores_LH}


def _counted(name: str, figure: Tensor) -> Tensor:
    """Return the layers that count in a mean over layers, NaN in the others: layer 0 of sim_am_delta holds at most a shift of position."""
    if name != "sim_am_delta":
        return figure
    return torch.cat([torch.full_like(figure[:1], math.nan), figure[1:]])


def _over_layers(columns: dict[str, Tensor]) -> dict[str, float]:
    """Return mean, median and the means of the three thirds over the layers where each figure is defined."""
    found = {}
    for name in (*SIMILARITIES, *POOLED):
        if name in columns:
            figure_L = _counted(name, columns[name])
            thirds = [float(third.nanmean()) for third in figure_L.tensor_split(3)]
            found[name] = float(figure_L.nanmean())
            # Not nanmedian, which takes the lower of two middle values.
            found |= {f"{name}_{part}": value for part, value in zip(PARTS, [float(figure_L.nanquantile(0.5)), *thirds], strict=True)}
    return found


# --- Rows


def _row(baseline: Baseline, answers: Answers, *, layers: list[Row], examples: list[Row], figures: dict[str, float] | None = None) -> Row:
    row: Row = dict.fromkeys(name for name, _, _ in OUTCOME)
    row |= {"status": "done", "label_words": list(baseline.label_words), "num_queries_left_out": baseline.num_queries_left_out}
    row |= {name: _plain(value) for name, value in (figures or {}).items()}
    row |= _accuracy(baseline, answers, baseline.fold_masks["all"])
    row["prediction_counts"] = answers.predictions_Q.bincount(minlength=len(baseline.label_words)).tolist()
    folds = [dict.fromkeys(name for name, _, _ in FOLD) | {"fold": fold} | _accuracy(baseline, answers, baseline.fold_masks[fold]) for fold in ("A", "B")]
    return row | {"folds": folds, "layers": layers, "examples": examples, "measures": []}


def _accuracy(baseline: Baseline, answers: Answers, mask_Q: Tensor) -> Row:
    """Return the accuracy figures of a set of queries. What compares with ICL is NULL for zero-shot and for ICL itself."""
    gold, predicted = baseline.gold_Q[mask_Q], answers.predictions_Q[mask_Q]
    zero_shot, icl = baseline.zero_shot_answers.predictions_Q[mask_Q], baseline.in_context_answers.predictions_Q[mask_Q]
    row: Row = dict.fromkeys(name for name, _, _ in ACCURACY)
    row |= {
        "n": len(gold),
        "accuracy": metrics.accuracy(predicted, gold),
        "balanced_accuracy": metrics.balanced_accuracy(predicted, gold),
        "nll_label": answers.nll_label_Q[mask_Q].mean(),
        "nll_raw": answers.nll_raw_Q[mask_Q].mean(),
        "majority_baseline": metrics.majority_baseline(gold),
        "majority_share_predicted": metrics.majority_share_predicted(predicted),
        "collapsed": metrics.collapsed(predicted, gold) if len(gold) else None,
        "num_ties": int(answers.is_tie_Q[mask_Q].sum()),
    }
    recovery = metrics.rec2ftp(zero_shot == gold, icl == gold, predicted == gold)
    if answers is baseline.zero_shot_answers:
        row["num_zs_wrong"] = recovery["num_zs_wrong"]
    elif answers is baseline.in_context_answers:
        row |= {name: recovery[name] for name in ICL_COUNTS}
    else:
        row |= recovery
        row["jaccard_changed"] = metrics.jaccard_changed(zero_shot, icl, predicted)
        row["agreement_icl"] = metrics.agreement(icl, predicted)
        row["kappa_icl"] = metrics.cohen_kappa(icl, predicted)
        row["kl_label_icl"] = metrics.kl_label(baseline.in_context_answers.label_scores_QC[mask_Q], answers.label_scores_QC[mask_Q]).mean()
    return {name: _plain(value) for name, value in row.items()}


def _layer_rows(fold: str, baseline: Baseline, columns: dict[str, Tensor]) -> list[Row]:
    num_layers = len(baseline.attention)
    table: dict[str, Sequence[Any]] = {name: [None] * num_layers for name, _, _ in LAYER}
    table |= {"layer": range(num_layers), "fold": [fold] * num_layers} | {name: _plain_list(figure) for name, figure in columns.items()}
    return _transpose(table)


def _example_rows(baseline: Baseline, answers: Answers, similarities: dict[str, Tensor], update_norm_LQ: Tensor | None = None) -> list[Row]:
    num_queries = len(baseline.query_ids)
    table: dict[str, Sequence[Any]] = {name: [None] * num_queries for name, _, _ in EXAMPLE}
    table |= {"query": baseline.query_ids, "fold": baseline.folds, "gold": baseline.gold_Q.tolist(), "prediction": answers.predictions_Q.tolist()}
    table |= {"label_scores": answers.label_scores_QC.tolist(), "nll_label": _plain_list(answers.nll_label_Q)}
    table |= {name: _plain_list(_counted(name, figure_LQ).nanmean(0)) for name, figure_LQ in similarities.items()}
    table |= {} if update_norm_LQ is None else {"update_norm": _plain_list(update_norm_LQ.mean(0))}
    return _transpose(table)


def _transpose(table: dict[str, Sequence[Any]]) -> list[Row]:
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _plain(value: Any) -> Any:
    """Return a plain Python value; None for NaN and infinity."""
    value = value.item() if isinstance(value, Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain_list(values: Tensor) -> list[Any]:
    return [_plain(value) for value in values.tolist()]


def _float64(values: Iterable[float] | Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64).cpu()
