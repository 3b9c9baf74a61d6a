"""How much of a block runs at once: as many lanes as memory holds, fewer after it ran out.

Knows blocks, costs and memory. Knows nothing of training, captures or rows.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from iclgd_dist.blocks import Block, halve, with_cells
from iclgd_dist.encoding import Encoded
from iclgd_dist.model import LanguageModel

GROUP = Path("/sys/fs/cgroup")  # of this container
SHARE = 0.9  # of the memory at hand that a block is planned for


class Parts:
    """The trained cells of a block that are still to come, in parts that run one after the other over the same baselines."""

    def __init__(self, block: Block, encoded: Encoded, budget_gib: float) -> None:
        trained = replace(block, cells=tuple(cell for cell in block.cells if cell.kind == "finetuned"))
        self.waiting = deque(_fitting(trained, encoded, budget_gib) if trained.cells and not block.random_targets else ())
        self.baselines_alone = False
        self.too_large: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def next(self) -> Block | None:
        """Return the part to run now; None: baselines only."""
        alone, self.baselines_alone = self.baselines_alone, False
        return None if alone or not self.waiting else self.waiting.popleft()

    def out_of_memory(self, part: Block, done: Collection[str], reason: str, *, has_baselines: bool) -> None:
        """Put back what a part has not finished: whole where it shared memory with the baselines, else in halves. A lane alone is given up."""
        rest = replace(part, cells=tuple(cell for cell in part.cells if cell.key not in done))
        if not has_baselines:
            self.baselines_alone = True
            self.waiting.appendleft(rest)
            return
        halves = halve(rest)
        if len(halves) == 1:
            lane = rest.cells[0]
            methods = ", ".join(dict.fromkeys(str(cell.method) for cell in rest.cells))
            self.too_large.append(f"{methods} at learning rate {lane.learning_rate:g} on {lane.train_on} ({reason})")
        else:
            self.waiting.extendleft(reversed(halves))

    def check(self) -> None:
        """Errors: MemoryError when a lane did not fit even alone."""
        if self.too_large:
            raise MemoryError(f"out of memory with one lane alone: {'; '.join(self.too_large)}")


def _fitting(block: Block, encoded: Encoded, budget_gib: float) -> list[Block]:
    """Return the block, or its halves, or theirs, until each is within `[resources] lanes`, or within the memory."""
    limit = block.resources.lanes
    is_small = with_cells(block, block.cells, encoded).cost.peak_gib <= budget_gib if limit == "auto" else _width(block) <= limit
    halves = (block,) if is_small else halve(block)
    return [block] if len(halves) == 1 else [part for half in halves for part in _fitting(half, encoded, budget_gib)]


def _width(block: Block) -> int:
    """Return the most learning rates that one method trains at once."""
    return max(len(block.learning_rates(*trained)) for trained in block.trained())


def budget_gib(device: torch.device, num_neighbours: int = 1) -> float:
    """Return the memory that this process may plan to hold on a device, what it holds already included [GiB].

    `num_neighbours`: processes like this one that share the machine, this one included.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return SHARE * (free + torch.cuda.memory_reserved(device)) / 2**30
    held = psutil.Process().memory_info().rss
    at_hand = psutil.virtual_memory().available
    if (limit := _limit_of_group()) is not None:
        at_hand = min(at_hand, max(0, limit - num_neighbours * held))  # the others hold as much
    return SHARE * (held + at_hand / num_neighbours) / 2**30


def _limit_of_group() -> int | None:
    """Return the memory limit of this container in bytes, which psutil does not see; None where there is none."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2, cgroup 1
        path = GROUP / name
        if path.is_file() and (text := path.read_text().strip()).isdigit() and int(text) < psutil.virtual_memory().total:
            return int(text)
    return None


def num_neighbours(block: Block) -> int:
    """Return how many actors of this sweep a machine like this one holds."""
    resources = block.resources
    here = max(1, _num_cpus() // resources.cpus_per_actor)
    return min(here, resources.max_actors) if resources.max_actors else here


def _num_cpus() -> int:
    """Return how many CPUs this process may use: those it is bound to, or as many as its container's quota pays for."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):  # cgroup 2, cgroup 1
        if all((GROUP / name).is_file() for name in names):
            quota, period = " ".join((GROUP / name).read_text() for name in names).split()[:2]
            if quota.isdigit():  # else "max", or -1
                here = min(here, max(1, int(quota) // int(period)))
    return here


def elsewhere_gib(lm: LanguageModel) -> float:
    """Return what a model's layers take that rest on other devices than the one that is planned for, but for the largest that comes in for a while [GiB]."""
    away = [[weight for weight in layer.parameters() if weight.device != lm.input_device] for layer in lm.layers]
    sizes = [sum(weight.numel() * weight.element_size() for weight in weights) for weights in away]
    comes_in = max((size for size, weights in zip(sizes, away, strict=True) if any(weight.is_meta for weight in weights)), default=0)
    return (sum(sizes) - comes_in) / 2**30
