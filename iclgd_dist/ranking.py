"""How alike two ways of attending to the demonstrations rank them: Kendall's tau-b and top-k recall, per token and per demonstration; NaN = undefined.

Knows maps of attention over items. Knows nothing of models, captures or tables.
"""

# N lanes  X maps (one per query)  T items (the demonstrations' tokens, in order)  M demonstrations

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from iclgd_dist.schema import TOP_EXAMPLES, TOP_TOKENS

NUMBERS_AT_ONCE = 2**21  # of one table, while pairs are counted: 16 MB


def kendall_tau_b(a_XT: Tensor, b_NXT: Tensor) -> Tensor:
    """Return the pairs in the same order minus the pairs in opposite order, as a share of the pairs not tied in a and not tied in b (geometric mean).

    Shapes: b may have lanes in front, each compared with a; returns (N, X), or (X,), float64, NaN where either map is constant. Counts are exact.
    """
    # Measured for 8 lanes of 32 maps on one thread, T = 50, 250, 1000 [ms]: this 1.4, 4, 26; a merge sort in torch 3.5, 20, 130; scipy takes longer still.
    num_items = a_XT.shape[-1]
    num_pairs = num_items * (num_items - 1) // 2
    a_XT, order_XT = _sorted(a_XT)
    is_first_XT = _differs(a_XT)
    tied_a_X = _tied_pairs(is_first_XT)
    # In the order of b, of equal b's in the order of a: what falls in a from here on is in opposite order.
    b_NXT, place_NXT = _sorted(b_NXT.gather(-1, order_XT.expand_as(b_NXT)))
    differs_NXT = _differs(b_NXT)
    tied_b_NX, tied_both_NX = _tied_pairs(differs_NXT), torch.zeros_like(tied_a_X)
    if tied_a_X.any():  # seldom
        run_NXT = _starts(is_first_XT).expand_as(place_NXT).gather(-1, place_NXT)
        tied_both_NX = _tied_pairs(differs_NXT | _differs(run_NXT))
        _, again_NXT = _sorted(run_NXT)
        place_NXT = torch.empty_like(place_NXT).scatter_(-1, again_NXT, torch.arange(num_items, device=place_NXT.device).expand_as(place_NXT))
    difference_NX = num_pairs - tied_a_X - tied_b_NX + tied_both_NX - 2 * _falling_pairs(place_NXT)
    untied_NX = (num_pairs - tied_a_X).double().sqrt() * (num_pairs - tied_b_NX).double().sqrt()
    return (difference_NX / untied_NX).clamp(-1, 1)  # 0 / 0 where one is constant


