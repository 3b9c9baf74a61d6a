"""The methods: how a frozen model learns from demonstrations, one step each, all learning rates at once.

Knows losses, gradients and optimisers of deltas. Knows nothing of queries, captures or files. Constant learning rate, no decay, clipping or dropout;
unless a variation says otherwise plain SGD, batch 1, one pass in the order of the prompt.
"""

# Shapes: N lanes  L layers  S steps done so far  R sequences of a batch  T positions  D width  V vocabulary  W heads x channels of a head

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from iclgd_dist import own_code
from iclgd_dist.attention import recording_queries
from iclgd_dist.config import SweepError
from iclgd_dist.deltas import Delta, Deltas, LowRank, attached, zeros
from iclgd_dist.extensions import MethodSpec, members
from iclgd_dist.layerwise import Replay
from iclgd_dist.losses import lane_losses
from iclgd_dist.model import LanguageModel
from iclgd_dist.sites import WEIGHTS


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
    gradient_norm_SNL: Tensor  # of each update so far; L = 1 for a single layer; 0 where nothing learns
    # layer -> per update of a pass, as it was done last, the query projections (lanes x sequences, T, W) of the training tokens before it; without them no
    # attention is ranked.
    queries: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)


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
        self,
        lm: LanguageModel,
        index: int,
        layer: Callable[..., Any],
        inputs: LaneInputs,
        learning_rates: Sequence[float],
        *,
        steps: Sequence[int],
        seed: int = 0,
    ) -> Iterator[Probe]: ...


def is_bottom_up(method: Method) -> bool:
    """Whether a method's `train_layer` is its own: one that is inherited beside a new `train` would do something else."""
    classes = type(method).__mro__
    depth = {name: next((n for n, each in enumerate(classes) if name in vars(each)), len(classes)) for name in ("train", "train_layer")}
    return isinstance(method, BottomUp) and depth["train_layer"] <= depth["train"]


@dataclass
class Lanes:
    """Deltas of some layers, all lanes at once; a lane whose loss or gradient is not finite stays where it is.

    `direction(gradient, state)` is the rule: what a step of learning rate 1 subtracts, of the gradient's shape, lane by lane. `state` is a dictionary that
    lives as long as the tensor, for moments and counts.
    """

    deltas: list[dict[str, Delta | LowRank]]  # one per layer; empty where nothing learns
    rate_N: Tensor
    direction: Callable[[Tensor, dict[str, Any]], Tensor]
    alive_N: Tensor = field(init=False)
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.alive_N = torch.ones_like(self.rate_N, dtype=torch.bool)
        self.tensors = [tensor.requires_grad_(True) for layer in self.deltas for delta in layer.values() for tensor in delta.tensors()]
        self.states: list[dict[str, Any]] = [{} for _ in self.tensors]
        self.counts = [sum(len(delta.tensors()) for delta in layer.values()) for layer in self.deltas]

    def update(self, loss_N: Tensor, gradients: Sequence[Tensor] | None = None) -> None:
        """Take one step down the gradient of each lane's own loss, which is asked of autograd unless given. Nothing is read back from the device."""
        if gradients is None:
            gradients = torch.autograd.grad(loss_N.sum(), self.tensors)
        with torch.no_grad():
            home = self.rate_N.device  # a sharded model has its deltas, and a loss, on several devices
            norms = torch.stack([torch.linalg.vector_norm(gradient.flatten(1), dim=1).to(home) for gradient in gradients])
            norm_NL = torch.stack([torch.linalg.vector_norm(part, dim=0) for part in norms.split(self.counts)], dim=1)
            loss_N = loss_N.detach().to(home)
            self.alive_N = self.alive_N & loss_N.isfinite() & norm_NL.isfinite().all(1)
            for tensor, gradient, state in zip(self.tensors, gradients, self.states, strict=True):
                alive, rate = (lane.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)) for lane in (self.alive_N, self.rate_N))
                direction = self.direction(gradient, state)
                if tensor.device.type != "cpu" or not alive.all():  # on a CPU asking is free, and a pass over all deltas is not
                    direction = torch.where(alive, direction, 0.0)
                tensor.addcmul_(direction, rate, value=-1.0)
            self._note(loss_N, norm_NL)

    def rest(self) -> None:
        """Let an update pass in which nothing learns."""
        nothing_N = torch.zeros_like(self.rate_N)
        self._note(nothing_N, nothing_N[:, None].expand(-1, len(self.deltas)))

    def _note(self, loss_N: Tensor, norm_NL: Tensor) -> None:
        self.losses.append(loss_N)
        self.norms.append(norm_NL)

    def probe(self, step: int, queries: Mapping[int, Mapping[int, Tensor]]) -> Probe:
        copies = {name: delta.of([t.detach().clone() for t in delta.tensors()]) for layer in self.deltas for name, delta in layer.items()}
        return Probe(step, copies, torch.stack(self.losses), torch.stack(self.norms), {layer: list(recorded.values()) for layer, recorded in queries.items()})


