"""The figures of the two papers as pure functions of tensors, all in float64; NaN means undefined.

Knows captures, norms and the noise floor. Knows nothing of models, files, folds or tables.
"""

# L layers  Q queries  H query heads  T positions (the query's own tokens, zero-padded at the end)  D width  C labels
# A function written for (L, Q, ...) also takes one layer, (Q, ...), with that layer's floor, and several lanes of it, (N, Q, ...).

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iclgd_dist.schema import FLOOR_FACTOR, NUM_NOISE_QUERIES


@dataclass(frozen=True)
class Capture:
    """What is recorded of one state (zero-shot, in-context, or one finetuned lane at one step) at the recorded position."""

    attention_LQD: Tensor  # output of the attention module
    scores_LQHT: Tensor  # scaled q.k
    label_scores_QC: Tensor  # mean log-probability of each label's tokens, float64
    # Raw attention of the first queries to the demonstrations' tokens, summed over heads: ICL's to its context; finetuning's through the query projections
    # of the training tokens. None where nothing was recorded.
    ranked_LQT: Tensor | None = None
    output_QD: Tensor | None = None  # what the output head reads at the prompt's last position; None unless next-token distributions are compared
    blank_scores_KC: Tensor | None = None  # label scores after prompts without content; None unless these were asked for

    def clone(self) -> Capture:
        return Capture(**{name: value.clone() for name, value in vars(self).items() if value is not None})

    def is_finite(self) -> bool:
        # Smallest and largest are NaN if any value is: one pass, where isfinite().all() takes five.
        return all(bool(torch.isfinite(end)) for part in (self.attention_LQD, self.scores_LQHT, self.label_scores_QC) for end in torch.aminmax(part))


@dataclass(frozen=True)
class NoiseFloor:
    """The largest L2 norm of the difference of two zero-shot captures, what packing alone changes; at least what rounding changes."""

    attention_L: Tensor
    scores_LH: Tensor


@dataclass(frozen=True)
class Vectors:
    """Vectors along the last dimension and their L2 norms, float64. Made once, compared often."""

    values: Tensor
    norm: Tensor


@dataclass(frozen=True)
class AttentionChange:
    """How a state's attention output differs from zero-shot's."""

    raw: Vectors  # h - h_ZS
    unit: Vectors  # h / |h| - h_ZS / |h_ZS|


@dataclass(frozen=True)
class ScoreChange:
    """A state's attention scores and how they differ from zero-shot's, per head."""

    scores: Vectors
    change: Vectors


def vectors(values: Tensor) -> Vectors:
    """Return the vectors in float64 with their norms."""
    values = values.double()
    return Vectors(values, torch.linalg.vector_norm(values, dim=-1))


def attention_change(zero_shot: Vectors, state_LQD: Tensor) -> AttentionChange:
    """Return the change of the attention output, as it is and between the L2-normalised outputs."""
    state = vectors(state_LQD)
    unit = state.values / state.norm[..., None]
    unit -= zero_shot.values / zero_shot.norm[..., None]
    return AttentionChange(raw=vectors(state.values - zero_shot.values), unit=vectors(unit))


def score_change(zero_shot_LQHT: Tensor, state_LQHT: Tensor) -> ScoreChange:
    """Return the attention scores and their change."""
    state = vectors(state_LQHT)
    return ScoreChange(scores=state, change=vectors(state.values - zero_shot_LQHT.double()))


def inner(a: Vectors, b: Vectors) -> Tensor:
    """Return the inner products along the last dimension."""
    return (a.values * b.values).sum(-1)


