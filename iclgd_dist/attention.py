"""Queries and keys of any family, as they are computed: hides how a family's attention is reached.

Knows attention modules and hooks. Knows nothing of prompts, lanes or training.
"""

# Shapes: B rows  T tokens  S tokens of keys, a shared prefix included  H query heads  d channels of a head

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from iclgd_dist.model import LanguageModel, ScoreSink, listening, module_at
from iclgd_dist.sites import sites

_PRODUCTS = {torch.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.baddbmm, scaled_dot_product_attention}


@contextlib.contextmanager
def recording_scores(lm: LanguageModel, index: int, sink: ScoreSink) -> Iterator[None]:
    """Call `sink(attention module, query_BHTd, key_BKSd, scaling, prefix_key_1KPd)` at every attention of layer `index`, with what enters the product q.k.

    After norms and rotation, before any mask, position bias or soft cap: scores are q.k x scaling. Grouped keys may have fewer heads than queries.
    Deltas have to be attached before.
    """
    attention = attrgetter(lm.family.attention)(lm.layers[index])
    if lm.family.scores == "interface":
        with listening(lambda module, *seen: sink(module, *seen) if module is attention else None):
            yield
        return
    product = _FirstProduct(lm, attention, sink)
    handle = attrgetter(lm.family.value)(lm.layers[index]).register_forward_hook(product.expect)  # what is last to be projected
    try:
        with product:
            yield
        assert not product.is_expected, f"{lm.family.model_type}: no product of queries and keys was seen"
    finally:
        handle.remove()


class _FirstProduct(TorchFunctionMode):
    """Sees every torch function; the first product of two activations once the values are projected is q.k, however the family writes it."""

    def __init__(self, lm: LanguageModel, attention: nn.Module, sink: ScoreSink) -> None:
        super().__init__()
        self.lm, self.attention, self.sink, self.is_expected = lm, attention, sink, False

    def expect(self, *_: Any) -> None:
        self.is_expected = True

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if self.is_expected and func in _PRODUCTS:
            query, key = (kwargs["batch1"], kwargs["batch2"]) if func is Tensor.baddbmm else args[:2]
            if key.dim() > 2:  # a matrix would be a weight
                self.is_expected = False
                self._show(query, key if func is scaled_dot_product_attention else key.mT)
        return func(*args, **kwargs)

    def _show(self, query: Tensor, key: Tensor) -> None:
        query, key = (states.unflatten(0, (-1, self.lm.num_heads)) if states.dim() == 3 else states for states in (query, key))
        scaling = self.lm.family.scaling
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        self.sink(self.attention, query, key, getattr(self.attention, scaling) if isinstance(scaling, str) else scaling, None)


@contextlib.contextmanager
def recording_queries(lm: LanguageModel, index: int, sink: Callable[[Tensor], None]) -> Iterator[None]:
    """Call `sink(query_BTHd)` at every attention of layer `index`: the projection with bias, after any norm, before rotation, unscaled.

    Gradients flow through what is shown. Deltas have to be attached before.
    """
    layer, site = lm.layers[index], sites(lm, index, ("q",))["q"]
    norm = module_at(layer, lm.family.query_norm)
    clip = getattr(attrgetter(lm.family.attention)(layer), "clip_qkv", None)  # MPT

    def show(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if norm is not None and lm.family.is_norm_by_head:
            sink(output.transpose(1, 2))
            return
        query = output if norm is not None or site.columns is None else output[..., site.columns.to(output.device)]
        if clip:
            query = query.clamp(-clip, clip)
        sink(query if query.dim() == 4 else query.unflatten(-1, (lm.num_heads, -1)))

    handle = (site.module if norm is None else norm).register_forward_hook(show)
    try:
        yield
    finally:
        handle.remove()
