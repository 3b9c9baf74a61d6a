"""One block on one page: baselines, training, captures, comparison, commits. Knows no Ray: it runs under a debugger.

All that needs nothing from above rides up through the layers together, so that a layer's weights are brought in once: zero-shot, the noise check,
the contexts and the queries in them, and every bottom-up method with the captures of all its steps. The other methods follow, one by one.
"""

# Shapes: N lanes  T positions  W heads x channels of a head

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from iclgd_dist.baselines import Baselines, queries_of
from iclgd_dist.blocks import Block, max_positions
from iclgd_dist.commits import Committer
from iclgd_dist.comparison import Baseline
from iclgd_dist.deltas import check_names
from iclgd_dist.encoding import Encoded, encode
from iclgd_dist.extensions import members
from iclgd_dist.machine import empty_cache, is_out_of_memory
from iclgd_dist.measures import MetricError
from iclgd_dist.model import LanguageModel
from iclgd_dist.packing import Parts, budget_gib, elsewhere_gib, num_neighbours
from iclgd_dist.probes import QueryPass
from iclgd_dist.random_deltas import random_measures
from iclgd_dist.store import Store
from iclgd_dist.supervised import Supervised
from iclgd_dist.trajectory import Trajectory
from iclgd_dist.updates import BottomUp, LaneInputs, Probe, TrainingSequence, is_bottom_up, make_method


@dataclass
class Progress:
    """How far a block is; the same object is updated and yielded again."""

    total_flops: float
    done_flops: float = 0.0
    stage: str = "starting"
    num_cells: int = 0  # committed by this run of the block
    num_baselines: int = 0
    num_training_steps: int = 0  # updates, summed over methods and lanes
    num_lanes: int = 0  # most learning rates of a method in the part that ran last
    figures: dict[str, dict[str, float]] = field(default_factory=dict)  # of the step committed last, where somebody tracks them: method and lr -> figures
    step: int = 0  # committed last
    judged: tuple[int, float] | None = None  # the step committed last and the figure of fold A that a scheduler stops by; smaller is better

    def at(self, stage: str, flops: float = 0.0) -> Progress:
        self.stage = stage
        self.done_flops = min(self.total_flops, self.done_flops + flops)
        return self


def run_block(lm: LanguageModel, block: Block, store: Store) -> Progress:
    """Compute and commit every cell of a block; return the counts."""
    *_, progress = block_steps(lm, block, store)
    return progress


def block_steps(lm: LanguageModel, block: Block, store: Store) -> Iterator[Progress]:
    """Compute and commit every cell of a block, yielding between pieces of work so that the caller can report or stop.

    A cell that is there already is kept; a lane that diverges becomes rows with status `diverged` and leaves the others unchanged. Lanes that do not
    fit in memory together run one part after the other over the same baselines.
    Errors: MemoryError or torch.OutOfMemoryError when baselines, or a lane alone, did not fit, and MetricError for a metric of the user's own that
    gave nothing: both at the end, when all other cells are committed.
    """
    progress = Progress(block.cost.flops)
    encoded = encode(block.draw, lm.tokenizer, protocol=block.protocol, max_positions=max_positions(block.model.config))
    commit = Committer(lm, block, store, encoded)
    if block.random_targets:
        encoded = replace(encoded, control_contexts={})
    counted_twice = 0.0 if block.resources.device_map == "disk" else elsewhere_gib(lm)  # a block's cost has all weights, but of a model on disk
    parts = Parts(block, encoded, budget_gib(lm.input_device, num_neighbours(block)) + counted_twice)
    share = _Shares(block)
    probed = [] if block.random_targets else block.seen()
    baselines: Baselines | None = None
    baseline: Baseline | None = None
    while baseline is None or parts:
        part, full = parts.next(), ""
        rides = [_Ride(lm, part, encoded, name, train_on) for name, train_on in part.trained()] if part else []
        progress.num_lanes = max((ride.num_lanes for ride in rides), default=progress.num_lanes)
        try:
            if baseline is None:
                baselines = Baselines(lm, block, encoded, probed)
            assert baselines is not None
            bottom_up = [ride for ride in rides if ride.is_bottom_up]
            yield from _up_together(lm, baselines if baseline is None else None, bottom_up, progress, share)
            if baseline is None:
                made = baselines.compare()
                progress.num_baselines += 2
                progress.num_cells += commit.baselines(baselines, made)
                baseline = made  # now that its cells are there: until then memory that runs out is that of baselines
            for ride in bottom_up:
                yield from _commit_passes(ride, baselines, baseline, commit, progress)
            for ride in rides:
                if not ride.is_bottom_up:
                    yield from _train_and_commit(lm, ride, baselines, baseline, commit, progress, share)
        except Exception as error:
            if part is None or not is_out_of_memory(error):
                raise
            full = " ".join(str(error).split()) or type(error).__name__
        if full and part:  # outside the handler, which holds on to what filled the memory
            rides.clear()
            bottom_up = []
            baselines = baselines if baseline else None
            empty_cache()
            parts.out_of_memory(part, commit.done, full, has_baselines=baseline is not None)
            yield progress.at("out of memory; half as many lanes")
    if block.random_targets:
        assert baseline is not None
        for number, target in enumerate(block.random_targets, 1):  # one after another: a cell's three draws are as many lanes as memory has to hold
            for stage, rows in random_measures(lm, replace(block, random_targets=(target,)), encoded, baseline):
                commit.measures(rows)
                progress.num_cells += len({row["key"] for row in rows})
                yield progress.at(
                    f"random weights {number}/{len(block.random_targets)}, {stage}",
                    (block.cost.flops - block.cost.baseline_flops) / (5 * len(block.random_targets)),
                )
    parts.check()
    if commit.problems:
        raise MetricError("; ".join(dict.fromkeys(commit.problems)))


