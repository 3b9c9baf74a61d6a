"""One block on one page: baselines, training, captures, comparison, commits. Knows no Ray: it runs under a debugger.

All that needs nothing from above rides up through the layers together, so that a layer's weights are brought in once: zero-shot, the noise check,
the context and the in-context queries, and every bottom-up method with the captures of all its steps. The other methods follow, one by one.
"""

# Shapes: N lanes  L layers  S steps

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import resource
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iclgd_dist.deltas import norms
from iclgd_dist.layerwise import Prefix
from iclgd_dist.metrics import Capture, noise_floor
from iclgd_dist.model import LanguageModel
from iclgd_dist.plan import Block, Cell, max_positions
from iclgd_dist.probes import QueryPass
from iclgd_dist.rows import Baseline, Row, TrainingRecord, diverged_row, finetuned_row, icl_row, make_baseline, zero_shot_row
from iclgd_dist.schema import NUM_NOISE_QUERIES
from iclgd_dist.store import Store
from iclgd_dist.tasks import Encoded, encode
from iclgd_dist.updates import METHODS, BottomUp, LaneInputs, Probe, TrainingSequence, first_bad_step


@dataclass
class Progress:
    """How far a block is; the same object is updated and yielded again."""

    total_flops: float
    done_flops: float = 0.0
    stage: str = "starting"
    num_cells: int = 0  # committed by this run of the block
    num_baselines: int = 0
    num_training_steps: int = 0  # updates, summed over methods and lanes

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

    A cell that is there already is kept; a lane that diverges becomes rows with status `diverged` and leaves the others unchanged.
    """
    progress, share = Progress(block.cost.flops), _Shares(block)
    encoded = encode(block.draw, lm.tokenizer, protocol=block.protocol, max_positions=max_positions(block.model.config))
    sink = "".join(lm.tokenizer.convert_ids_to_tokens(list(encoded.sink_ids)))
    commit = _Committer(lm, block, store, progress, protocol=json.dumps(block.protocol.model_dump() | {"sink_token": sink}, sort_keys=True))
    sequences = [TrainingSequence(torch.tensor(ids), len(encoded.prefix_ids)) for ids in encoded.training_sequences]
    trained = [name for name in METHODS if block.learning_rates(name)]
    riding = [_Ride(lm, block, encoded, sequences, METHODS[name]) for name in trained if isinstance(METHODS[name], BottomUp)]  # type: ignore[arg-type]
    baselines = _Baselines(lm, block, encoded)
    yield progress.at("prompts read")
    for index in range(lm.num_layers):
        with lm.resident(index) as layer:
            baselines.climb(layer, index)
            yield progress.at(f"layer {index + 1}/{lm.num_layers}", share.baseline / lm.num_layers)
            for ride in riding:
                pieces = len(ride.passes) * lm.num_layers
                for step in ride.climb(layer, index):
                    yield progress.at(f"{ride.method.name}, layer {index + 1}/{lm.num_layers}, step {step}", share.of(ride.method.name) / pieces)
    baseline = baselines.compare()
    progress.num_baselines += 2
    commit.baseline(baseline)
    for ride in riding:
        progress.num_training_steps += ride.num_steps
        for step, query_pass in ride.passes.items():
            commit.finetuned(baseline, ride.trajectory, step, query_pass.captures())
            yield progress.at(f"{ride.method.name}, step {step} committed")
    for name in trained:
        if isinstance(METHODS[name], BottomUp):
            continue
        trajectory = _Trajectory(name, block.learning_rates(name), steps=block.steps(name))
        probes = METHODS[name].train(lm, sequences, trajectory.learning_rates, steps=trajectory.steps, seed=block.seed)
        for probe in probes:
            trajectory.add_model(lm, probe)
            progress.num_training_steps += trajectory.steps_since_last(probe.step) * len(trajectory.learning_rates)
            yield progress.at(f"{name}, step {probe.step} trained", share.of(name) / (2 * len(trajectory.steps)))
            query_pass = _queries(lm, block, encoded, num_lanes=len(trajectory.learning_rates))
            for index in range(lm.num_layers):
                with lm.resident(index) as layer:
                    query_pass.climb(layer, index, probe.deltas)
                yield progress.at(f"{name}, step {probe.step}, layer {index + 1}/{lm.num_layers}", share.of(name) / (2 * len(trajectory.steps) * lm.num_layers))
            commit.finetuned(baseline, trajectory, probe.step, query_pass.captures())
            yield progress.at(f"{name}, step {probe.step} committed")


def _queries(lm: LanguageModel, block: Block, encoded: Encoded, **options: Any) -> QueryPass:
    defaults: dict[str, Any] = {"lead": encoded.prefix_ids, "tokens_per_batch": block.resources.tokens_per_batch}
    return QueryPass(lm, encoded.queries, encoded.label_ids, **defaults | options)


class _Baselines:
    """Zero-shot, zero-shot again one query at a time (the noise floor), the context, and the queries in context."""

    def __init__(self, lm: LanguageModel, block: Block, encoded: Encoded) -> None:
        self.block, self.has_relative_positions = block, lm.family.position == "rotary"
        precision = torch.finfo(lm.compute_dtype)
        self.eps = precision.eps if precision.bits < 32 else 0.0  # in float32 and float64 two packings differ by more than a rounding
        self.prefix = Prefix(lm, torch.tensor(encoded.context_ids))
        self.zero_shot = _queries(lm, block, encoded)
        self.in_context = _queries(lm, block, encoded, prefix=self.prefix)
        self.again = _queries(lm, block, encoded, tokens_per_batch=1, numbers=range(min(NUM_NOISE_QUERIES, len(encoded.queries))))

    @torch.no_grad()
    def climb(self, layer: Any, index: int) -> None:
        self.prefix.replay.climb(layer, index)
        for query_pass in (self.zero_shot, self.again, self.in_context):
            query_pass.climb(layer, index)
        self.prefix.forget(index)

    def compare(self) -> Baseline:
        (zero_shot,), (again,), (in_context,) = self.zero_shot.captures(), self.again.captures(), self.in_context.captures()
        for name, capture in (("zero-shot", zero_shot), ("in-context", in_context)):
            if not capture.is_finite():
                raise ArithmeticError(f"{self.block.name}: the {name} states of {self.block.model.name} are not finite in {self.block.spec.compute_dtype}")
        queries = self.block.draw.queries
        return make_baseline(
            zero_shot=zero_shot,
            in_context=in_context,
            noise=noise_floor(zero_shot, again, eps=self.eps),
            gold_Q=[query.label for query in queries],
            folds_Q=[query.fold for query in queries],
            query_ids=[query.id for query in queries],
            label_words=self.block.draw.label_words,
            num_queries_left_out=self.block.draw.num_queries_left_out,
            is_first_layer_still=self.has_relative_positions,
        )


@dataclass
class _Trajectory:
    """What is known of a method's training in this block: losses, gradients, sizes of deltas, and which lanes diverged when."""

    method: str
    learning_rates: list[float]
    steps: list[int]
    loss_SN: Tensor | None = None  # summed over layers where layers have losses of their own
    loss_LSN: list[Tensor] = field(default_factory=list)
    norm_SNL: Tensor | None = None
    norm_LSN: list[Tensor] = field(default_factory=list)
    delta_norms: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # step -> per layer: norms of K and V, per lane
    bad_capture: dict[int, int] = field(default_factory=dict)  # lane -> first probed step whose capture was not finite

    def add_model(self, lm: LanguageModel, probe: Probe) -> None:
        """Take in a probe of the whole model: it holds everything up to its step."""
        self.loss_SN, self.norm_SNL = probe.loss_SN.cpu(), probe.gradient_norm_SNL.cpu()
        self.delta_norms[probe.step] = [norms(lm, index, probe.deltas) for index in range(lm.num_layers)]

    def add_layer(self, lm: LanguageModel, index: int, probe: Probe) -> None:
        """Take in a probe of one layer; the last one of a layer holds all its steps."""
        self.delta_norms.setdefault(probe.step, []).append(norms(lm, index, probe.deltas))
        if probe.step == self.steps[-1]:
            self.loss_LSN.append(probe.loss_SN.cpu())
            self.norm_LSN.append(probe.gradient_norm_SNL[:, :, 0].cpu())
            self.loss_SN, self.norm_SNL = torch.stack(self.loss_LSN).sum(0), torch.stack(self.norm_LSN, dim=2)

    def steps_since_last(self, step: int) -> int:
        return step - max((earlier for earlier in self.steps if earlier < step), default=0)

    def diverged_step(self, lane: int) -> int | None:
        """Return the first step whose loss, gradient or capture was not finite."""
        assert self.loss_SN is not None and self.norm_SNL is not None
        steps = [first_bad_step(self.loss_SN, self.norm_SNL)[lane], self.bad_capture.get(lane)]
        return min((step for step in steps if step is not None), default=None)

    def last_finite_loss(self, lane: int, step: int) -> float | None:
        assert self.loss_SN is not None
        losses = [float(loss) for loss in self.loss_SN[:step, lane] if loss.isfinite()]
        return losses[-1] if losses else None

    def record(self, lane: int, step: int) -> TrainingRecord:
        assert self.loss_SN is not None and self.norm_SNL is not None
        per_layer = [float(loss_SN[step - 1, lane]) for loss_SN in self.loss_LSN] or None
        keys, values = zip(*((float(k[lane]), float(v[lane])) for k, v in self.delta_norms[step]), strict=True)
        return TrainingRecord(float(self.loss_SN[step - 1, lane]), per_layer, self.norm_SNL[step - 1, lane], keys, values)


