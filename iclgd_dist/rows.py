"""Captures in, rows out: the outcome and nested columns of one cell as plain Python values.

Knows the columns, the folds and how figures are averaged. Knows nothing of models, training or files. NULL is None; no NaN leaves this module.
"""

# N lanes  L layers  Q queries  H query heads  T positions  D width  C labels

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iclgd_dist import calibration, metrics
from iclgd_dist.comparison import Baseline, InContext, compared
from iclgd_dist.metrics import Answers, Capture
from iclgd_dist.schema import ACCURACY, EXAMPLE, FOLD, FOLDS, LAYER, NESTED, OUTCOME, POOLED, SIMILARITIES

Row = dict[str, Any]
PARTS = ("median", "lower", "middle", "upper")
ICL_COUNTS = ("rec2ftp_base", "num_zs_wrong", "num_zs_wrong_icl_right")  # those of rec2ftp's figures that need no finetuning


@dataclass(frozen=True)
class TrainingRecord:
    """What the update that led to a step reports, of one lane. NaN: nothing learns there."""

    loss: float
    loss_L: Sequence[float] | Tensor | None  # None where layers have no loss of their own
    gradient_norm_L: Sequence[float] | Tensor
    delta_norms_L: Mapping[str, Sequence[float] | Tensor]  # part (q, k, v, o, mlp) -> norms


@dataclass(frozen=True)
class Lane:
    """A finetuned cell that is to become a row; `random_seed` (from the cell's key) draws its random baselines."""

    finetuned: Capture
    training: TrainingRecord
    random_seed: int


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
        figures=_over_layers(baseline, columns["all"]),
        layers=[row for fold in FOLDS for row in _layer_rows(fold, baseline, columns[fold])],
        examples=_example_rows(baseline, baseline.in_context_answers, similarities),
    )


def finetuned_rows(baseline: Baseline, lanes: Sequence[Lane], *, prefix: InContext | None = None) -> list[Row]:
    """Return the rows of finetuned cells whose captures are all finite.

    `prefix`: the queries after exactly the demonstrations trained on.
    """
    of_lanes = compared(baseline, [lane.finetuned for lane in lanes], [lane.random_seed for lane in lanes], prefix)
    return [_finetuned_row(baseline, lane, figures, prefix) for lane, figures in zip(lanes, of_lanes, strict=True)]


def _finetuned_row(baseline: Baseline, lane: Lane, figures: dict[str, Tensor], prefix: InContext | None) -> Row:
    finetuned, training, norm_LQ = lane.finetuned, lane.training, figures["norm"]
    similarities = {name: figures[name] for name in SIMILARITIES}
    columns = {}
    floor_L = torch.stack([baseline.floors(layer)[0] for layer in range(len(norm_LQ))])
    for fold, mask in baseline.fold_masks.items():
        icl_norm, norm = baseline.in_context.norm_LQ[:, mask], norm_LQ[:, mask]
        columns[fold] = _means(similarities, mask) | _in_context_sizes(baseline, mask)
        columns[fold] |= {
            "sim_aou_pooled": metrics.sim_aou_pooled(figures["inner"][:, mask], icl_norm, norm, floor_L=floor_L),
            "recovered_aou": metrics.recovered_aou(figures["inner"][:, mask], icl_norm, norm),
            "update_ratio": metrics.update_ratio(norm, icl_norm),
            "relative_update": metrics.relative_update(norm, baseline.zero_shot_norm_LQ[:, mask]),
            "update_norm": norm.mean(1),
        }
        if prefix is not None:
            pooled = metrics.sim_aou_pooled(figures["inner_prefix"][:, mask], prefix.norm_LQ[:, mask], norm, floor_L=floor_L)
            columns[fold] |= {"sim_aou_pooled_prefix": pooled}
    gradient = _float64(training.gradient_norm_L)
    delta_norms = {part: _float64(norms) for part, norms in training.delta_norms_L.items()}
    columns["all"] |= _floors(baseline) | {"gradient_norm": gradient} | {f"delta_norm_{part}": norms for part, norms in delta_norms.items()}
    columns["all"] |= {} if training.loss_L is None else {"loss": _float64(training.loss_L)}
    answers = metrics.answers(finetuned.label_scores_QC, baseline.gold_Q)
    sizes = {
        "update_ratio": whole_ratio(baseline, columns["all"]["update_ratio"], norm_LQ),
        "update_norm": float(columns["all"]["update_norm"].mean()),
        "delta_norm": float(torch.cat(list(delta_norms.values())).nan_to_num(0.0).norm()),
        "gradient_norm": float(gradient.nan_to_num(0.0).norm()),
        "loss": training.loss,
    }
    return _row(
        baseline,
        answers,
        figures=_over_layers(baseline, columns["all"]) | sizes,
        layers=[row for fold in FOLDS for row in _layer_rows(fold, baseline, columns[fold])],
        examples=_example_rows(baseline, answers, similarities, norm_LQ),
    )


