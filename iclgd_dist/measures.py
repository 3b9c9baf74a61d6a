"""Figures that compare a cell with a control or with another cell, or that a sweep file adds: rows of the nested `measures` column.

Knows captures, folds and the columns of a measure. Knows nothing of how captures are made, or of files.
"""

# L layers  Q queries  H query heads  T positions  D width

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from iclgd_dist import metrics, own_code
from iclgd_dist.comparison import Baseline
from iclgd_dist.config import SweepError
from iclgd_dist.extensions import MetricSpec
from iclgd_dist.metrics import AttentionChange, Capture, ScoreChange, Vectors
from iclgd_dist.rows import Row

Figures = Mapping[str, Tensor]  # metric -> (L, Q), or (Q,) for a figure of the whole model; NaN = undefined


class Metric(Protocol):
    """A figure of the user's own; means, folds and NULLs are the caller's."""

    def __call__(self, zero_shot: Capture, in_context: Capture, finetuned: Capture) -> Tensor: ...  # (L, Q) or (Q,), NaN = undefined


def measure_rows(kind: str, name: str, figures: Figures, fold_masks: Mapping[str, Tensor]) -> list[Row]:
    """Return one row per figure, layer and fold: how many queries are defined, their mean and standard deviation."""
    rows: list[Row] = []
    for metric, values in figures.items():
        values_LQ = values.double() if values.dim() == 2 else values.double()[None]
        layers = range(len(values_LQ)) if values.dim() == 2 else [None]
        by_fold = {fold: _moments(values_LQ[:, mask_Q]) for fold, mask_Q in fold_masks.items()}
        for number, layer in enumerate(layers):
            for fold, (counts, means, deviations) in by_fold.items():
                n, mean, sd = counts[number], means[number], deviations[number]
                spread = {"n": n, "mean": mean if n else None, "sd": sd if n > 1 else None}
                rows.append({"kind": kind, "name": name, "metric": metric, "layer": layer, "fold": fold} | spread)
    return rows


def _moments(values_LQ: Tensor) -> tuple[list[int], list[float], list[float]]:
    """Return how many values of each layer are finite, their mean and their standard deviation; NaN of none, or of one."""
    is_defined_LQ = values_LQ.isfinite()
    n_L = is_defined_LQ.sum(1)
    mean_L = torch.where(is_defined_LQ, values_LQ, 0.0).sum(1) / n_L
    sd_L = (torch.where(is_defined_LQ, values_LQ - mean_L[:, None], 0.0).square().sum(1) / (n_L - 1)).sqrt()
    return n_L.tolist(), mean_L.tolist(), sd_L.tolist()


def _similarities(baseline: Baseline, layer: int, a: tuple[AttentionChange, ScoreChange], b: tuple[AttentionChange, ScoreChange]) -> dict[str, Tensor]:
    """Return what is compared of two states at a layer, per query (Q,)."""
    floor, floor_H = baseline.floors(layer)
    delta_Q = metrics.sim_am_delta(a[1], b[1], floor_LH=floor_H)
    if baseline.is_first_layer_still and layer == 0:
        delta_Q = torch.full_like(delta_Q, math.nan)
    found = {"sim_aou": metrics.sim_aou(a[0], b[0], floor_L=floor), "sim_aou_norm": metrics.sim_aou_norm(a[0], b[0], floor_L=floor), "sim_am_delta": delta_Q}
    return {name: baseline.settle(values) for name, values in found.items()}


def _changes(baseline: Baseline, capture: Capture, layer: int) -> tuple[AttentionChange, ScoreChange]:
    zero_shot = baseline.zero_shot
    attention = metrics.attention_change(metrics.vectors(zero_shot.attention_LQD[layer]), capture.attention_LQD[layer])
    return attention, metrics.score_change(zero_shot.scores_LQHT[layer], capture.scores_LQHT[layer])


def context_measures(baseline: Baseline, contexts: Mapping[str, Capture]) -> list[Row]:
    """Return the controls of an ICL cell: the cosines of ICL's changes with those that each control context makes."""
    figures = {name: similarities_of(baseline, capture) for name, capture in contexts.items()}
    return [row for name, of_control in figures.items() for row in measure_rows("control", name, of_control, baseline.fold_masks)]


