"""How finetuned captures differ from zero-shot, beside how ICL's do: every similarity of a block's cells, per lane, layer and query.

Knows captures, the noise floor and the figures of the papers. Knows nothing of folds' means, columns or files.
"""

# N lanes  L layers  Q queries  H query heads  T positions  D width  C labels  X queries whose attention is ranked

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from iclgd_dist import metrics, ranking
from iclgd_dist.metrics import Answers, AttentionChange, Capture, NoiseFloor, ScoreChange
from iclgd_dist.schema import FOLDS, SIMILARITIES

NUMBERS_AT_ONCE = 2**21  # of one layer of the lanes that are compared together: 16 MB in float64


@dataclass(frozen=True)
class InContext:
    """How the queries' states in some context differ from zero-shot. Made once, compared with every finetuned state."""

    capture: Capture
    attention: tuple[AttentionChange, ...]  # per layer
    scores: tuple[ScoreChange, ...]  # per layer
    norm_LQ: Tensor  # of the change of the attention output
    items: tuple[tuple[int, int], ...] = ()  # per demonstration, its (start, stop) among the items of `capture.ranked_LQT`
    random_ranks: Mapping[str, Tensor] = field(default_factory=dict)  # (L, Q) of the first queries: ICL's attention ranked against random maps


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
    in_context: InContext
    is_first_layer_still: bool
    counts_first_layer: bool
    has_eps: bool
    zero_shot_norm_LQ: Tensor
    sim_am_zs_LQ: Tensor

    def floors(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the noise floors of a layer: of the attention output, and of the scores (H,). Below every norm where the protocol has an eps instead."""
        floors = self.noise.attention_L[layer], self.noise.scores_LH[layer]
        return (floors[0] - math.inf, floors[1] - math.inf) if self.has_eps else floors

    def settle(self, similarity: Tensor) -> Tensor:
        """Return a cosine as the protocol has it: undefined is NaN, or 0 where the norms are held up by an eps."""
        return similarity.nan_to_num(0.0) if self.has_eps else similarity


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
    counts_first_layer: bool = False,
    has_eps: bool = False,
) -> Baseline:
    """Return the baseline of a block: captures on the CPU, `folds_Q` A or B for each query.

    `counts_first_layer`: means over layers of sim_am_delta include layer 0. `has_eps`: cosines of changes that are nothing are 0, as in the reference.

    `is_first_layer_still`: positions are relative (rotary, ALiBi), so that a context cannot change layer 0's scores of the query's own tokens. What
    is measured there is the rounding of rotations at other positions, and sim_am_delta is undefined.
    """
    assert len(gold_Q) == len(folds_Q) == len(query_ids) == zero_shot.attention_LQD.shape[1], "one gold label, fold and id per query"
    assert len(label_words) == zero_shot.label_scores_QC.shape[1], "one score per label"
    assert set(folds_Q) <= {"A", "B"}, "folds are A and B"
    _check(zero_shot, zero_shot)
    gold = torch.tensor(gold_Q, dtype=torch.int64)
    layers = range(len(zero_shot.attention_LQD))
    icl = changed(zero_shot, in_context)
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
        counts_first_layer=counts_first_layer,
        has_eps=has_eps,
        zero_shot_answers=metrics.answers(zero_shot.label_scores_QC, gold),
        in_context_answers=metrics.answers(in_context.label_scores_QC, gold),
        in_context=icl,
        zero_shot_norm_LQ=torch.stack([metrics.vectors(layer_QD).norm for layer_QD in zero_shot.attention_LQD]),
        sim_am_zs_LQ=torch.stack([metrics.sim_am_zs(icl.scores[layer], zero_shot.scores_LQHT[layer]) for layer in layers]),
    )


def changed(zero_shot: Capture, state: Capture) -> InContext:
    """Return how a capture of the same queries differs from zero-shot."""
    _check(state, zero_shot)
    layers = range(len(zero_shot.attention_LQD))
    attention = tuple(metrics.attention_change(metrics.vectors(zero_shot.attention_LQD[layer]), state.attention_LQD[layer]) for layer in layers)
    scores = tuple(metrics.score_change(zero_shot.scores_LQHT[layer], state.scores_LQHT[layer]) for layer in layers)
    return InContext(state, attention, scores, torch.stack([change.raw.norm for change in attention]))


def random_ranks(state: Capture, items: Sequence[tuple[int, int]]) -> Mapping[str, Tensor]:
    """Return what random attention scores against a context's, drawn once for all that is compared with it; nothing where none was recorded."""
    if state.ranked_LQT is None or not items:
        return {}
    layers = [ranking.random_attention(map_QT, items, generator=torch.Generator().manual_seed(layer)) for layer, map_QT in enumerate(state.ranked_LQT)]
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def compared(baseline: Baseline, states: Sequence[Capture], random_seeds: Sequence[int], prefix: InContext | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield for each finetuned lane every similarity (L, Q), and as `inner`, `inner_prefix` and `norm` <u_ICL, u_FT>, that of the prefix, and |u_FT|.

    `random_seeds` draw the random baselines of each lane. `prefix`: the queries after exactly the demonstrations trained on.
    """
    for state in states:
        _check(state, baseline.zero_shot)
    shown = baseline.zero_shot, baseline.in_context.capture
    of_layer = max(part[0].numel() for state in shown for part in (state.attention_LQD, state.scores_LQHT, state.ranked_LQT) if part is not None)
    size = max(1, NUMBERS_AT_ONCE // of_layer)
    for start in range(0, len(states), size):
        yield from _together(baseline, states[start : start + size], random_seeds[start : start + size], prefix)


def _together(baseline: Baseline, states: Sequence[Capture], random_seeds: Sequence[int], prefix: InContext | None) -> list[dict[str, Tensor]]:
    generators = [torch.Generator().manual_seed(seed) for seed in random_seeds]
    found: dict[str, list[Tensor]] = defaultdict(list)  # of each layer, (N, Q)
    # One layer at a time: tables of all layers would leave the processor's cache.
    for layer, (icl, icl_scores) in enumerate(zip(baseline.in_context.attention, baseline.in_context.scores, strict=True)):
        zero_shot, (floor, floor_H) = metrics.vectors(baseline.zero_shot.attention_LQD[layer]), baseline.floors(layer)
        ft = metrics.attention_change(zero_shot, torch.stack([state.attention_LQD[layer] for state in states]))
        ft_scores = metrics.score_change(baseline.zero_shot.scores_LQHT[layer], torch.stack([state.scores_LQHT[layer] for state in states]))
        random = {
            "uniform_update": metrics.uniform_update(zero_shot, generators),
            "gaussian_state": metrics.attention_change(zero_shot, metrics.gaussian_state(zero_shot, ft.raw.norm, generators)),
        }
        moved_NQ = metrics.is_above_floor(ft.raw.norm, floor)  # a random baseline stands beside a similarity or not at all
        for name, state in random.items():
            found[f"sim_aou_{name}"].append(metrics.defined_where(moved_NQ, metrics.sim_aou(icl, state, floor_L=floor)))
            found[f"sim_aou_norm_{name}"].append(metrics.defined_where(moved_NQ, metrics.sim_aou_norm(icl, state, floor_L=floor)))
        contexts = {"": (icl, icl_scores)} | ({} if prefix is None else {"_prefix": (prefix.attention[layer], prefix.scores[layer])})
        for ending, (attention, scores) in contexts.items():
            found[f"sim_aou{ending}"].append(metrics.sim_aou(attention, ft, floor_L=floor))
            found[f"sim_aou_norm{ending}"].append(metrics.sim_aou_norm(attention, ft, floor_L=floor))
            found[f"sim_am{ending}"].append(metrics.sim_am(scores, ft_scores, floor_LH=floor_H))
            found[f"sim_am_delta{ending}"].append(metrics.sim_am_delta(scores, ft_scores, floor_LH=floor_H))
            found[f"inner{ending}"].append(metrics.inner(attention.raw, ft.raw))
        found["norm"].append(ft.raw.norm)
        if prefix is not None:
            for name, values_NX in _ranked(prefix, states, layer).items():
                values_NX = metrics.defined_where(moved_NQ[:, : values_NX.shape[1]], values_NX)
                found[name].append(torch.nn.functional.pad(values_NX, (0, moved_NQ.shape[1] - values_NX.shape[1]), value=math.nan))
    stacked = {name: torch.stack(layers, dim=1) for name, layers in found.items()}
    if baseline.is_first_layer_still:
        for name in stacked.keys() & {"sim_am_delta", "sim_am_delta_prefix"}:
            stacked[name][:, 0] = math.nan
    # Over the layers and queries that sim_am speaks of, so that the two can be set side by side; ICL's own row has it for all.
    stacked["sim_am_zs"] = torch.where(stacked["sim_am"].isnan(), math.nan, baseline.sim_am_zs_LQ)
    stacked = {name: baseline.settle(figure) if name.startswith("sim_") else figure for name, figure in stacked.items()}
    missing = {name: torch.full_like(stacked["norm"], math.nan) for name in SIMILARITIES if name not in stacked}
    return [{name: figure[lane] for name, figure in (stacked | missing).items()} for lane in range(len(states))]


def _ranked(prefix: InContext, states: Sequence[Capture], layer: int) -> dict[str, Tensor]:
    """Return how alike the prefix and each state rank the demonstrations (N, X), and how alike the prefix and random maps do; nothing where none is recorded."""
    maps = [state.ranked_LQT[layer] for state in states if state.ranked_LQT is not None]
    if prefix.capture.ranked_LQT is None or len(maps) < len(states):
        return {}
    ranked = ranking.compare_attention(prefix.capture.ranked_LQT[layer], torch.stack(maps), prefix.items)
    return ranked | {name: ranks_LX[layer].expand(len(maps), -1) for name, ranks_LX in prefix.random_ranks.items()}


def _check(capture: Capture, zero_shot: Capture) -> None:
    assert capture.is_finite(), "a capture that is not finite has no figures: its cell is diverged"
    for part in ("attention_LQD", "scores_LQHT", "label_scores_QC"):
        got, required = getattr(capture, part).shape, getattr(zero_shot, part).shape
        assert got == required, f"{part} must be shaped as zero-shot's, {tuple(required)}, got {tuple(got)}"
