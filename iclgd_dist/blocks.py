"""Blocks: what one Tune trial computes, as plain data that travels to actors. Knows cells, draws and costs; knows nothing of sweeps or stores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from iclgd_dist.axes import Controls, Measures
from iclgd_dist.config import ModelSpec, Resources
from iclgd_dist.cost import Cost, Pass, cost_of
from iclgd_dist.encoding import Encoded
from iclgd_dist.extensions import MethodSpec, MetricSpec
from iclgd_dist.families import size
from iclgd_dist.protocol import Protocol
from iclgd_dist.sources import ModelIdentity
from iclgd_dist.tasks import Draw

LAST = -1  # stands for the last step of each method


@dataclass(frozen=True)
class Cell:
    """One grid point of a block."""

    key: str
    kind: str  # zero_shot, icl or finetuned
    method: str | None = None
    learning_rate: float | None = None
    step: int | None = None
    train_on: str = "true"  # what finetuning saw
    is_kept: bool = False  # whether its capture stays beside the store
    is_last: bool = False  # whether its step is the last that the sweep has of its method

    @property
    def point(self) -> tuple[str, int, float | None]:
        """(train_on, step, learning rate), in which cells of two methods must agree to be compared; at their methods' last steps what they trained on suffices."""
        assert self.step is not None
        return (self.train_on, LAST, None) if self.is_last else (self.train_on, self.step, self.learning_rate)


@dataclass(frozen=True)
class RandomTarget:
    """A trained cell that random weights of the same effect are made for."""

    key: str
    update_ratio: float  # R
    norms: Mapping[str, tuple[float | None, ...]]  # part (q, k, v, o, mlp) -> norm of what training added, per layer


WORST = 1e9  # what a diverged step is judged as: finite, as schedulers interpolate


@dataclass(frozen=True)
class Judged:
    """What a scheduler stops a block by: a figure of fold A, reported after each committed step; times `sign` it is made small."""

    metric: str
    sign: float
    reduction_factor: int
    steps: tuple[int, ...]  # of the whole block, whichever are there
    known: tuple[tuple[float, int, float], ...] = ()  # learning rate, step and figure of what is there already, for it to be compared with


@dataclass(frozen=True)
class Block:
    """One model, task, k, seed and order with the cells that are still missing. A Tune trial is a block. Plain data; travels to actors."""

    name: str
    model: ModelIdentity
    spec: ModelSpec
    storage_dtype: str
    protocol: Protocol
    controls: Controls
    measured: Measures
    resources: Resources
    methods: tuple[MethodSpec, ...]
    metrics: tuple[MetricSpec, ...]
    draw: Draw
    num_demonstrations: int
    seed: int
    order: int
    query_seed: int
    sweep: str
    cells: tuple[Cell, ...]
    cost: Cost
    is_measuring: bool = False  # its cells are there; what is missing are measures of them
    random_targets: tuple[RandomTarget, ...] = ()  # instead of training: random weights of the same effect
    origin: str = "grid"  # or "search": who asked for it
    is_tracked: bool = False  # whether the figures of each committed step are reported
    judged: Judged | None = None  # by a scheduler, which may stop it
    keeps_texts: bool = True  # whether zero-shot and in-context cells hold what was read

    def trained(self) -> list[tuple[str, str]]:
        """Return (method, train_on) of the missing cells: each is a pass of its own over the same baselines."""
        return list(dict.fromkeys((cell.method, cell.train_on) for cell in self.cells if cell.method is not None))

    def method(self, name: str) -> MethodSpec:
        return next(method for method in self.methods if method.name == name)

    def learning_rates(self, method: str, train_on: str = "true") -> list[float]:
        """Return the learning rates of a method's missing cells, ascending: the lanes of one pass."""
        return sorted({cell.learning_rate for cell in self._trained(method, train_on) if cell.learning_rate is not None})

    def steps(self, method: str, train_on: str = "true") -> list[int]:
        return sorted({cell.step for cell in self._trained(method, train_on) if cell.step is not None})

    def num_trained(self, method: str, step: int) -> int:
        """Return how many different demonstrations a method has seen at a step."""
        return self.method(method).num_trained(step, self.num_demonstrations)

    def seen(self) -> list[tuple[str, int]]:
        """Return (train_on, number of demonstrations) of all probes: each is compared with the context of exactly those."""
        probes = ((train_on, self.num_trained(name, step)) for name, train_on in self.trained() for step in self.steps(name, train_on))
        return list(dict.fromkeys(probes))

    def _trained(self, method: str, train_on: str) -> Iterator[Cell]:
        return (cell for cell in self.cells if (cell.method, cell.train_on) == (method, train_on))

    def identity(self, cell: Cell) -> dict[str, Any]:
        """Return the IDENTITY columns of one of its cells."""
        drawn, spec = cell.kind != "zero_shot", self.spec
        is_untrained = spec.init != "trained"
        options = {} if cell.method is None else self.method(cell.method).described()
        return {
            "key": cell.key,
            "kind": cell.kind,
            "model": self.model.name,
            "model_source": self.model.source,
            "model_hash": self.model.content_hash,
            "model_notes": [*self.model.notes, *([f"random weights ({spec.init}, {spec.init_scheme}, seed {spec.init_seed})"] if is_untrained else [])],
            "family": self.model.model_type,
            "storage_dtype": self.storage_dtype,
            "compute_dtype": spec.compute_dtype,
            "tf32": spec.tf32,
            "deterministic": spec.deterministic,
            "init": spec.init,
            "init_scheme": spec.init_scheme if is_untrained else None,
            "init_seed": spec.init_seed,
            "task": self.draw.task,
            "num_demonstrations": self.num_demonstrations if drawn else None,
            "seed": self.seed if drawn else None,
            "order": self.order if drawn else None,
            "num_queries": len(self.draw.queries),
            "query_seed": self.query_seed,
            "train_on": cell.train_on if cell.kind == "finetuned" else None,
            "method": cell.method,
            "method_options": json.dumps(options, sort_keys=True) if options else None,
            "learning_rate": cell.learning_rate,
            "step": cell.step,
            "origin": self.origin,
            "sweep": self.sweep,
        }