def similarities_of(baseline: Baseline, capture: Capture) -> dict[str, Tensor]:
    """Return the similarities (L, Q) of a state's changes with ICL's."""
    icl = baseline.in_context
    return _stacked([_similarities(baseline, n, (icl.attention[n], icl.scores[n]), _changes(baseline, capture, n)) for n in range(len(icl.attention))])


def control_measures(baseline: Baseline, contexts: Mapping[str, Capture], finetuned: Sequence[Capture]) -> list[list[Row]]:
    """Return, for each finetuned capture, its similarities with the contexts that teach nothing or something else.

    Two controls need no context: `other_query`, the change of ICL on one query with finetuning's on the next of its fold; and `centred`, each change
    minus its mean over the fold.
    """
    by_name: list[dict[str, dict[str, list[Tensor]]]] = [{} for _ in finetuned]
    shifted: list[dict[tuple[str, str], list[Tensor]]] = [defaultdict(list) for _ in finetuned]
    for layer in range(len(baseline.noise.attention_L)):
        changes = {name: _changes(baseline, capture, layer) for name, capture in contexts.items()}  # once for all lanes
        zero_shot_QD = baseline.zero_shot.attention_LQD[layer].double()
        icl_QD = baseline.in_context.capture.attention_LQD[layer].double() - zero_shot_QD
        for found, moved, capture in zip(by_name, shifted, finetuned, strict=True):
            own = _changes(baseline, capture, layer)
            for name, change in changes.items():
                for metric, values in _similarities(baseline, layer, change, own).items():
                    found.setdefault(name, {}).setdefault(metric, []).append(values)
            own_QD = capture.attention_LQD[layer].double() - zero_shot_QD
            for fold, mask_Q in baseline.fold_masks.items():
                for name, shift in (("other_query", _next_query), ("centred", _centred)):
                    moved[name, fold].append(_shifted_cosine(baseline, layer, *shift(icl_QD[mask_Q], own_QD[mask_Q])))
    rows = []
    for found, moved in zip(by_name, shifted, strict=True):
        mine = []
        for name, of_control in found.items():
            mine += measure_rows("control", name, _stacked_each(of_control), baseline.fold_masks)
        for (name, fold), layers in moved.items():
            shifted_LQ = torch.stack(layers)
            mine += measure_rows("control", name, {"sim_aou": shifted_LQ}, {fold: torch.ones(shifted_LQ.shape[1], dtype=torch.bool)})
        rows.append(mine)
    return rows


def _stacked_each(layers: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack(list(values)) for name, values in layers.items()}


def _next_query(icl_QD: Tensor, finetuned_QD: Tensor) -> tuple[Tensor, Tensor]:
    return icl_QD, finetuned_QD.roll(-1, 0)


def _centred(icl_QD: Tensor, finetuned_QD: Tensor) -> tuple[Tensor, Tensor]:
    return icl_QD - icl_QD.mean(0), finetuned_QD - finetuned_QD.mean(0)


def _shifted_cosine(baseline: Baseline, layer: int, icl_QD: Tensor, finetuned_QD: Tensor) -> Tensor:
    """Return the cosines of two changes of a fold's queries, NaN where either is at or below 10 x the noise floor."""
    pair: list[Vectors] = [metrics.vectors(icl_QD), metrics.vectors(finetuned_QD)]
    floor, _ = baseline.floors(layer)
    moved_Q = metrics.is_above_floor(pair[0].norm, floor) & metrics.is_above_floor(pair[1].norm, floor)
    if len(moved_Q) < 2:  # one query has no other, and is its own mean
        return torch.full_like(moved_Q, math.nan, dtype=torch.float64)
    return baseline.settle(metrics.defined_where(moved_Q, metrics.cosine(*pair)))


def pair_measures(baseline: Baseline, other_key: str, other: Capture, finetuned: Capture) -> list[Row]:
    """Return the similarities of two finetuned cells; `alpha` is the cosine of the changes of their attention scores."""
    num_layers = len(baseline.noise.attention_L)
    compared = _stacked([_similarities(baseline, n, _changes(baseline, other, n), _changes(baseline, finetuned, n)) for n in range(num_layers)])
    compared["alpha"] = compared.pop("sim_am_delta")
    return measure_rows("pair", other_key, compared, baseline.fold_masks)