def cosine(a: Vectors, b: Vectors) -> Tensor:
    """Return the cosines along the last dimension; NaN where a norm is 0. No epsilon."""
    return (inner(a, b) / a.norm / b.norm).clamp(-1, 1)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient; NaN where the denominator is 0."""
    return torch.where(denominator == 0, math.nan, numerator / denominator)


# --- The noise floor and what counts as a change


def noise_floor(a: Capture, b: Capture, *, eps: float = 0.0) -> NoiseFloor:
    """Return the noise floor from two zero-shot captures of the same queries at different packings; the first 32 queries count.

    It is at least what rounding to the compute dtype, of machine epsilon `eps`, does to them: in bfloat16 two packings often agree to the last
    bit, while no change smaller than that bit was seen.
    Shapes: the captures may hold different numbers of queries beyond the first 32, and be padded to different lengths.
    """
    num_positions = max(a.scores_LQHT.shape[-1], b.scores_LQHT.shape[-1])
    parts = []
    for capture in (a, b):
        scores = capture.scores_LQHT[:, :NUM_NOISE_QUERIES].double()
        parts.append((capture.attention_LQD[:, :NUM_NOISE_QUERIES].double(), torch.nn.functional.pad(scores, (0, num_positions - scores.shape[-1]))))
    (attention_a, scores_a), (attention_b, scores_b) = parts
    for part_a, part_b in ((attention_a, attention_b), (scores_a, scores_b)):
        assert part_a.shape == part_b.shape, f"two captures of the same queries are required, got shapes {tuple(part_a.shape)} and {tuple(part_b.shape)}"
    rounding = eps / math.sqrt(12)  # root mean square of an error that lies anywhere within half a unit of the last place
    return NoiseFloor(
        attention_L=torch.maximum(vectors(attention_a - attention_b).norm, rounding * vectors(attention_a).norm).amax(1),
        scores_LH=torch.maximum(vectors(scores_a - scores_b).norm, rounding * vectors(scores_a).norm).amax(1),
    )


def is_above_floor(norm: Tensor, floor: Tensor) -> Tensor:
    """Return where a change is larger than 10 x the noise floor; at the floor itself it is not."""
    return norm > FLOOR_FACTOR * floor


def defined_where(condition: Tensor, values: Tensor) -> Tensor:
    """Return the values, NaN where the condition does not hold."""
    return torch.where(condition, values, math.nan)


# --- Similarities: per layer and query


def _both_above(in_context: AttentionChange, finetuned: AttentionChange, floor_L: Tensor) -> Tensor:
    floor_LQ = floor_L[..., None]
    return is_above_floor(in_context.raw.norm, floor_LQ) & is_above_floor(finetuned.raw.norm, floor_LQ)


def sim_aou(in_context: AttentionChange, finetuned: AttentionChange, *, floor_L: Tensor) -> Tensor:
    """Cosine between the change ICL makes to the attention output and the change finetuning makes.

    Shapes: returns (L, Q), NaN where either change is at or below 10 x the noise floor.
    Units: cosine in [-1, 1].
    Source: Deutch et al. 2024, SimAOU; on the outputs as they are.
    """
    return defined_where(_both_above(in_context, finetuned, floor_L), cosine(in_context.raw, finetuned.raw))


def sim_aou_norm(in_context: AttentionChange, finetuned: AttentionChange, *, floor_L: Tensor) -> Tensor:
    """The same cosine between changes of the L2-normalised outputs. Biased upward with the size of the updates.

    Shapes: returns (L, Q), NaN where either change of the outputs as they are is at or below 10 x the noise floor.
    Units: cosine in [-1, 1].
    Source: Dai et al. 2023, SimAOU.
    """
    return defined_where(_both_above(in_context, finetuned, floor_L), cosine(in_context.unit, finetuned.unit))


Generators = torch.Generator | Sequence[torch.Generator]  # several: one per lane, and what is drawn has a dimension of lanes in front


def _drawn(draw: Callable[..., Tensor], like: Tensor, generators: Generators) -> Tensor:
    # In float32: several times as fast as float64, and any random numbers will do.
    if isinstance(generators, torch.Generator):
        return draw(like.shape, generator=generators).to(like)
    return torch.stack([draw(like.shape, generator=generator) for generator in generators]).to(like)


def uniform_update(zero_shot: Vectors, generators: Generators) -> AttentionChange:
    """Return a random change, of the outputs and of the normalised outputs alike: i.i.d. uniform [0, 1) numbers, whatever the size of the real one.

    Source: the code of Deutch et al. 2024.
    """
    update = vectors(_drawn(torch.rand, zero_shot.values, generators))
    return AttentionChange(raw=update, unit=update)


def gaussian_state(zero_shot: Vectors, update_norm_LQ: Tensor, generators: Generators) -> Tensor:
    """Return a random state: zero-shot plus a gaussian update of the given norm per layer and query."""
    random = vectors(_drawn(torch.randn, zero_shot.values, generators))
    return random.values.mul_((update_norm_LQ / random.norm)[..., None]).add_(zero_shot.values)


def sim_am(in_context: ScoreChange, finetuned: ScoreChange, *, floor_LH: Tensor) -> Tensor:
    """Cosine of ICL's and finetuning's attention scores per head, then the mean over defined heads.

    A head is undefined where finetuning changed its scores by at most 10 x the noise floor: the cosine would then be `sim_am_zs` under another
    name. ICL's change is not asked for, because the maps themselves are compared, not their changes.
    Shapes: returns (L, Q); NaN where no head is defined.
    Units: cosine in [-1, 1].
    """
    moved_LQH = is_above_floor(finetuned.change.norm, floor_LH.unsqueeze(-2))
    return defined_where(moved_LQH, cosine(in_context.scores, finetuned.scores)).nanmean(-1)


def sim_am_zs(in_context: ScoreChange, zero_shot_LQHT: Tensor) -> Tensor:
    """Cosine of ICL's and zero-shot's attention scores per head, then the mean over defined heads.

    A property of ICL alone, on the maps themselves: defined unless all the scores of a map are 0, whatever the noise floor.
    Shapes: returns (L, Q).
    Units: cosine in [-1, 1].
    """
    return cosine(in_context.scores, vectors(zero_shot_LQHT)).nanmean(-1)


def sim_am_delta(in_context: ScoreChange, finetuned: ScoreChange, *, floor_LH: Tensor) -> Tensor:
    """Cosine of the changes of the attention scores per head, then the mean over defined heads.

    A head is undefined where either change is at or below 10 x the noise floor. With rotary or ALiBi positions ICL changes nothing at layer 0.
    Shapes: returns (L, Q); NaN where no head is defined.
    Units: cosine in [-1, 1].
    """
    floor_LQH = floor_LH.unsqueeze(-2)
    moved_LQH = is_above_floor(in_context.change.norm, floor_LQH) & is_above_floor(finetuned.change.norm, floor_LQH)
    return defined_where(moved_LQH, cosine(in_context.change, finetuned.change)).nanmean(-1)


# --- Per layer, over a set of queries: (L, Q) -> (L,)


def sim_aou_pooled(inner_LQ: Tensor, in_context_norm_LQ: Tensor, finetuned_norm_LQ: Tensor, *, floor_L: Tensor) -> Tensor:
    """Cosine of the two changes of all queries taken as one long vector: queries that hardly change count for little.

    Shapes: `inner_LQ` is <u_ICL, u_FT>; returns (L,), NaN where the root mean square over the queries of either norm is at or below 10 x the
    noise floor.
    Units: cosine in [-1, 1].
    """
    squares = [norm.square().sum(-1) for norm in (in_context_norm_LQ, finetuned_norm_LQ)]
    moved = [is_above_floor((square / inner_LQ.shape[-1]).sqrt(), floor_L) for square in squares]
    return defined_where(moved[0] & moved[1], inner_LQ.sum(-1) / squares[0].sqrt() / squares[1].sqrt()).clamp(-1, 1)


def recovered_aou(inner_LQ: Tensor, in_context_norm_LQ: Tensor, finetuned_norm_LQ: Tensor) -> Tensor:
    """Share of ICL's change that finetuning reproduces: 1 - sum_q |u_FT - u_ICL|^2 / sum_q |u_ICL|^2.

    Shapes: `inner_LQ` is <u_ICL, u_FT>; returns (L,), NaN where ICL changes nothing.
    Units: 1 = ICL's change, 0 = no update, negative = worse than none.
    """
    total = in_context_norm_LQ.square().sum(-1)
    return 1 - ratio((finetuned_norm_LQ.square() + in_context_norm_LQ.square() - 2 * inner_LQ).sum(-1), total)


def update_ratio(finetuned_norm_LQ: Tensor, in_context_norm_LQ: Tensor) -> Tensor:
    """Return mean_q |u_FT| / mean_q |u_ICL| per layer; NaN where ICL changes nothing."""
    return ratio(finetuned_norm_LQ.mean(-1), in_context_norm_LQ.mean(-1))


def relative_update(norm_LQ: Tensor, zero_shot_norm_LQ: Tensor) -> Tensor:
    """Return mean_q |u| / mean_q |h_ZS| per layer."""
    return ratio(norm_LQ.mean(-1), zero_shot_norm_LQ.mean(-1))


def geometric_mean(values_L: Tensor) -> float:
    """Return the geometric mean; NaN if any value is NaN, else 0 if any is 0."""
    return float(values_L.log().mean().exp())


# --- Predictions: per query, then over a set of queries. Of no queries, every share is NaN.


@dataclass(frozen=True)
class Answers:
    """What a state answers to each query."""

    label_scores_QC: Tensor
    predictions_Q: Tensor  # index of the best label, the lowest one of several
    is_tie_Q: Tensor  # whether several labels share the best score
    nll_label_Q: Tensor
    nll_raw_Q: Tensor


def predictions(label_scores_QC: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index of each query's best label, the lowest one where several share the best score, and whether they do."""
    assert torch.isfinite(label_scores_QC).all(), "label scores must be finite: the best of NaN would look like an answer"
    is_best_QC = label_scores_QC == label_scores_QC.amax(1, keepdim=True)
    num_labels = label_scores_QC.shape[1]
    index_QC = torch.where(is_best_QC, torch.arange(num_labels, device=label_scores_QC.device), num_labels)
    return index_QC.amin(1), is_best_QC.sum(1) > 1


