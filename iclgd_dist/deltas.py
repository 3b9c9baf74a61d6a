"""Deltas: what training adds to weights, many lanes at once, attached to a frozen model by hooks.

Knows modules and shapes. Knows nothing of losses, optimisers or tasks. The model's own weights are never written.
"""

# Shapes: N lanes  R rows of a lane  B = N x R rows, lane by lane  T positions  I inputs  O outputs of a projection

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iclgd_dist.model import LanguageModel
from iclgd_dist.sites import Site, sites


@dataclass(frozen=True)
class Delta:
    """What training added to one projection, per lane."""

    weight_NIO: Tensor
    bias_NO: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [self.weight_NIO] if self.bias_NO is None else [self.weight_NIO, self.bias_NO]


Deltas = Mapping[str, Delta]


def zeros(lm: LanguageModel, index: int, num_lanes: int) -> dict[str, Delta]:
    """Return deltas that change nothing, for the sites of one layer; keys are site names."""
    device, dtype = lm.device_of(lm.layers[index]), lm.delta_dtype
    return {
        site.name: Delta(
            torch.zeros(num_lanes, site.num_inputs, site.num_outputs, dtype=dtype, device=device),
            torch.zeros(num_lanes, site.num_outputs, dtype=dtype, device=device) if site.has_bias else None,
        )
        for site in sites(lm, index).values()
    }


@contextlib.contextmanager
def attached(lm: LanguageModel, index: int, deltas: Deltas) -> Iterator[None]:
    """Let layer `index` compute with W + delta of the row's lane, for batches of lanes x rows, while the block runs."""
    handles = []
    try:
        for site in sites(lm, index).values():
            if site.name in deltas:
                handles.append(site.module.register_forward_hook(_adder(site, deltas[site.name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(site: Site, delta: Delta) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight_NIO, bias_NO = delta.weight_NIO, delta.bias_NO
        num_lanes = weight_NIO.shape[0]
        inputs = args[0]
        # The product is formed and added in the deltas' dtype and rounded once: in bfloat16 small updates would be lost.
        change = torch.bmm(inputs.to(weight_NIO.dtype).reshape(num_lanes, -1, site.num_inputs), weight_NIO)
        if bias_NO is not None:
            change = change + bias_NO[:, None]
        change = change.view(*inputs.shape[:-1], site.num_outputs)
        raised = output.to(change.dtype)
        if site.columns is None:
            return (raised + change).to(output.dtype)
        return raised.index_add(-1, site.columns.to(output.device), change).to(output.dtype)

    return add


def norms(lm: LanguageModel, index: int, deltas: Deltas) -> tuple[Tensor, Tensor]:
    """Return the Frobenius norms (N,) of what was added to W_K and to W_V of a layer, biases included."""
    k, v = (
        torch.stack([tensor.flatten(1).double().square().sum(1) for tensor in deltas[site.name].tensors()]).sum(0).sqrt().cpu()
        for site in sites(lm, index).values()
    )
    return k, v