def sgd(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Plain stochastic gradient descent."""
    return gradient


def adam(gradient: Tensor, state: dict[str, Any]) -> Tensor:
    """Adam with betas .9 and .999 and eps 1e-8, bias-corrected, without weight decay.

    Source: Kingma and Ba 2015, algorithm 1.
    """
    step = state["step"] = state.get("step", 0) + 1
    first = state["first"] = state.get("first", torch.zeros_like(gradient)).lerp(gradient, 0.1)
    second = state["second"] = state.get("second", torch.zeros_like(gradient)).lerp(gradient.square(), 0.001)
    return first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def _rates(lm: LanguageModel, index: int, learning_rates: Sequence[float]) -> Tensor:
    return torch.tensor(learning_rates, dtype=lm.delta_dtype, device=lm.device_of(lm.layers[index]))


def _losses(lm: LanguageModel, hidden_BTD: Tensor, batch: Sequence[TrainingSequence]) -> Tensor:
    """Return each lane's loss (N,): the mean over the sequences of the batch of the mean over the tokens that count; only states that predict them are read."""
    hidden_NRTD = hidden_BTD.unflatten(0, (-1, len(batch)))
    of_rows = [lane_losses(lm, hidden_NRTD[:, row, each.first - 1 : len(each.ids_T) - 1], each.ids_T[each.first :]) for row, each in enumerate(batch)]
    return of_rows[0] if len(of_rows) == 1 else torch.stack(of_rows).mean(0)


@dataclass
class GradientDescent:
    """What the built-in methods share: which projections of which layers learn, and by which rule.

    A rule of one's own is a subclass of Vanilla, LayerCausal or LayerCausalAttention with another `direction`.
    """

    name: str = "method"
    weights: str = "attn_kv"
    layers: tuple[int, ...] | None = None  # negative numbers count from the last; None = all
    optimizer: str = "sgd"
    rank: int | None = None
    batch_size: int = 1

    def direction(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        """Return what a step of learning rate 1 subtracts; see `Lanes`."""
        return {"sgd": sgd, "adam": adam}[self.optimizer](gradient, state)

    def trains(self, lm: LanguageModel, index: int) -> bool:
        return self.layers is None or index in [layer % lm.num_layers for layer in self.layers]

    def lanes(self, lm: LanguageModel, indices: Sequence[int], learning_rates: Sequence[float], seed: int) -> Lanes:
        made = [
            zeros(lm, index, len(learning_rates), parts=WEIGHTS[self.weights], rank=self.rank, seed=seed) if self.trains(lm, index) else {} for index in indices
        ]
        return Lanes(made, _rates(lm, indices[0], learning_rates), self.direction)


@dataclass
class Vanilla(GradientDescent):
    """Finetuning as usual: the loss of the final logits reaches every layer.

    Source: Dai et al. 2023 (finetuning restricted to W_K and W_V, one pass, batch 1).
    """

    name: str = "vanilla"

    def train(
        self, lm: LanguageModel, demonstrations: Sequence[TrainingSequence], learning_rates: Sequence[float], *, steps: Sequence[int], seed: int = 0
    ) -> Iterator[Probe]:
        lanes = self.lanes(lm, range(lm.num_layers), learning_rates, seed)
        queries: dict[int, dict[int, Tensor]] = {index: {} for index in range(lm.num_layers)}
        inputs = LaneInputs(lm, demonstrations, len(learning_rates), num_updates=max(steps), batch_size=self.batch_size)
        for step, (batch, replay) in enumerate(zip(inputs.batches, inputs.replays, strict=True), 1):
            entered: list[Tensor] = []  # what enters each layer, where it has to be run again for its gradient
            for index in range(lm.num_layers):
                with lm.resident(index) as layer, attached(lm, index, lanes.deltas[index]), _keeping_queries(lm, index, queries[index], inputs.place(step)):
                    if lm.is_offloaded:
                        entered.append(replay.hidden_BTD)
                    with torch.set_grad_enabled(not lm.is_offloaded):
                        replay.climb(layer, index)
            if lm.is_offloaded:
                lanes.update(*self._layer_by_layer(lm, lanes, replay, entered, batch))
            else:
                lanes.update(_losses(lm, replay.hidden_BTD, batch))
            replay.hidden_BTD = replay.start_BTD  # what carries the graph
            if step in steps:
                yield lanes.probe(step, queries)

    def _layer_by_layer(
        self, lm: LanguageModel, lanes: Lanes, replay: Replay, entered: list[Tensor], batch: Sequence[TrainingSequence]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return each lane's loss (N,) and its gradients, with the weights and the graph of one layer at a time: each layer is brought in and run again."""
        lowest = min(index for index, deltas in enumerate(lanes.deltas) if deltas)
        above_BTD = replay.hidden_BTD.detach().requires_grad_(True)
        loss_N = _losses(lm, above_BTD, batch)
        (flow_BTD,) = torch.autograd.grad(loss_N.sum(), [above_BTD])
        gradients: list[Tensor] = []
        for index in reversed(range(lowest, lm.num_layers)):
            below_BTD = entered.pop().detach().requires_grad_(index > lowest)
            own = [tensor for delta in lanes.deltas[index].values() for tensor in delta.tensors()]
            with lm.resident(index) as layer, attached(lm, index, lanes.deltas[index]):
                out_BTD = replay.through(layer, index, below_BTD)
                found = torch.autograd.grad(out_BTD, [*own, *([below_BTD] if index > lowest else [])], flow_BTD.to(out_BTD.device))
            gradients[:0] = found[: len(own)]
            flow_BTD = found[-1]
        return loss_N.detach(), gradients


class LaneInputs:
    """The demonstrations of each update on their way up, for all lanes; what enters the next layer is what the lane's own deltas made below.

    One after the other, once, unless there are more updates or larger batches.
    """

    def __init__(
        self, lm: LanguageModel, demonstrations: Sequence[TrainingSequence], num_lanes: int, *, num_updates: int | None = None, batch_size: int = 1
    ) -> None:
        num = len(demonstrations)
        updates = range(num if num_updates is None else num_updates)
        self.batches = [[demonstrations[n] for n in members(update, num, batch_size)] for update in updates]
        self.num_of_a_pass = -(-num // batch_size)
        # Right padding needs no mask: no real token sees what follows it.
        first = [
            Replay(lm, pad_sequence([each.ids_T for each in batch], batch_first=True).repeat(num_lanes, 1)) for batch in self.batches[: self.num_of_a_pass]
        ]
        self.replays = [first[n] if n < len(first) else first[n % len(first)].again() for n in range(len(self.batches))]

    def place(self, step: int) -> int:
        """Return the place in its pass of the update that leads to a step."""
        return (step - 1) % self.num_of_a_pass


@dataclass
class LayerCausal(GradientDescent):
    """Each layer learns from its own local loss: final norm and output head read its block output; no gradient comes from above.

    Source: Deutch et al. 2024 (layer-causal gradient descent, as their code computes it: the early exit of the block's output).
    """

    name: str = "layer_causal"

    @contextlib.contextmanager
    def exit_states(self, lm: LanguageModel, index: int, replay: Replay) -> Iterator[Callable[[], Tensor]]:
        """Yield a function that returns, once layer `index` has been climbed, the states that its loss reads."""
        yield lambda: replay.hidden_BTD

    def train_layer(
        self,
        lm: LanguageModel,
        index: int,
        layer: Callable[..., Any],
        inputs: LaneInputs,
        learning_rates: Sequence[float],
        *,
        steps: Sequence[int],
        seed: int = 0,
    ) -> Iterator[Probe]:
        """Run layer `index` through its whole trajectory and move `inputs` up: step s sees the states that the layers below made at step s."""
        lanes = self.lanes(lm, [index], learning_rates, seed)
        queries: dict[int, dict[int, Tensor]] = {index: {}}
        for step, (batch, replay) in enumerate(zip(inputs.batches, inputs.replays, strict=True), 1):
            with (
                attached(lm, index, lanes.deltas[0]),
                self.exit_states(lm, index, replay) as read,
                _keeping_queries(lm, index, queries[index], inputs.place(step)),
            ):
                replay.climb(layer, index)  # with the deltas before this step's update, as all layers of one model would
            if lanes.tensors:
                lanes.update(_losses(lm, read(), batch))
            else:
                lanes.rest()
            replay.hidden_BTD = replay.hidden_BTD.detach()
            if step in steps:
                yield lanes.probe(step, queries)

    def train(
        self, lm: LanguageModel, demonstrations: Sequence[TrainingSequence], learning_rates: Sequence[float], *, steps: Sequence[int], seed: int = 0
    ) -> Iterator[Probe]:
        """Yield whole-model probes; holds the deltas of every probed step, so for small models only."""
        inputs = LaneInputs(lm, demonstrations, len(learning_rates), num_updates=max(steps), batch_size=self.batch_size)
        by_step: dict[int, list[Probe]] = {step: [] for step in sorted(steps)}
        for index in range(lm.num_layers):
            with lm.resident(index) as layer:
                for probe in self.train_layer(lm, index, layer, inputs, learning_rates, steps=steps, seed=seed):
                    by_step[probe.step].append(probe)
        for step, probes in by_step.items():
            deltas: dict[str, Delta | LowRank] = {}
            queries: dict[int, Sequence[Tensor]] = {}
            for probe in probes:
                deltas |= probe.deltas
                queries |= probe.queries
            # Lanes freeze layer by layer; the losses of a lane that froze below go on, and its cells are marked by the first bad step.
            loss_SN, norm_SNL = torch.stack([probe.loss_SN for probe in probes]).sum(0), torch.cat([probe.gradient_norm_SNL for probe in probes], dim=2)
            yield Probe(step, deltas, loss_SN, norm_SNL, queries)


@dataclass
class LayerCausalAttention(LayerCausal):
    """As LayerCausal, but the early exit reads the attention module's output alone, or with the residual stream that it is added to.

    Source: Deutch et al. 2024, the formula of the paper.
    """

    name: str = "layer_causal_attn"
    residual: bool = False

    @contextlib.contextmanager
    def exit_states(self, lm: LanguageModel, index: int, replay: Replay) -> Iterator[Callable[[], Tensor]]:
        entered_BTD, seen = replay.hidden_BTD, list[Tensor]()
        output = attrgetter(lm.family.output)(lm.layers[index])
        handle = output.register_forward_hook(lambda _module, _args, hidden_BTD: seen.append(hidden_BTD))
        try:
            yield lambda: entered_BTD.to(seen[0].device) + seen[0] if self.residual else seen[0]
        finally:
            handle.remove()


_BASES: Mapping[str, Callable[..., Method]] = {"vanilla": Vanilla, "layer_causal": LayerCausal, "layer_causal_attn": LayerCausalAttention}


def make_method(spec: MethodSpec) -> Method:
    """Return the method that a sweep file names: built in, a variation, or the user's own code.

    Errors: SweepError for code that cannot be imported or does not train.
    """
    if spec.code is not None:
        method = own_code.made(spec)
        if not callable(getattr(method, "train", None)):
            raise SweepError(f"{spec.name}: {spec.code} must have a method `train`, as Vanilla has; got {type(method).__name__}")
        if (size := getattr(method, "batch_size", 1)) != 1:  # what it is compared with would be another context
            raise SweepError(f"{spec.name}: batch_size of code of one's own must be 1, got {size!r}; it is an option of [[method]] with base = ...")
        method.name = spec.name
        return method  # type: ignore[no-any-return]
    assert spec.base is not None
    options: dict[str, Any] = {"residual": spec.residual} if spec.base == "layer_causal_attn" else {}
    options |= {name: getattr(spec, name) for name in ("weights", "layers", "optimizer", "rank", "batch_size")}
    return _BASES[spec.base](name=spec.name, **options)


@contextlib.contextmanager
def _keeping_queries(lm: LanguageModel, index: int, kept: dict[int, Tensor], place: int) -> Iterator[None]:
    with recording_queries(lm, index, lambda query_BTHd: kept.update({place: query_BTHd.detach().flatten(2)})):
        yield


def first_bad_step(loss_SN: Tensor, gradient_norm_SNL: Tensor) -> list[int | None]:
    """Return per lane the first step whose loss or gradient is not finite; None = none so far."""
    bad_SN = ~(loss_SN.isfinite() & gradient_norm_SNL.isfinite().all(2)).cpu()
    return [int(bad_S.nonzero()[0]) + 1 if bad_S.any() else None for bad_S in bad_SN.T]