def score_directions(baseline: Baseline, capture: Capture) -> list[Tensor]:
    """Return, per layer, the changes of the attention scores (Q, H, T) as unit vectors; NaN where they are at or below 10 x the noise floor."""
    found = []
    for layer, (zero_shot, state) in enumerate(zip(baseline.zero_shot.scores_LQHT, capture.scores_LQHT, strict=True)):
        change = metrics.score_change(zero_shot, state).change
        is_defined_QH = metrics.is_above_floor(change.norm, baseline.floors(layer)[1]) & (not (baseline.is_first_layer_still and layer == 0))
        found.append((change.values / torch.where(is_defined_QH, change.norm, math.nan)[..., None]).to(state.dtype))
    return found


def alpha_measures(baseline: Baseline, other_key: str, other: Sequence[Tensor], finetuned: Sequence[Tensor]) -> list[Row]:
    """Return alpha of two finetuned cells of different learning rates from their `score_directions`: the mean over layers of the means over queries.

    Of the whole model only: a row for each layer of every pair would fill the store.
    """
    pairs = zip(other, finetuned, strict=True)
    alpha_LQ = torch.stack([baseline.settle((a * b).sum(-1).clamp(-1, 1).nanmean(-1).double()) for a, b in pairs])
    alpha_LQ = alpha_LQ if baseline.counts_first_layer else alpha_LQ[1:]
    rows: list[Row] = []
    for fold, mask_Q in baseline.fold_masks.items():
        of_fold_LQ = alpha_LQ[:, mask_Q]
        n = int(of_fold_LQ.isfinite().any(0).sum()) if len(of_fold_LQ) else 0
        mean = float(of_fold_LQ.nanmean(1).nanmean()) if n else None
        rows.append({"kind": "pair", "name": other_key, "metric": "alpha", "layer": None, "fold": fold, "n": n, "mean": mean, "sd": None})
    return rows


def _stacked(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def make_metric(spec: MetricSpec) -> Metric:
    """Return the metric that a sweep file adds. Errors: SweepError for code that cannot be imported or called."""
    metric = own_code.made(spec)
    if not callable(metric):
        raise SweepError(f"{spec.name}: {spec.code} must be callable as metric(zero_shot, in_context, finetuned), got {type(metric).__name__}")
    return metric  # type: ignore[no-any-return]


class MetricError(SweepError):
    """A metric of the user's own failed; the cells are there without it."""


def metric_measures(baseline: Baseline, specs: Sequence[MetricSpec], finetuned: Capture) -> tuple[list[Row], list[str]]:
    """Return the figures of the metrics that the sweep file adds, and what is wrong with those that give none."""
    rows, problems = list[Row](), list[str]()
    for spec in specs:
        try:
            rows += measure_rows("metric", spec.version, {spec.name: _measured(baseline, spec, finetuned)}, baseline.fold_masks)
        except MetricError as error:
            problems.append(str(error))
    return rows, problems


def _measured(baseline: Baseline, spec: MetricSpec, finetuned: Capture) -> Tensor:
    num_layers, num_queries = finetuned.attention_LQD.shape[:2]
    try:
        metric: Any = make_metric(spec)
        shown = [
            value for capture in (baseline.zero_shot, baseline.in_context.capture, finetuned) for value in vars(capture).values() if isinstance(value, Tensor)
        ]
        versions = [value._version for value in shown]
        values = torch.as_tensor(metric(baseline.zero_shot, baseline.in_context.capture, finetuned)).detach().cpu().double()
    except Exception as error:  # the user's code may raise anything
        raise MetricError(f"metric {spec.name!r}: {type(error).__name__}: {error}") from error
    if versions != [value._version for value in shown]:  # what others will be compared with is spoilt: nothing more may be committed
        raise SweepError(f"metric {spec.name!r} changes the captures it is given; work on copies")
    if tuple(values.shape) not in ((num_layers, num_queries), (num_queries,)):
        raise MetricError(f"metric {spec.name!r} must return ({num_layers}, {num_queries}) or ({num_queries},), got {tuple(values.shape)}")
    return values