def label_nll(label_scores_QC: Tensor, gold_Q: Tensor) -> Tensor:
    """Return -log softmax over the label scores at the gold label [nats]."""
    return -label_scores_QC.double().log_softmax(1).gather(1, gold_Q[:, None])[:, 0]


def answers(label_scores_QC: Tensor, gold_Q: Tensor) -> Answers:
    """Return the predictions, ties and both losses of each query; `nll_raw` is minus the mean log-probability of the gold label's tokens."""
    predictions_Q, is_tie_Q = predictions(label_scores_QC)
    raw_Q = -label_scores_QC.double().gather(1, gold_Q[:, None])[:, 0]
    return Answers(label_scores_QC.double(), predictions_Q, is_tie_Q, label_nll(label_scores_QC, gold_Q), raw_Q)


def share(part: Tensor | int, whole: int) -> float:
    """Return part / whole; NaN of nothing."""
    return int(part) / whole if whole else math.nan


def accuracy(predictions_Q: Tensor, gold_Q: Tensor) -> float:
    """Return the share of queries answered rightly."""
    return share((predictions_Q == gold_Q).sum(), len(gold_Q))


def balanced_accuracy(predictions_Q: Tensor, gold_Q: Tensor) -> float:
    """Return the mean over the labels that occur of the share of their queries answered rightly."""
    num_gold_C = gold_Q.bincount()
    num_right_C = gold_Q[predictions_Q == gold_Q].bincount(minlength=len(num_gold_C))
    return float(ratio(num_right_C.double(), num_gold_C.double()).nanmean())


