"""Deltas: what training adds to weights, many lanes at once, attached to a frozen model by hooks.

Knows modules and shapes. Knows nothing of losses, optimisers or tasks. The model's own weights are never written.
"""

# Shapes: N lanes  R rows of a lane  B = N x R rows, lane by lane  T positions  I inputs  O outputs of a projection

from __future__ import annotations

import contextlib
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iclgd_dist.config import SweepError
from iclgd_dist.model import LanguageModel
from iclgd_dist.sites import WEIGHTS, Site, sites
from iclgd_dist.spectra import effective_rank, squared_singular_values, stable_rank

ALL_PARTS = WEIGHTS["all_linear"]


@dataclass(frozen=True)
class Delta:
    """What training added to one projection, per lane."""

    weight_NIO: Tensor
    bias_NO: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [self.weight_NIO] if self.bias_NO is None else [self.weight_NIO, self.bias_NO]

    def of(self, tensors: Sequence[Tensor]) -> Delta:
        """Return a delta of the same kind that holds these tensors, in the order of `tensors()`."""
        return Delta(tensors[0], None if self.bias_NO is None else tensors[1])

    def change(self, inputs_NXI: Tensor) -> Tensor:
        """Return what it adds to the projection's outputs (N, X, O)."""
        change = torch.bmm(inputs_NXI, self.weight_NIO)
        return change if self.bias_NO is None else change + self.bias_NO[:, None]

    def squared_norm_N(self) -> Tensor:
        return torch.stack([torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64).square() for tensor in self.tensors()]).sum(0)

    def squared_singular_values(self) -> Tensor:
        """Return those of the weight (N, S), descending."""
        return squared_singular_values(self.weight_NIO)


@dataclass(frozen=True)
class LowRank:
    """What training added to one projection as a product of two thin matrices (LoRA, scale 1), per lane; biases stay as they are."""

    down_NIR: Tensor
    up_NRO: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.down_NIR, self.up_NRO]

    def of(self, tensors: Sequence[Tensor]) -> LowRank:
        return LowRank(*tensors)

    def change(self, inputs_NXI: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(inputs_NXI, self.down_NIR), self.up_NRO)

    def squared_norm_N(self) -> Tensor:
        # |AB|^2 = tr(A'A BB'): the product itself is as large as the weight.
        down, up = self.down_NIR.double(), self.up_NRO.double()
        return ((down.mT @ down) * (up @ up.mT)).sum((1, 2)).clamp(min=0)

    def squared_singular_values(self) -> Tensor:
        """Return those of the product (N, R), descending."""
        return squared_singular_values(torch.linalg.qr(self.down_NIR.double())[1] @ torch.linalg.qr(self.up_NRO.mT.double())[1].mT)


Deltas = Mapping[str, Delta | LowRank]


def zeros(
    lm: LanguageModel, index: int, num_lanes: int, *, parts: Sequence[str] = ("k", "v"), rank: int | None = None, seed: int = 0
) -> dict[str, Delta | LowRank]:
    """Return deltas that change nothing, for sites of one layer; keys are site names.

    With `rank` the down matrices are gaussian with variance 1 / inputs, drawn from `seed` and the site's name and alike in all lanes; the up matrices are 0.
    """
    device, dtype = lm.device_of(lm.layers[index]), lm.delta_dtype
    made: dict[str, Delta | LowRank] = {}
    for site in sites(lm, index, parts).values():
        if rank is None:
            weight_NIO = torch.zeros(num_lanes, site.num_inputs, site.num_outputs, dtype=dtype, device=device)
            made[site.name] = Delta(weight_NIO, torch.zeros(num_lanes, site.num_outputs, dtype=dtype, device=device) if site.has_bias else None)
            continue
        generator = torch.Generator().manual_seed(int(hashlib.sha256(f"{seed}:{site.name}".encode()).hexdigest()[:15], 16))
        down_IR = torch.randn(site.num_inputs, rank, generator=generator) * site.num_inputs**-0.5
        down_NIR = down_IR.to(device, dtype).expand(num_lanes, -1, -1).clone()
        made[site.name] = LowRank(down_NIR, torch.zeros(num_lanes, rank, site.num_outputs, dtype=dtype, device=device))
    return made


def check_names(lm: LanguageModel, deltas: Deltas, index: int | None = None) -> None:
    """Errors: SweepError for a delta of something that is no projection, of layer `index` or of any, which would be attached nowhere; for no delta of any."""
    layers = range(lm.num_layers) if index is None else [index]
    known = {site.name for layer in layers for site in sites(lm, layer, ALL_PARTS).values()}
    if strange := sorted(deltas.keys() - known):
        raise SweepError(f"a delta must be named after a projection, such as {sorted(known)[0]!r}, got {strange[0]!r}")
    if not deltas and index is None:
        raise SweepError("a method must yield deltas of some projection, got none")


@contextlib.contextmanager
def attached(lm: LanguageModel, index: int, deltas: Deltas) -> Iterator[None]:
    """Let layer `index` compute with W + delta of the row's lane, for batches of lanes x rows, while the block runs."""
    handles = []
    try:
        for site in sites(lm, index, ALL_PARTS).values() if deltas else ():
            if site.name in deltas:
                handles.append(site.module.register_forward_hook(_adder(site, deltas[site.name])))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _adder(site: Site, delta: Delta | LowRank) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    first = delta.tensors()[0]

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs = args[0]
        # The product is formed and added in the deltas' dtype and rounded once: in bfloat16 small updates would be lost.
        change = delta.change(inputs.to(first.dtype).reshape(first.shape[0], -1, site.num_inputs)).view(*inputs.shape[:-1], site.num_outputs)
        raised = output.to(change.dtype)
        if site.columns is None:
            return (raised + change).to(output.dtype)
        return raised.index_add(-1, site.columns.to(output.device), change).to(output.dtype)

    return add


def norms(lm: LanguageModel, index: int, deltas: Deltas) -> dict[str, Tensor]:
    """Return per trained part of a layer (q, k, v, o, mlp) the Frobenius norm (N,) of what was added to it, biases included; it stays on its device."""
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for site in sites(lm, index, ALL_PARTS).values():
        if site.name in deltas:
            squares[site.part.partition(".")[0]].append(deltas[site.name].squared_norm_N())
    return {part: torch.stack(of_part).sum(0).sqrt() for part, of_part in squares.items()}


def ranks(lm: LanguageModel, index: int, deltas: Deltas) -> dict[str, Tensor]:
    """Return stable and effective rank (N,) of what was added to each trained projection of a layer, without its bias."""
    found: dict[str, Tensor] = {}
    for site in sites(lm, index, ALL_PARTS).values():
        if site.name in deltas:
            squares_NS = deltas[site.name].squared_singular_values()
            found |= {f"stable_rank_{site.part}": stable_rank(squares_NS), f"effective_rank_{site.part}": effective_rank(squares_NS)}
    return found