def with_cells(block: Block, cells: tuple[Cell, ...], encoded: Encoded) -> Block:
    """Return the block with other cells, named and costed anew."""
    named = hashlib.sha256("\n".join(sorted(cell.key for cell in cells)).encode()).hexdigest()[:8]
    name = f"{block.draw.task}-k{block.num_demonstrations}-s{block.seed}-o{block.order}-{named}"
    block = replace(block, cells=cells, name=name)
    passes = []
    for name, train_on in block.trained():
        method = block.method(name)
        rates, steps = block.learning_rates(name, train_on), block.steps(name, train_on)
        passes.append(Pass(train_on, method.is_bottom_up, method.weights, len(rates), steps, method.batch_size))
    how: dict[str, Any] = {"compute_dtype": block.spec.compute_dtype, "storage_dtype": block.storage_dtype}
    how |= {"is_on_disk": block.resources.device_map == "disk", "is_supervised": block.measured.supervised_icl, "has_outputs": block.measured.outputs}
    return replace(block, cost=cost_of(encoded, config=block.model.config, passes=passes, **how))


def split(blocks: Sequence[Block], num_actors: int) -> tuple[Block, ...]:
    """Split the lanes of the largest blocks until there is one for each actor; a learning rate of both methods stays together.

    Each part repeats its block's baselines: that is what splitting costs. Blocks that measure stay whole, but for random weights: a pair of two learning
    rates that a split tore apart is made where both are.
    """
    parts = list(blocks)
    while 0 < len(parts) < num_actors:
        wide = [number for number, part in enumerate(parts) if len(halve(part)) == 2 and (part.random_targets or not part.is_measuring)]
        if not wide:
            break
        largest = max(wide, key=lambda number: (parts[number].cost.flops, -number))
        parts[largest : largest + 1] = halve(parts[largest])
    return tuple(parts)


def halve(block: Block) -> tuple[Block, ...]:
    """Return two blocks with half of the learning rates each, counted once for each thing trained on, or the block itself where there is only one."""
    if len(targets := block.random_targets) > 1:
        middle = len(targets) // 2
        keys = [{target.key for target in some} for some in (targets[:middle], targets[middle:])]
        return tuple(_part(block, number, [cell for cell in block.cells if cell.key in some]) for number, some in enumerate(keys, 1))
    rates = sorted({_lane(cell) for cell in block.cells if cell.kind == "finetuned"})
    if len(rates) < 2:
        return (block,)
    middle_rate = rates[len(rates) // 2]
    lower = [cell for cell in block.cells if cell.kind != "finetuned" or _lane(cell) < middle_rate]
    upper = [cell for cell in block.cells if cell.kind == "finetuned" and _lane(cell) >= middle_rate]
    return _part(block, 1, lower), _part(block, 2, upper)


def single_lanes(block: Block) -> tuple[Block, ...]:
    """Return a block for each learning rate of each method, the baselines with the first; each repeats its block's baselines.

    Its name is that of its last cell: the same block has the same name however much of it is there.
    """
    lanes: dict[tuple[str | None, str, float | None], list[Cell]] = {}
    for cell in block.cells:
        if cell.kind == "finetuned":
            lanes.setdefault((cell.method, cell.train_on, cell.learning_rate), []).append(cell)
    baselines = [cell for cell in block.cells if cell.kind != "finetuned"]
    if not lanes:
        return (block,)
    parts = []
    for number, cells in enumerate(lanes.values(), 1):
        part = _part(block, number, [*(baselines if number == 1 else []), *cells])
        parts.append(replace(part, name=f"{block.name.rpartition('-')[0]}-{max(cells, key=lambda cell: cell.step or 0).key[:8]}"))
    return tuple(parts)


def _part(block: Block, number: int, cells: Sequence[Cell]) -> Block:
    trained = sum(cell.kind == "finetuned" for cell in cells) / max(1, sum(cell.kind == "finetuned" for cell in block.cells))
    whole, base = block.cost, block.cost.baseline_flops
    flops = base + (whole.flops - base) * trained
    share = flops / whole.flops if whole.flops else 1.0
    cost = replace(whole, flops=flops, training_tokens=round(whole.training_tokens * trained), capture_tokens=round(whole.capture_tokens * share))
    targets = tuple(target for target in block.random_targets if target.key in {cell.key for cell in cells})
    return replace(block, cells=tuple(cells), name=f"{block.name}.{number}", cost=cost, random_targets=targets)


def _lane(cell: Cell) -> tuple[str, float]:
    return cell.train_on, cell.learning_rate or 0.0


def max_positions(config: dict[str, Any]) -> int | None:
    """Return how many positions a model takes; None where its configuration sets no limit (ALiBi). Errors: SweepError for what is no number of them."""
    return size(config, "max_position_embeddings", "n_positions", "max_seq_len", most=2**53) or None