def _up_together(lm: LanguageModel, baselines: Baselines | None, rides: Sequence[_Ride], progress: Progress, share: _Shares) -> Iterator[Progress]:
    """Carry the baselines, if they are still to be made, and every bottom-up method up through the layers."""
    if baselines is None and not rides:
        return
    for ride in rides:
        ride.board()
    yield progress.at("prompts read")
    for index in range(lm.num_layers):
        with lm.resident(index) as layer:
            if baselines is not None:
                baselines.climb(layer, index)
                yield progress.at(f"layer {index + 1}/{lm.num_layers}", share.baseline / lm.num_layers)
            for ride in rides:
                for step in ride.climb(layer, index):
                    yield progress.at(f"{ride.name}, layer {index + 1}/{lm.num_layers}, step {step}", share.of(ride) / (len(ride.passes) * lm.num_layers))


def _commit_passes(ride: _Ride, baselines: Baselines, baseline: Baseline, commit: Committer, progress: Progress) -> Iterator[Progress]:
    """Commit every probed step of a method that rode up."""
    ride.trajectory.settle()
    progress.num_training_steps += ride.trajectory.steps[-1] * ride.num_lanes
    for step in list(ride.passes):
        progress.num_cells += commit.finetuned(baselines, baseline, ride.trajectory, step, ride.passes.pop(step).captures(), ride.supervised_at(step))
        yield from _committed(progress, commit, ride, step)


def _train_and_commit(
    lm: LanguageModel, ride: _Ride, baselines: Baselines, baseline: Baseline, commit: Committer, progress: Progress, share: _Shares
) -> Iterator[Progress]:
    """Train a method whose layers need what is above them, and capture and commit each probed step before the next one trains."""
    steps = ride.trajectory.steps
    for probe in ride.train():
        check_names(lm, probe.deltas)
        ride.trajectory.add_model(lm, probe)
        progress.num_training_steps += ride.trajectory.steps_since_last(probe.step) * ride.num_lanes
        yield progress.at(f"{ride.name}, step {probe.step} trained", share.of(ride) / (2 * len(steps)))
        query_pass = ride.waiting.again()
        ride.supervise(probe.step)
        for index in range(lm.num_layers):
            with lm.resident(index) as layer:
                ride.capture(layer, index, probe, query_pass)
            yield progress.at(f"{ride.name}, step {probe.step}, layer {index + 1}/{lm.num_layers}", share.of(ride) / (2 * len(steps) * lm.num_layers))
        progress.num_cells += commit.finetuned(baselines, baseline, ride.trajectory, probe.step, query_pass.captures(), ride.supervised_at(probe.step))
        yield from _committed(progress, commit, ride, probe.step)
        del probe, query_pass  # before the next step trains


def _committed(progress: Progress, commit: Committer, ride: _Ride, step: int) -> Iterator[Progress]:
    """Tell that a step was committed, once with what it came to."""
    progress.step, progress.figures = step, commit.figures
    if not ride.is_bottom_up and step < ride.trajectory.steps[-1]:  # else there is nothing left to stop
        progress.judged = commit.judged
    yield progress.at(f"{ride.name}, step {step} committed")
    progress.figures, progress.judged = {}, None