def _sorted(values_XT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values in rising order, equal ones in the order they had, and where each was."""
    if values_XT.device.type != "cpu":
        values_XT, order_XT = values_XT.sort(dim=-1, stable=True)
        return values_XT, order_XT
    order_XT = torch.from_numpy(np.argsort(values_XT.numpy(), axis=-1))  # a quarter of the time of torch's, but not stable
    rising_XT = values_XT.gather(-1, order_XT)
    has_ties_X = (rising_XT[..., 1:] == rising_XT[..., :-1]).any(-1)
    if has_ties_X.any():
        order_XT[has_ties_X] = values_XT[has_ties_X].sort(dim=-1, stable=True).indices
    return rising_XT, order_XT


def _differs(values_XT: Tensor) -> Tensor:
    """Return whether each value differs from the one before it; the first does."""
    return pad(values_XT[..., 1:] != values_XT[..., :-1], (1, 0), value=True)


def _starts(is_first_XT: Tensor) -> Tensor:
    """Return where the run of equal values begins that each value lies in; runs begin where `is_first_XT` holds."""
    position_T = torch.arange(is_first_XT.shape[-1], device=is_first_XT.device)
    return torch.where(is_first_XT, position_T, 0).cummax(-1).values


def _tied_pairs(is_first_XT: Tensor) -> Tensor:
    """Return the number of pairs inside runs of equal values, which begin where `is_first_XT` holds."""
    return (torch.arange(is_first_XT.shape[-1], device=is_first_XT.device) - _starts(is_first_XT)).sum(-1)


def _falling_pairs(place_XT: Tensor) -> Tensor:
    """Return the number of pairs of a permutation of 0, 1, ... whose later number is the smaller one.

    Places and numbers are cut into blocks: pairs that lie in different blocks of both are counted by block, the others one by one.
    """
    num_items = place_XT.shape[-1]
    shift = max(4, num_items.bit_length() // 2)
    at_once = max(1, NUMBERS_AT_ONCE // ((num_items >> shift) + 1) ** 2)
    return torch.cat([_falling_in_blocks(some_XT, shift) for some_XT in place_XT.flatten(0, -2).split(at_once)]).unflatten(0, place_XT.shape[:-1])


def _falling_in_blocks(place_XT: Tensor, shift: int) -> Tensor:
    num_items = place_XT.shape[1]
    size, num_blocks = 1 << shift, (num_items >> shift) + 1
    everywhere_T = torch.arange(num_blocks * size, device=place_XT.device)
    place_XT = torch.cat([place_XT, everywhere_T[num_items:].expand(len(place_XT), -1)], dim=1)
    inverse_XT = torch.empty_like(place_XT).scatter_(1, place_XT, everywhere_T.expand_as(place_XT))
    # In one block of places; then in one block of numbers, but different blocks of places.
    falling_sXB = torch.zeros(size, len(place_XT), num_blocks, dtype=torch.int32, device=place_XT.device)
    larger_sXB = torch.empty_like(falling_sXB)
    for values_XT in (place_XT, inverse_XT >> shift):
        values_sXB = values_XT.to(torch.int32).unflatten(1, (num_blocks, size)).permute(2, 0, 1).contiguous()
        for apart in range(1, size):
            falling_sXB[:-apart] += torch.gt(values_sXB[:-apart], values_sXB[apart:], out=larger_sXB[:-apart])
    # In different blocks of both: the numbers in each pair of blocks, times those in earlier blocks of places and later blocks of numbers.
    cell_XT = (everywhere_T >> shift) * num_blocks + (place_XT >> shift)
    counts_XC = torch.zeros(len(place_XT), num_blocks**2, dtype=torch.int64, device=place_XT.device).scatter_add_(1, cell_XT, torch.ones_like(cell_XT))
    counts_XBB = counts_XC.unflatten(1, (num_blocks, num_blocks))
    earlier_XBB = counts_XBB.cumsum(1) - counts_XBB
    later_XBB = earlier_XBB.sum(2, keepdim=True) - earlier_XBB.cumsum(2)
    return falling_sXB.sum((0, 2)) + (counts_XBB * later_XBB).sum((1, 2))


def topk_recall(a_XT: Tensor, b_NXT: Tensor, k: int) -> Tensor:
    """Return the share of a's k largest items that are among b's k largest; of equal items the lowest index counts as larger.

    Shapes: as in `kendall_tau_b`. With k items every two maps score 1; NaN with fewer (the reference fails there).
    """
    if a_XT.shape[-1] < k:
        return torch.full(b_NXT.shape[:-1], math.nan, dtype=torch.float64, device=a_XT.device)
    top_a_Xk, top_b_NXk = (_sorted(-maps)[1][..., :k] for maps in (a_XT, b_NXT))
    is_top_NXT = torch.zeros_like(b_NXT, dtype=torch.bool).scatter_(-1, top_b_NXk, True)
    return is_top_NXT.gather(-1, top_a_Xk.expand_as(top_b_NXk)).double().mean(-1)


def attention_over_items(scores_XT: Tensor) -> Tensor:
    """Return the attention that raw scores give when the items are all there is to attend to."""
    return scores_XT.double().softmax(-1)


def summed_per_example(map_XT: Tensor, items: Sequence[tuple[int, int]]) -> Tensor:
    """Return the mass of each demonstration (..., X, M); `items` holds its first item and the one after its last."""
    return torch.stack([map_XT[..., start:end].sum(-1) for start, end in items], dim=-1)


def compare_attention(in_context_XT: Tensor, finetuned_NXT: Tensor, items: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Compare one layer's raw attention of each query to the demonstrations, ICL's with finetuning's.

    Shapes: maps summed over heads, `items` as in `summed_per_example`; returns (N, X), or (X,), for kendall and topk_recall of tokens and of examples,
    named as in schema.SIMILARITIES.
    Source: Dai et al. 2023, attention to training tokens.
    """
    icl, ft = _levels(in_context_XT, items), _levels(finetuned_NXT, items)
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
