"""Cross-entropy of an early exit, some words of the vocabulary at a time: of a large one no table of (tokens x vocabulary) ever exists.

Knows the output head and cross-entropy. Knows nothing of layers, deltas or optimisers.
"""

# Shapes: N lanes  T positions  D width  X states (N x T)  Y words whose logits are asked for  V vocabulary  P words of a part

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iclgd_dist.model import LanguageModel

# Of a part of the vocabulary. On two CPU cores the logits of 2,048 words and their rows of the head stay in the cache: forward and backward together
# take .87 of the time of whole rows of 49,152, and the head multiplies at 9/10 of the machine's rate.
WORDS = {"cpu": 2048, "cuda": 16384}
LOGITS = {"cpu": 2**24, "cuda": 2**28}  # of a part, at most: fewer words of very many states


def lane_losses(lm: LanguageModel, hidden_NTD: Tensor, targets_T: Tensor) -> Tensor:
    """Return each lane's mean cross-entropy (N,) of the early exit at `hidden_NTD`, the states that predict `targets_T`."""
    num_lanes, num_targets = hidden_NTD.shape[:2]
    loss_X = _TokenLosses.apply(lm.normed(hidden_NTD.flatten(0, 1)), targets_T.repeat(num_lanes), lm)
    return loss_X.view(num_lanes, num_targets).mean(1)


def log_chances(lm: LanguageModel, normed_XD: Tensor, at_Y: Tensor, word_Y: Tensor) -> Tensor:
    """Return the log-probability (Y,), in float64, of each word after the state `at_Y`. States as the output head reads them."""
    log_sum_X, logit_Y, _ = _sweep(lm, normed_XD, at_Y, word_Y, pulls=False)
    return logit_Y.double() - log_sum_X.double()[at_Y.to(log_sum_X.device)]


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token. It depends on the token's own state only, so the gradient is taken while the logits are there."""

    @staticmethod
    def forward(ctx: Any, normed_XD: Tensor, target_X: Tensor, lm: LanguageModel) -> Tensor:
        log_sum_X, logit_X, gradient_XD = _sweep(lm, normed_XD, torch.arange(len(target_X), device=target_X.device), target_X, pulls=ctx.needs_input_grad[0])
        if gradient_XD is not None:
            ctx.save_for_backward(gradient_XD.to(normed_XD))
        return log_sum_X - logit_X

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_XD,) = ctx.saved_tensors
        # In the wider dtype: 1 / number of targets, rounded to bfloat16, would be a learning rate of its own.
        return (gradient_XD * gradients[0][:, None].to(gradient_XD.device)).to(gradient_XD.dtype), None, None


@torch.no_grad()
def _sweep(lm: LanguageModel, normed_XD: Tensor, at_Y: Tensor, word_Y: Tensor, *, pulls: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the log-sum-exp (X,) of each state's logits, the logits (Y,) of some words, and with `pulls` the gradient (X, D) of the first less the second.

    Sums that are under way are relative to the largest logit so far, as in attention that never holds its scores. The gradient asks for one word per
    state and keeps it apart: as the model grows sure of it, the sum of all others keeps its digits, where 1 less its probability would lose them.
    """
    with lm.head() as head:
        weight_VD = head.weight_VD
        normed_XD, at_Y, word_Y = (each.to(weight_VD.device) for each in (normed_XD, at_Y, word_Y))
        made: dict[str, Any] = {"dtype": lm.delta_dtype, "device": weight_VD.device}
        top_X1, sum_X1 = torch.full((len(normed_XD), 1), -torch.inf, **made), torch.zeros(len(normed_XD), 1, **made)
        logit_Y, pull_XD = torch.full((len(word_Y),), torch.nan, **made), torch.zeros(normed_XD.shape, **made) if pulls else None
        kind = "cpu" if weight_VD.device.type == "cpu" else "cuda"
        size = max(1, min(WORDS[kind], LOGITS[kind] // max(1, len(normed_XD))))
        for start in range(0, len(weight_VD), size):
            words = slice(start, start + size)
            weight_PD = head.rows(words)
            logits_XP = head.logits(normed_XD, words, weight_PD).to(lm.delta_dtype)
            is_here_Y = (word_Y >= start) & (word_Y < start + logits_XP.shape[1])
            place_Y = (word_Y - start).clamp(0, logits_XP.shape[1] - 1)
            logit_Y = torch.where(is_here_Y, logits_XP[at_Y, place_Y], logit_Y)
            slope = head.slope(logits_XP) if pulls else 1.0
            before_X1, top_X1 = top_X1, torch.maximum(top_X1, logits_XP.amax(1, keepdim=True))
            chance_XP, less_X1 = logits_XP.sub_(top_X1).exp_(), before_X1.sub_(top_X1).exp_()
            if pulls:
                chance_XP.scatter_(1, place_Y[:, None], chance_XP.gather(1, place_Y[:, None]).masked_fill_(is_here_Y[:, None], 0.0))
            sum_X1.mul_(less_X1).add_(chance_XP.sum(1, keepdim=True))
            if pull_XD is not None:
                flow_XP = chance_XP if isinstance(slope, float) and slope == 1 else chance_XP.mul_(slope)
                pull_XD.mul_(less_X1)
                if weight_PD.dtype == pull_XD.dtype:
                    pull_XD.addmm_(flow_XP, weight_PD)
                else:  # shares of at most 1, so that no sum of many words leaves the range of float16
                    share_X1 = chance_XP.sum(1, keepdim=True).clamp_(min=1)
                    pull_XD.addcmul_((flow_XP / share_X1).to(weight_PD.dtype) @ weight_PD, share_X1)
        if pull_XD is not None:
            others_X1, slope_X = sum_X1, head.slope(logit_Y)
            sum_X1 = others_X1 + (logit_Y[:, None] - top_X1).exp()
            own_XD = weight_VD[word_Y].to(pull_XD.dtype).mul_(slope_X[:, None] if isinstance(slope_X, Tensor) else slope_X)
            pull_XD.addcmul_(others_X1, own_XD, value=-1).div_(sum_X1)
        return (top_X1 + sum_X1.log())[:, 0], logit_Y, pull_XD