class _Ride:
    """A method on one version of the demonstrations, with the captures of its probed steps."""

    def __init__(self, lm: LanguageModel, block: Block, encoded: Encoded, name: str, train_on: str) -> None:
        self.lm, self.block, self.encoded, self.spec = lm, block, encoded, block.method(name)
        self.method = make_method(self.spec)
        rates, steps = block.learning_rates(name, train_on), block.steps(name, train_on)
        self.trajectory = Trajectory(name, train_on, rates, steps, keeps_ranks=block.measured.spectra)
        self.name = name if train_on == "true" else f"{name} on {train_on}"
        self.training = encoded.training_for(train_on)
        self.sequences = [
            TrainingSequence(torch.tensor(ids, device=lm.input_device), first)
            for ids, first in zip(self.training.sequences, self.training.first_loss, strict=True)
        ]
        self.num_lanes = len(self.trajectory.learning_rates)
        self.is_bottom_up = is_bottom_up(self.method)
        self.passes: dict[int, QueryPass] = {}
        self.supervised: dict[int, Supervised] = {}  # by step: finetuned weights with the demonstrations in the prompt

    @cached_property
    def waiting(self) -> QueryPass:
        """The queries before the first layer."""
        return queries_of(self.lm, self.block, self.encoded, num_lanes=self.num_lanes)

    def items(self, index: int, probe: Probe) -> Tensor | None:
        """Return the query projections (N, T, W) of the demonstrations' tokens so far, or None where their attention is not compared."""
        if index not in probe.queries or not self.encoded.same_order:
            return None  # where a layer is missing, no attention of the method is ranked
        found: dict[int, Tensor] = {}  # of each demonstration, as it was trained on last
        items = self.training.items
        for update, query_BTW in enumerate(probe.queries[index]):
            numbers = members(update, len(items), self.spec.batch_size)
            query_NRTW = query_BTW.unflatten(0, (self.num_lanes, -1))
            found |= {number: query_NRTW[:, row, slice(*items[number])] for row, number in enumerate(numbers)}
        return torch.cat([found[number] for number in sorted(found)], dim=1)

    def train(self) -> Iterator[Probe]:
        return self.method.train(self.lm, self.sequences, self.trajectory.learning_rates, steps=self.trajectory.steps, seed=self.block.seed)

    def board(self) -> None:
        """Make ready to climb layer by layer."""
        size = {"num_updates": self.trajectory.steps[-1], "batch_size": self.spec.batch_size}
        self.inputs = LaneInputs(self.lm, self.sequences, self.num_lanes, **size)
        self.passes = {step: self.waiting.again() for step in self.trajectory.steps}
        for step in self.trajectory.steps:
            self.supervise(step)

    def climb(self, layer: Any, index: int) -> Iterator[int]:
        """Train layer `index` and move the queries of every probed step through it, yielding each step when it is done."""
        assert isinstance(self.method, BottomUp)
        rates, steps = self.trajectory.learning_rates, self.trajectory.steps
        for probe in self.method.train_layer(self.lm, index, layer, self.inputs, rates, steps=steps, seed=self.block.seed):
            check_names(self.lm, probe.deltas, index)
            self.trajectory.add_layer(self.lm, index, probe)
            self.capture(layer, index, probe, self.passes[probe.step])
            yield probe.step

    def supervise(self, step: int) -> None:
        """Let a step's weights read the demonstrations too, where the sweep asks for it."""
        if self.block.measured.supervised_icl:
            self.supervised[step] = Supervised(self.lm, self.block, self.encoded, self.num_lanes)

    def capture(self, layer: Any, index: int, probe: Probe, query_pass: QueryPass) -> None:
        """Move the queries of a probed step up through layer `index`."""
        query_pass.climb(layer, index, probe.deltas, trained_NTW=self.items(index, probe))
        if probe.step in self.supervised:
            self.supervised[probe.step].climb(layer, index, probe.deltas)

    def supervised_at(self, step: int) -> list[Tensor]:
        """Return the label scores (Q, C) of each lane with the demonstrations in the prompt; nothing where they are not asked for."""
        return self.supervised.pop(step).label_scores() if step in self.supervised else []


class _Shares:
    """How a block's FLOPs divide over its stages, for progress only."""

    def __init__(self, block: Block) -> None:
        self.baseline = block.cost.baseline_flops
        weights = [len(block.learning_rates(*trained)) * self._weight(block.method(trained[0]).is_bottom_up) for trained in block.trained()]
        self.unit = (block.cost.flops - self.baseline) / (sum(weights) or 1.0)

    @staticmethod
    def _weight(is_bottom_up: bool) -> float:
        return 2.0 if is_bottom_up else 1.0

    def of(self, ride: _Ride) -> float:
        return self.unit * ride.num_lanes * self._weight(ride.is_bottom_up)
