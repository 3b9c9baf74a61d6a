"""What two states say next, over the whole vocabulary: their most likely tokens, and how far their distributions are apart. In float64.

Knows logits and the output head. Knows nothing of layers, labels or tables.
"""

# Shapes: N lanes  Q queries  G queries of a group  D width  V vocabulary  K most likely tokens

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from iclgd_dist.head import Head

TOP = 10
MOST_LOGITS = 2**22  # that exist at once, in float64 and some of them several times: 200 MB


def compare_logits(in_context_QV: Tensor, finetuned_NQV: Tensor) -> dict[str, Tensor]:
    """Return how alike ICL's next-token distribution and each lane's are, per query (N, Q).

    `top10_overlap`: share of ICL's 10 most likely tokens among finetuning's. `top10_cosine`: cosine of the two probabilities over the tokens that both have
    among their 10; NaN where there is none. `kl_output`: KL(ICL, FT) [nats]; `tv_output`: total variation [0..1].
    Source: Shen et al. 2024 (arXiv 2310.08540) for the first two.
    """
    log_p, log_q = in_context_QV.double().log_softmax(-1)[None], finetuned_NQV.double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    ours_NQK, theirs_NQK = (log.topk(TOP, dim=-1).indices for log in (log_p.expand_as(log_q), log_q))
    is_shared_NQK = (ours_NQK[..., :, None] == theirs_NQK[..., None, :]).any(-1)
    of_p, of_q = (torch.where(is_shared_NQK, values.gather(-1, ours_NQK), 0.0) for values in (p.expand_as(q), q))
    norm = of_p.norm(dim=-1) * of_q.norm(dim=-1)
    return {
        "top10_overlap": is_shared_NQK.double().mean(-1),
        "top10_cosine": ((of_p * of_q).sum(-1) / torch.where(norm > 0, norm, math.nan)).clamp(0, 1),
        "kl_output": (p * (log_p - log_q)).sum(-1).clamp_min(0.0),
        "tv_output": 0.5 * (p - q).abs().sum(-1),
    }


@torch.no_grad()
def compare_states(head: Head, in_context_QD: Tensor, finetuned: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return `compare_logits` (N, Q) of what the output head makes of normed states (Q, D), some queries at a time."""
    device, dtype = head.weight_VD.device, head.dtype or head.weight_VD.dtype
    states_NQD = torch.stack([in_context_QD, *finetuned])
    found: list[dict[str, Tensor]] = []
    for group_NGD in states_NQD.split(max(1, MOST_LOGITS // (len(states_NQD) * len(head.weight_VD))), dim=1):
        logits_NGV = head.logits(group_NGD.to(device, dtype))
        found.append(compare_logits(logits_NGV[0], logits_NGV[1:]))
    return {name: torch.cat([each[name] for each in found], dim=1).cpu() for name in found[0]}