def whole_ratio(baseline: Baseline, ratio_L: Tensor, norm_LQ: Tensor) -> float:
    """Return R: the geometric mean of the layers' update ratios, over the layers that finetuning changes by more than 10 x the noise floor.

    0 where finetuning changes none: below a layer that learns alone there is nothing but noise, and a mean over it would depend on packing.
    """
    floor_L = torch.stack([baseline.floors(layer)[0] for layer in range(len(ratio_L))])
    counts_L = metrics.is_above_floor(norm_LQ.mean(1), floor_L)
    return metrics.geometric_mean(ratio_L[counts_L]) if counts_L.any() else 0.0 if norm_LQ.isfinite().all() else math.nan


def diverged_row(*, num_queries: int, label_words: Sequence[str], step: int, last_finite_loss: float | None, num_queries_left_out: int = 0) -> Row:
    """Return the row of a finetuned cell at or after the first `step` whose loss, gradient or capture was not finite."""
    row: Row = dict.fromkeys(name for name, _, _ in OUTCOME) | {name: [] for name, _, _ in NESTED}
    row |= {"status": "diverged", "diverged_step": step, "last_finite_loss": _plain(last_finite_loss)}
    return row | {"n": num_queries, "label_words": list(label_words), "num_queries_left_out": num_queries_left_out}


# --- Means over queries and layers


def _means(similarities: dict[str, Tensor], mask_Q: Tensor) -> dict[str, Tensor]:
    """Return the mean over the fold's defined queries of each similarity, and their number, per layer."""
    values = {name: figure_LQ[:, mask_Q] for name, figure_LQ in similarities.items()}
    means = {name: figure_LQ.nanmean(1) for name, figure_LQ in values.items()}
    return means | {f"{name}_n": (~figure_LQ.isnan()).sum(1) for name, figure_LQ in values.items()}


def _in_context_sizes(baseline: Baseline, mask_Q: Tensor) -> dict[str, Tensor]:
    norm, zero_shot_norm = baseline.in_context.norm_LQ[:, mask_Q], baseline.zero_shot_norm_LQ[:, mask_Q]
    return {"update_norm_icl": norm.mean(1), "relative_update_icl": metrics.relative_update(norm, zero_shot_norm)}


def _floors(baseline: Baseline) -> dict[str, Tensor]:
    return {"noise_floor": baseline.noise.attention_L, "noise_floor_scores": baseline.noise.scores_LH}


def _counted(baseline: Baseline, name: str, figure: Tensor) -> Tensor:
    """Return the layers that count in a mean over layers, NaN in the others: layer 0 of sim_am_delta holds at most a shift of position."""
    if name not in ("sim_am_delta", "sim_am_delta_prefix") or baseline.counts_first_layer:
        return figure
    return torch.cat([torch.full_like(figure[:1], math.nan), figure[1:]])


def _over_layers(baseline: Baseline, columns: dict[str, Tensor]) -> dict[str, float]:
    """Return mean, median and the means of the three thirds over the layers where each figure is defined."""
    found = {}
    for name in (*SIMILARITIES, *POOLED):
        if name in columns:
            figure_L = _counted(baseline, name, columns[name])
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
    row |= calibration.figures(answers.label_scores_QC[mask_Q], gold)
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
    num_layers = len(baseline.in_context.attention)
    table: dict[str, Sequence[Any]] = {name: [None] * num_layers for name, _, _ in LAYER}
    table |= {"layer": range(num_layers), "fold": [fold] * num_layers} | {name: _plain_list(figure) for name, figure in columns.items()}
    return _transpose(table)


def _example_rows(baseline: Baseline, answers: Answers, similarities: dict[str, Tensor], update_norm_LQ: Tensor | None = None) -> list[Row]:
    num_queries = len(baseline.query_ids)
    table: dict[str, Sequence[Any]] = {name: [None] * num_queries for name, _, _ in EXAMPLE}
    table |= {"query": baseline.query_ids, "fold": baseline.folds, "gold": baseline.gold_Q.tolist(), "prediction": answers.predictions_Q.tolist()}
    table |= {"label_scores": answers.label_scores_QC.tolist(), "nll_label": _plain_list(answers.nll_label_Q)}
    table |= {name: _plain_list(_counted(baseline, name, figure_LQ).nanmean(0)) for name, figure_LQ in similarities.items()}
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