def majority_baseline(gold_Q: Tensor) -> float:
    """Return the accuracy of always predicting the most frequent gold label."""
    return share(gold_Q.bincount(minlength=1).max(), len(gold_Q))


def majority_share_predicted(predictions_Q: Tensor) -> float:
    """Return the share of the most predicted label."""
    return share(predictions_Q.bincount(minlength=1).max(), len(predictions_Q))


def collapsed(predictions_Q: Tensor, gold_Q: Tensor) -> bool:
    """Return whether one label is predicted for at least 95 % of the queries and for more than 1.2 x its share among the gold labels."""
    num_labels = int(torch.cat([predictions_Q, gold_Q]).max()) + 1 if len(gold_Q) else 1
    predicted_C, gold_C = predictions_Q.bincount(minlength=num_labels), gold_Q.bincount(minlength=num_labels)
    # Whole numbers: .95 and 1.2 have no exact float.
    return bool(((100 * predicted_C >= 95 * len(gold_Q)) & (10 * predicted_C > 12 * gold_C)).any())


def rec2ftp(zero_shot_right_Q: Tensor, in_context_right_Q: Tensor, finetuned_right_Q: Tensor) -> dict[str, float]:
    """Return the share of finetuning's corrections that ICL makes too, the share of all corrections ICL makes, and the four counts.

    Units: rec2ftp and rec2ftp_base in percent, NaN where nothing was to be corrected.
    Source: Dai et al. 2023, Rec2FTP.
    """
    wrong_Q = ~zero_shot_right_Q
    counts = {
        "num_zs_wrong": int(wrong_Q.sum()),
        "num_zs_wrong_icl_right": int((wrong_Q & in_context_right_Q).sum()),
        "num_zs_wrong_ft_right": int((wrong_Q & finetuned_right_Q).sum()),
        "num_zs_wrong_ft_right_icl_right": int((wrong_Q & finetuned_right_Q & in_context_right_Q).sum()),
    }
    found = 100 * share(counts["num_zs_wrong_ft_right_icl_right"], counts["num_zs_wrong_ft_right"])
    return {"rec2ftp": found, "rec2ftp_base": 100 * share(counts["num_zs_wrong_icl_right"], counts["num_zs_wrong"]), **counts}


