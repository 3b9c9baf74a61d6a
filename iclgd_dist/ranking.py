"""How alike two ways of attending to the demonstrations rank them: Kendall's tau-b and top-k recall, per token and per demonstration; NaN = undefined.

Knows maps of attention over items. Knows nothing of models, captures or tables.
"""

# X maps (one per query)  T items (the demonstrations' tokens, in order)  M demonstrations

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from iclgd_dist.schema import TOP_EXAMPLES, TOP_TOKENS


def kendall_tau_b(a_XT: Tensor, b_XT: Tensor) -> Tensor:
    """Return the pairs in the same order minus the pairs in opposite order, as a share of the pairs not tied in a and not tied in b (geometric mean).

    Shapes: returns (X,), float64, NaN where either map is constant. Counts are exact.
    """
    # Measured for 100 maps on one thread, T = 50, 500, 2000 [ms]: this 2, 16, 72; scipy 38, 43, 63; all pairs at once 2, 245, 2750.
    num_pairs = a_XT.shape[1] * (a_XT.shape[1] - 1) // 2
    b_XT, order_XT = b_XT.sort(dim=1, stable=True)
    tied_b_X = _tied_pairs(_differs(b_XT))
    a_XT, again_XT = a_XT.gather(1, order_XT).sort(dim=1, stable=True)
    b_XT = b_XT.gather(1, again_XT)  # in the order of a, of equal a's in the order of b: what falls from here on is in opposite order
    tied_a_X, tied_both_X = _tied_pairs(_differs(a_XT)), _tied_pairs(_differs(a_XT) | _differs(b_XT))
    difference_X = num_pairs - tied_a_X - tied_b_X + tied_both_X - 2 * _falling_pairs(b_XT)
    untied_X = (num_pairs - tied_a_X).double().sqrt() * (num_pairs - tied_b_X).double().sqrt()
    return (difference_X / untied_X).clamp(-1, 1)  # 0 / 0 where one is constant


def _differs(values_XT: Tensor) -> Tensor:
    """Return whether each value differs from the one before it; the first does."""
    return pad(values_XT[:, 1:] != values_XT[:, :-1], (1, 0), value=True)


def _tied_pairs(is_first_XT: Tensor) -> Tensor:
    """Return the number of pairs inside runs of equal values, which begin where `is_first_XT` holds."""
    position_T = torch.arange(is_first_XT.shape[1], device=is_first_XT.device)
    return (position_T - torch.where(is_first_XT, position_T, 0).cummax(1).values).sum(1)


def _falling_pairs(values_XT: Tensor) -> Tensor:
    """Return the number of pairs whose later value is the smaller one: what a merge sort moves the right halves past."""
    num_maps, num_items = values_XT.shape
    values_XT = pad(values_XT, (0, (1 << (num_items - 1).bit_length()) - num_items), value=math.inf)
    falling_X = torch.zeros(num_maps, dtype=torch.int64, device=values_XT.device)
    half = 1
    while half < values_XT.shape[1]:
        blocks, before = values_XT.view(num_maps, -1, 2 * half).sort(dim=2, stable=True)
        num_places = (before - torch.arange(2 * half, device=before.device)).mul_(before >= half)  # each right value moves past the larger left ones
        falling_X += num_places.sum((1, 2))
        values_XT, half = blocks.view(num_maps, -1), 2 * half
    return falling_X


def topk_recall(a_XT: Tensor, b_XT: Tensor, k: int) -> Tensor:
    """Return the share of a's k largest items that are among b's k largest; of equal items the lowest index counts as larger.

    Shapes: returns (X,), float64. With k items every two maps score 1; NaN with fewer (the reference fails there).
    """
    if a_XT.shape[1] < k:
        return torch.full(a_XT.shape[:1], math.nan, dtype=torch.float64, device=a_XT.device)
    top_a_Xk, top_b_Xk = (map_XT.sort(dim=1, descending=True, stable=True).indices[:, :k] for map_XT in (a_XT, b_XT))
    is_top_XT = torch.zeros_like(b_XT, dtype=torch.bool).scatter_(1, top_b_Xk, True)
    return is_top_XT.gather(1, top_a_Xk).double().mean(1)


def attention_over_items(scores_XT: Tensor) -> Tensor:
    """Return the attention that raw scores give when the items are all there is to attend to."""
    return scores_XT.double().softmax(1)


def summed_per_example(map_XT: Tensor, items: Sequence[tuple[int, int]]) -> Tensor:
    """Return the mass of each demonstration (X, M); `items` holds its first item and the one after its last."""
    return torch.stack([map_XT[:, start:end].sum(1) for start, end in items], dim=1)


def compare_attention(in_context_XT: Tensor, finetuned_XT: Tensor, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Compare one layer's raw attention of each query to the demonstrations, ICL's with finetuning's.

    Shapes: maps summed over heads, `items` as in `summed_per_example`; returns (X,) for kendall and topk_recall of tokens and of examples, named as in
    schema.SIMILARITIES.
    Source: Dai et al. 2023, attention to training tokens.
    """
    icl, ft = _levels(in_context_XT, items), _levels(finetuned_XT, items)
    return {name: values for level in icl for name, values in _compared(level, icl[level], ft[level], "").items()}


def random_attention(in_context_XT: Tensor, items: Sequence[tuple[int, int]], *, generator: torch.Generator) -> dict[str, Tensor]:
    """Compare ICL's attention with random maps: the baselines of `compare_attention`.

    A random map holds i.i.d. uniform numbers, one per token or one per demonstration: not a random map of the tokens summed, in which long
    demonstrations would lead.
    """
    found: dict[str, Tensor] = {}
    for level, icl_XT in _levels(in_context_XT, items).items():
        random_XT = torch.rand(icl_XT.shape, generator=generator, dtype=torch.float64).to(icl_XT)
        found |= _compared(level, icl_XT, random_XT, "_random")
    return found


def _levels(scores_XT: Tensor, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    map_XT = attention_over_items(scores_XT)
    return {"tokens": map_XT, "examples": summed_per_example(map_XT, items)}


def _compared(level: str, icl_XT: Tensor, other_XT: Tensor, end: str) -> dict[str, Tensor]:
    num_top = {"tokens": TOP_TOKENS, "examples": TOP_EXAMPLES}[level]
    return {f"kendall_{level}{end}": kendall_tau_b(icl_XT, other_XT), f"topk_recall_{level}{end}": topk_recall(icl_XT, other_XT, num_top)}