class _Ride:
    """A bottom-up method and the captures of all its probed steps, on their way up together."""

    def __init__(self, lm: LanguageModel, block: Block, encoded: Encoded, sequences: Sequence[TrainingSequence], method: BottomUp) -> None:
        self.lm, self.method = lm, method
        self.trajectory = _Trajectory(method.name, block.learning_rates(method.name), block.steps(method.name))
        num_lanes = len(self.trajectory.learning_rates)
        self.inputs = LaneInputs(lm, sequences[: self.trajectory.steps[-1]], num_lanes)
        self.passes = {step: _queries(lm, block, encoded, num_lanes=num_lanes) for step in self.trajectory.steps}
        self.num_steps = self.trajectory.steps[-1] * num_lanes

    def climb(self, layer: Any, index: int) -> Iterator[int]:
        """Train layer `index` and move the queries of every probed step through it, yielding each step when it is done."""
        for probe in self.method.train_layer(self.lm, index, layer, self.inputs, self.trajectory.learning_rates, steps=self.trajectory.steps):
            self.trajectory.add_layer(self.lm, index, probe)
            self.passes[probe.step].climb(layer, index, probe.deltas)
            yield probe.step


class _Committer:
    """Rows into the store, with what is the same for all cells of the block."""

    def __init__(self, lm: LanguageModel, block: Block, store: Store, progress: Progress, *, protocol: str) -> None:
        self.block, self.store, self.progress = block, store, progress
        self.shared = provenance(lm) | {"model_revision": block.model.revision, "protocol": protocol}
        self.cells = {(cell.method, cell.learning_rate, cell.step, cell.kind): cell for cell in block.cells}
        self.since = time.perf_counter()

    def baseline(self, baseline: Baseline) -> None:
        rows = {"zero_shot": zero_shot_row, "icl": icl_row}
        self._commit([(cell, rows[cell.kind](baseline)) for cell in self.block.cells if cell.kind in rows], num_lanes=1)

    def finetuned(self, baseline: Baseline, trajectory: _Trajectory, step: int, captures: Sequence[Capture]) -> None:
        found = []
        for lane, (rate, capture) in enumerate(zip(trajectory.learning_rates, captures, strict=True)):
            if not capture.is_finite():
                trajectory.bad_capture.setdefault(lane, step)
            cell = self.cells.get((trajectory.method, rate, step, "finetuned"))
            if cell is None:
                continue
            diverged = trajectory.diverged_step(lane)
            if diverged is not None and diverged <= step:
                row = diverged_row(
                    num_queries=len(self.block.draw.queries),
                    label_words=self.block.draw.label_words,
                    step=diverged,
                    last_finite_loss=trajectory.last_finite_loss(lane, diverged),
                    num_queries_left_out=self.block.draw.num_queries_left_out,
                )
            else:
                with _one_thread():
                    row = finetuned_row(baseline, capture, training=trajectory.record(lane, step), random_seed=int(cell.key[:15], 16))
            found.append((cell, row))
        self._commit(found, num_lanes=len(trajectory.learning_rates))

    def _commit(self, rows: Sequence[tuple[Cell, Row]], *, num_lanes: int) -> None:
        seconds = time.perf_counter() - self.since
        for cell, row in rows:
            made = {"lanes": num_lanes, "wall_seconds": seconds / len(rows), "peak_gib": peak_gib(), "created_at": datetime.datetime.now(datetime.UTC)}
            self.progress.num_cells += self.store.commit(self.block.identity(cell) | row | self.shared | made)
        if rows:
            self.since = time.perf_counter()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compare captures on one thread: thousands of small products, each of which would wait for the slowest thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Shares:
    """How a block's FLOPs divide over its stages, for progress only."""

    def __init__(self, block: Block) -> None:
        self.baseline = block.cost.baseline_flops
        weights = {name: len(block.learning_rates(name)) * (2.0 if isinstance(METHODS[name], BottomUp) else 1.0) for name in METHODS}
        total = sum(weights.values()) or 1.0
        self.trained = {name: (block.cost.flops - self.baseline) * weight / total for name, weight in weights.items()}

    def of(self, method: str) -> float:
        return self.trained[method]


def provenance(lm: LanguageModel) -> dict[str, Any]:
    """Return what made a row: library versions, code, device. None of it is part of a key."""
    device = lm.input_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "versions": _versions(),
        "git_commit": git_commit(),
        "device": f"{device.type} ({name}), {torch.get_num_threads()} threads",
        "tf32": bool(torch.backends.cuda.matmul.allow_tf32),
        "host": platform.node(),
    }


@cache
def _versions() -> str:
    names = ("iclgd-dist", "torch", "transformers", "accelerate", "ray", "pyarrow")
    return json.dumps({name: version(name) for name in names} | {"python": platform.python_version()}, sort_keys=True)


@cache
def git_commit() -> str | None:
    """Return the commit of this project's code, with `+` when files were changed since; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        said = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty=+"], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout.strip() or None


def peak_gib() -> float:
    """Return the largest memory this process has held: of the GPU where there is one, else resident [GiB]."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
