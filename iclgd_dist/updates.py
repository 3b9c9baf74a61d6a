"""The methods: how a frozen model learns from demonstrations, one SGD step each, all learning rates at once.

Knows losses and gradients of deltas. Knows nothing of queries, captures or files. Plain SGD: batch 1, constant learning rate, one pass in the
order of the prompt; no momentum, decay, clipping or dropout.
"""

# Shapes: N lanes  L layers  S steps done so far  T positions  D width  V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from iclgd_dist.deltas import Delta, Deltas, attached, zeros
from iclgd_dist.layerwise import Replay
from iclgd_dist.model import LanguageModel


@dataclass(frozen=True)
class TrainingSequence:
    """One demonstration to train on: token ids and the index of the first one that is in the loss."""

    ids_T: Tensor
    first: int


@dataclass(frozen=True)
class Probe:
    """Where training stands after `step` updates. `deltas` are copies: theirs to keep."""

    step: int
    deltas: Deltas
    loss_SN: Tensor  # before each update so far [nats per token]
    gradient_norm_SNL: Tensor  # of each update so far; L = 1 for a single layer


@runtime_checkable
class Method(Protocol):
    """What trains: yields a Probe after each of `steps`. Lanes are independent; base weights are untouched."""

    name: str

    def train(
        self, lm: LanguageModel, demonstrations: Sequence[TrainingSequence], learning_rates: Sequence[float], *, steps: Sequence[int], seed: int = 0
    ) -> Iterator[Probe]: ...


@runtime_checkable
class BottomUp(Method, Protocol):
    """A Method whose layers need nothing from above: a layer's whole trajectory can be run before the next layer is touched."""

    def train_layer(
        self, lm: LanguageModel, index: int, layer: Callable[..., Any], inputs: LaneInputs, learning_rates: Sequence[float], *, steps: Sequence[int]
    ) -> Iterator[Probe]: ...


@dataclass
class _Sgd:
    """Deltas of some layers under plain SGD, all lanes at once; a lane whose loss or gradient is not finite stays where it is."""

    deltas: list[dict[str, Delta]]  # one per trained layer
    rate_N: Tensor
    alive_N: Tensor = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.alive_N = torch.ones_like(self.rate_N, dtype=torch.bool)
        for tensor in self._tensors():
            tensor.requires_grad_(True)

    def _tensors(self) -> list[Tensor]:
        return [tensor for layer in self.deltas for delta in layer.values() for tensor in delta.tensors()]

    def update(self, loss_N: Tensor) -> None:
        """Take one step down the gradient of each lane's own loss. Nothing is read back from the device."""
        gradients = torch.autograd.grad(loss_N.sum(), self._tensors())
        with torch.no_grad():
            home = self.rate_N.device  # a sharded model has its deltas, and a loss, on several devices
            squares = torch.stack([gradient.flatten(1).square().sum(1).to(home) for gradient in gradients])
            counts = [sum(len(delta.tensors()) for delta in layer.values()) for layer in self.deltas]
            norm_NL = torch.stack([part.sum(0) for part in squares.split(counts)], dim=1).sqrt()
            loss_N = loss_N.detach().to(home)
            self.alive_N = self.alive_N & loss_N.isfinite() & norm_NL.isfinite().all(1)
            for tensor, gradient in zip(self._tensors(), gradients, strict=True):
                alive, rate = (lane.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)) for lane in (self.alive_N, self.rate_N))
                tensor.copy_(torch.where(alive, tensor - rate * gradient, tensor))
            self.losses.append(loss_N)
            self.norms.append(norm_NL)

    def probe(self, step: int) -> Probe:
        copies = {
            name: Delta(delta.weight_NIO.detach().clone(), None if delta.bias_NO is None else delta.bias_NO.detach().clone())
            for layer in self.deltas
            for name, delta in layer.items()
        }
        return Probe(step, copies, torch.stack(self.losses), torch.stack(self.norms))


def _rates(lm: LanguageModel, index: int, learning_rates: Sequence[float]) -> Tensor:
    return torch.tensor(learning_rates, dtype=lm.delta_dtype, device=lm.device_of(lm.layers[index]))


def _lane_losses(lm: LanguageModel, hidden_NTD: Tensor, sequence: TrainingSequence) -> Tensor:
    """Return each lane's mean cross-entropy (N,) of the early exit over the sequence's loss tokens."""
    targets = sequence.ids_T[sequence.first :]
    logits_NTV = lm.early_exit(hidden_NTD[:, sequence.first - 1 : -1])
    logits_NTV = logits_NTV.to(lm.delta_dtype)
    num_lanes, num_targets = logits_NTV.shape[:2]
    losses = cross_entropy(logits_NTV.flatten(0, 1), targets.to(logits_NTV.device).repeat(num_lanes), reduction="none")
    return losses.view(num_lanes, num_targets).mean(1)


