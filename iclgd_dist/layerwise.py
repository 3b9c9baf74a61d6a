"""Record and replay: drive any decoder one layer at a time without knowing its family.

The model's own forward runs once with every decoder layer replaced by the identity; the exact arguments of each layer call are kept. Then the
real layers are called one by one, on hidden states of ours, with these arguments. Knows nothing of tasks, training or captures.
"""

# Shapes: B rows  T positions  D width

from __future__ import annotations

import contextlib
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from iclgd_dist.model import LanguageModel, behind, put_before
from iclgd_dist.positions import NOWHERE, computed_only_at


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the arguments, returns the hidden states unchanged."""

    def __init__(self, layer: nn.Module, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        object.__setattr__(self, "_layer", layer)  # not a submodule: hooks and devices of the real layer stay out of it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)  # some models read a layer's attributes, e.g. its attention type

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.call = (args, kwargs)
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        return (hidden_BTD, None) if self.returns_tuple else hidden_BTD


class Replay:
    """A batch of token sequences on its way up through the layers.

    `hidden_BTD` holds the states that enter layer `next_layer`. Right padding needs no mask: no real token sees what follows it.
    """

    def __init__(self, lm: LanguageModel, ids_BT: Tensor, *, cache: Cache | None = None, positions_T: Tensor | None = None) -> None:
        layers = lm.layers
        recorders = [_Recorder(layer, lm.family.returns_tuple) for layer in layers]
        real = [layers[n] for n in range(len(layers))]
        try:
            for n, recorder in enumerate(recorders):
                layers[n] = recorder
            placed = {}
            if positions_T is not None:
                # Without a mask, transformers would take a gap between positions for the border of two packed sequences.
                placed = {"position_ids": positions_T.expand(len(ids_BT), -1).to(lm.input_device), "attention_mask": torch.ones_like(ids_BT)}
            with torch.no_grad():
                lm.model.base_model(input_ids=ids_BT.to(lm.input_device), past_key_values=cache, use_cache=cache is not None, **placed)
        finally:
            for n, layer in enumerate(real):
                layers[n] = layer
        assert all(recorder.call is not None for recorder in recorders), f"{lm.family.model_type}: a layer was not called"
        self.calls = [recorder.call for recorder in recorders]
        self.next_layer = 0
        args, kwargs = self.calls[0]  # type: ignore[misc]
        self.start_BTD: Tensor = args[0] if args else kwargs["hidden_states"]
        self.hidden_BTD = self.start_BTD
        self.resting_BTD: Tensor | None = None

    def again(self) -> Replay:
        """Return the same sequences before the first layer; nothing is recorded anew."""
        other = copy(self)
        other.next_layer, other.hidden_BTD, other.resting_BTD = 0, self.start_BTD, None
        return other

    def through(self, layer: Callable[..., Any], index: int, hidden_BTD: Tensor) -> Tensor:
        """Return what layer `index` makes of `hidden_BTD` when called as the model would call it."""
        put_before(None)
        args, kwargs = self.calls[index]  # type: ignore[misc]
        output = layer(hidden_BTD, *args[1:], **kwargs) if args else layer(**{**kwargs, "hidden_states": hidden_BTD})
        return output[0] if isinstance(output, tuple) else output

    def climb(self, layer: Callable[..., Any], index: int) -> None:
        """Move the states up through layer `index`, which must be the next one."""
        assert index == self.next_layer, f"layer {index} was called, layer {self.next_layer} is next"
        self.hidden_BTD = self.through(layer, index, self.hidden_BTD.to(self.start_BTD.device, non_blocking=True))
        self.next_layer += 1

    def park(self) -> None:
        """Let the states wait in the machine's memory until the next layer; nobody waits for the copy."""
        self.hidden_BTD = to_host(self.hidden_BTD)

    def rest(self, lm: LanguageModel) -> None:
        """Let the states wait where the model's weights rest, in one place for all layers."""
        if self.resting_BTD is None or self.resting_BTD.shape != self.hidden_BTD.shape:
            self.resting_BTD = lm.zeros(*self.hidden_BTD.shape, dtype=self.hidden_BTD.dtype)
        self.hidden_BTD = self.resting_BTD.copy_(self.hidden_BTD)


def to_host(tensor: Tensor) -> Tensor:
    """Return the tensor in pinned memory, on its way there; read it after a synchronisation, or on the stream it came from."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


class _PrefixLayer(DynamicLayer):
    """Keys and values of a shared prefix, read by every row and changed by none.

    `hands_over`: the attention gets them apart from the row's own; else they are copied before these.
    """

    def __init__(self, source: DynamicLayer, length: int, *, hands_over: bool) -> None:
        super().__init__()
        self.source, self.length, self.hands_over = source, length, hands_over

    def get_seq_length(self) -> int:
        return self.length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.source.keys is not None and self.source.values is not None, "the context has to climb a layer before its readers"
        keys, values = (part[:, :, : self.length] for part in (self.source.keys, self.source.values))
        if self.hands_over:
            put_before((keys, values))
            return key_states, value_states
        return behind(keys, key_states), behind(values, value_states)


class Prefix:
    """A context whose keys and values are computed once and shared by all rows of other replays.

    `replay` carries the context up; at each layer it has to climb before the replays that read `cache()`. Plain full layers throughout: the
    caches that transformers makes for sliding-window families forget what lies before the window.
    """

    def __init__(self, lm: LanguageModel, ids_T: Tensor) -> None:
        self.lm, self.length = lm, int(ids_T.shape[0])
        # One layer each from the start: the model asks a cache for its length before any layer has written to it.
        self._layers = [DynamicLayer() for _ in range(lm.num_layers)]
        self._written = DynamicCache()
        self._written.layers.extend(self._layers)
        self.replay = Replay(lm, ids_T[None], cache=self._written)

    def climb(self, layer: Callable[..., Any], index: int) -> None:
        """Carry the context up through layer `index`; of the last one nothing but keys and values is wanted."""
        is_last = index == self.lm.num_layers - 1
        with computed_only_at(self.lm, index, 1, NOWHERE, NOWHERE) if is_last else contextlib.nullcontext():
            self.replay.climb(layer, index)

    def cache(self, length: int | None = None) -> Cache:
        """Return a cache for one replay: reads this prefix, or its first `length` tokens, and stores nothing."""
        hands_over = self.lm.family.scores == "interface"
        return Cache(layers=[_PrefixLayer(layer, length or self.length, hands_over=hands_over) for layer in self._layers])

    def forget(self, index: int) -> None:
        """Drop the keys and values of a layer that nobody will read again."""
        self._layers[index].reset()
