"""A layer computed at some positions only: what nobody reads above the last layer is not computed there.

Knows projections and indices. Knows nothing of prompts, deltas or captures. Keys and values are computed everywhere, since other positions look at them.
"""

# Shapes: B rows  T positions  X (row, position) pairs  I inputs  O outputs of a projection

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from iclgd_dist.model import LanguageModel
from iclgd_dist.sites import sites


@contextlib.contextmanager
def computed_only_at(lm: LanguageModel, index: int, num_rows: int, row_X: Tensor, position_X: Tensor) -> Iterator[None]:
    """Let layer `index` compute queries, attention output and MLP at the given positions of a batch only; what it returns elsewhere means nothing."""
    with contextlib.ExitStack() as stack:
        for site in sites(lm, index, ("q", "o", "mlp")).values():
            if site.columns is None:  # a fused projection makes keys and values too
                stack.enter_context(_forward_of(site.module, _only_at(site.module.forward, num_rows, row_X, position_X)))
        yield


def _only_at(forward: Callable[[Tensor], Tensor], num_rows: int, row_X: Tensor, position_X: Tensor) -> Callable[[Tensor], Tensor]:
    def at_some(inputs: Tensor) -> Tensor:
        flat = inputs.reshape(-1, inputs.shape[-1])  # OPT's MLP sees (B x T, I)
        at_X = (row_X * (len(flat) // num_rows) + position_X).to(inputs.device)
        taken_XO = forward(flat[at_X])
        made = taken_XO.new_zeros(len(flat), taken_XO.shape[-1])
        made[at_X] = taken_XO
        return made.view(*inputs.shape[:-1], -1)

    return at_some


@contextlib.contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put another `forward` in a module's place; hooks on the module stay around it."""
    before = module.__dict__.get("forward")  # accelerate puts its own there
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before  # type: ignore[method-assign]


NOWHERE = torch.empty(0, dtype=torch.long)