class Vanilla:
    """Finetuning as usual: the loss of the final logits reaches every layer.

    Source: Dai et al. 2023 (finetuning restricted to W_K and W_V, one pass, batch 1).
    """

    name = "vanilla"

    def train(
        self, lm: LanguageModel, demonstrations: Sequence[TrainingSequence], learning_rates: Sequence[float], *, steps: Sequence[int], seed: int = 0
    ) -> Iterator[Probe]:
        num_lanes = len(learning_rates)
        sgd = _Sgd([zeros(lm, index, num_lanes) for index in range(lm.num_layers)], _rates(lm, 0, learning_rates))
        for step, sequence in enumerate(demonstrations[: max(steps)], 1):
            replay = Replay(lm, sequence.ids_T.expand(num_lanes, -1))
            for index in range(lm.num_layers):
                with lm.resident(index) as layer, attached(lm, index, sgd.deltas[index]):
                    replay.climb(layer, index)
            sgd.update(_lane_losses(lm, replay.hidden_BTD, sequence))
            if step in steps:
                yield sgd.probe(step)


class LaneInputs:
    """The demonstrations on their way up, each as a batch of lanes; what enters the next layer is what the lane's own deltas made below."""

    def __init__(self, lm: LanguageModel, demonstrations: Sequence[TrainingSequence], num_lanes: int) -> None:
        self.sequences = list(demonstrations)
        self.replays = [Replay(lm, sequence.ids_T.expand(num_lanes, -1)) for sequence in demonstrations]


class LayerCausal:
    """Each layer learns from its own local loss: final norm and output head read its block output; no gradient comes from above.

    Source: Deutch et al. 2024 (layer-causal gradient descent, as their code computes it: the early exit of the block's output).
    """

    name = "layer_causal"

    def train_layer(
        self, lm: LanguageModel, index: int, layer: Callable[..., Any], inputs: LaneInputs, learning_rates: Sequence[float], *, steps: Sequence[int]
    ) -> Iterator[Probe]:
        """Run layer `index` through its whole trajectory and move `inputs` up: step s sees the states that the layers below made at step s."""
        sgd = _Sgd([zeros(lm, index, len(learning_rates))], _rates(lm, index, learning_rates))
        for step, (sequence, replay) in enumerate(zip(inputs.sequences, inputs.replays, strict=True), 1):
            with attached(lm, index, sgd.deltas[0]):
                replay.climb(layer, index)  # with the deltas before this step's update, as all layers of one model would
            sgd.update(_lane_losses(lm, replay.hidden_BTD, sequence))
            replay.hidden_BTD = replay.hidden_BTD.detach()
            if step in steps:
                yield sgd.probe(step)

    def train(
        self, lm: LanguageModel, demonstrations: Sequence[TrainingSequence], learning_rates: Sequence[float], *, steps: Sequence[int], seed: int = 0
    ) -> Iterator[Probe]:
        """Yield whole-model probes; holds the deltas of every probed step, so for small models only."""
        inputs = LaneInputs(lm, demonstrations[: max(steps)], len(learning_rates))
        by_step: dict[int, list[Probe]] = {step: [] for step in sorted(steps)}
        for index in range(lm.num_layers):
            with lm.resident(index) as layer:
                for probe in self.train_layer(lm, index, layer, inputs, learning_rates, steps=steps):
                    by_step[probe.step].append(probe)
        for step, probes in by_step.items():
            deltas: dict[str, Delta] = {}
            for probe in probes:
                deltas |= probe.deltas
            # Lanes freeze layer by layer; the losses of a lane that froze below go on, and its cells are marked by the first bad step.
            yield Probe(step, deltas, torch.stack([probe.loss_SN for probe in probes]).sum(0), torch.cat([probe.gradient_norm_SNL for probe in probes], dim=2))


METHODS: Mapping[str, Method] = {method.name: method for method in (Vanilla(), LayerCausal())}


def first_bad_step(loss_SN: Tensor, gradient_norm_SNL: Tensor) -> list[int | None]:
    """Return per lane the first step whose loss or gradient is not finite; None = none so far."""
    bad_SN = ~(loss_SN.isfinite() & gradient_norm_SNL.isfinite().all(2)).cpu()
    return [int(bad_S.nonzero()[0]) + 1 if bad_S.any() else None for bad_S in bad_SN.T]
