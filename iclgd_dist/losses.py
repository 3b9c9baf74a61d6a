"""The loss of an early exit, a few tokens at a time: no table of (all lanes' tokens x vocabulary) ever exists.

Knows the output head and cross-entropy. Knows nothing of layers, deltas or optimisers.
"""

# Shapes: N lanes  T positions  D width  X = N x T tokens  Y tokens of a chunk  V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from iclgd_dist.model import LanguageModel

# Of one table of logits. On two CPU cores the output head multiplies 512 rows at 9/10 of the machine's rate, 256 at 8/10, 64 at 1/2 (vocabulary of 49,152).
MIB_PER_CHUNK = {"cpu": 96, "cuda": 1024}


def tokens_per_chunk(lm: LanguageModel, device: torch.device) -> int:
    """Return how many tokens' logits are made at once."""
    num_bytes = int(MIB_PER_CHUNK.get(device.type, MIB_PER_CHUNK["cuda"]) * 2**20)
    return max(1, num_bytes // (lm.model.config.vocab_size * lm.delta_dtype.itemsize))


def lane_losses(lm: LanguageModel, hidden_NTD: Tensor, targets_T: Tensor) -> Tensor:
    """Return each lane's mean cross-entropy (N,) of the early exit at `hidden_NTD`, the states that predict `targets_T`."""
    num_lanes, num_targets = hidden_NTD.shape[:2]
    num_chunks = -(-num_lanes * num_targets // tokens_per_chunk(lm, hidden_NTD.device))
    loss_X = _TokenLosses.apply(hidden_NTD.flatten(0, 1), targets_T.repeat(num_lanes), lm, num_chunks, num_targets)
    return loss_X.view(num_lanes, num_targets).sum(1)


def normalised(logits_YV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp (Y, 1) of logits and their softmax (Y, V): two passes over the table, where logsumexp takes four."""
    top_Y1, at_Y1 = logits_YV.max(1, keepdim=True)
    chance_YV = logits_YV.softmax(1)
    return top_Y1 - chance_YV.gather(1, at_Y1).log(), chance_YV


class _TokenLosses(torch.autograd.Function):
    """Cross-entropy of each token, divided by `num_targets`. It depends on the token's own state only, so the gradient is taken while the logits are there."""

    @staticmethod
    def forward(ctx: Any, hidden_XD: Tensor, target_X: Tensor, lm: LanguageModel, num_chunks: int, num_targets: int) -> Tensor:
        losses, gradients, has_gradient = list[Tensor](), list[Tensor](), ctx.needs_input_grad[0]
        for hidden_YD, target_Y in zip(hidden_XD.tensor_split(num_chunks), target_X.tensor_split(num_chunks), strict=True):
            with torch.set_grad_enabled(has_gradient):
                hidden_YD = hidden_YD.detach().requires_grad_(has_gradient)
                normed_YD = lm.normed(hidden_YD)
                read_YD = normed_YD.detach().requires_grad_(has_gradient)
                logits_YV = lm.logits(read_YD).to(lm.delta_dtype)
            # Written out, since cross_entropy and its gradient pass over the table of logits twice as often, and that is what they cost.
            with torch.no_grad():
                target_Y1 = target_Y.to(logits_YV.device)[:, None]
                log_sum_Y1, chance_YV = normalised(logits_YV)
                loss_Y1 = log_sum_Y1 - logits_YV.gather(1, target_Y1)
            losses.append(loss_Y1[:, 0] / num_targets)
            if has_gradient:
                chance_YV.scatter_(1, target_Y1, chance_YV.gather(1, target_Y1) - 1)
                (flow_YD,) = torch.autograd.grad(logits_YV, [read_YD], chance_YV)
                gradients += torch.autograd.grad(normed_YD, [hidden_YD], flow_YD / num_targets)
            del logits_YV, chance_YV
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_XD,) = ctx.saved_tensors
        return gradient_XD * gradients[0][:, None].to(gradient_XD), None, None, None, None