def jaccard_changed(zero_shot_Q: Tensor, in_context_Q: Tensor, finetuned_Q: Tensor) -> float:
    """Return the predictions that ICL and finetuning change from zero-shot to the same label, as a share of all that either changes."""
    icl_changed, ft_changed = in_context_Q != zero_shot_Q, finetuned_Q != zero_shot_Q
    num_same = int((icl_changed & (in_context_Q == finetuned_Q)).sum())
    return share(num_same, int(icl_changed.sum()) + int(ft_changed.sum()) - num_same)


def agreement(a_Q: Tensor, b_Q: Tensor) -> float:
    """Return the share of queries predicted alike."""
    return share((a_Q == b_Q).sum(), len(a_Q))


def cohen_kappa(a_Q: Tensor, b_Q: Tensor) -> float:
    """Return the agreement of two sets of predictions beyond chance; NaN if either is constant."""
    if any(len(labels.unique()) < 2 for labels in (a_Q, b_Q)):
        return math.nan
    num_labels = int(torch.cat([a_Q, b_Q]).max()) + 1
    share_a_C, share_b_C = (labels.bincount(minlength=num_labels).double() / len(labels) for labels in (a_Q, b_Q))
    chance = float((share_a_C * share_b_C).sum())
    return (agreement(a_Q, b_Q) - chance) / (1 - chance)


def kl_label(in_context_QC: Tensor, finetuned_QC: Tensor) -> Tensor:
    """Return KL(ICL, FT) over the label probabilities of each query [nats]."""
    log_p, log_q = in_context_QC.double().log_softmax(1), finetuned_QC.double().log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
