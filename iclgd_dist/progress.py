"""How far a run is, and showing it: a bar on a terminal, plain lines in a log. Knows the counts that actors report; knows no Ray."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from iclgd_dist.background import background

LOG_SECONDS = 15.0
LATER = ("elsewhere", "again")  # outcomes of a block that belongs into the next round


@dataclass
class Counts:
    """What the driver knows while a sweep runs."""

    num_cells: int = 0  # to be computed by this run
    flops: dict[str, float] = field(default_factory=dict)  # cost per block
    tokens: dict[str, int] = field(default_factory=dict)  # per block, trained and captured, times learning rates and steps
    waits_for: str = ""  # in words, where nothing can run
    fractions: dict[str, float] = field(default_factory=dict)  # per block
    cells: dict[tuple[str, str], int] = field(default_factory=dict)  # per block and actor
    running: dict[str, dict[str, Any]] = field(default_factory=dict)  # the last report of the blocks that run now
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)  # block -> outcome, reason
    deaths: dict[str, int] = field(default_factory=dict)  # of actors over a block, preempted ones left out
    rounds: dict[str, int] = field(default_factory=dict)  # that a block went into because its actor was gone before it could end
    num_compacted: int = 0
    gflops: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def fraction(self) -> float:
        total = sum(self.flops.values())
        return sum(self.flops[name] * part for name, part in list(self.fractions.items())) / total if total else 1.0

    @property
    def num_committed(self) -> int:
        return sum(list(self.cells.values()))

    def remaining(self) -> str:
        """Return the time left in words, from the speed so far."""
        if self.fraction < 0.01:
            return "estimating time left"
        return f"{in_words((time.monotonic() - self.started) * (1 - self.fraction) / self.fraction)} left"

    def speed(self) -> str:
        """Return the tokens per second so far, of all actors; nothing before there are any."""
        done = sum(self.tokens.get(name, 0) * part for name, part in list(self.fractions.items()))
        return f"{done / max(time.monotonic() - self.started, 1e-9):,.0f} tokens/s, " if done else ""

    def take(self, report: dict[str, Any]) -> None:
        name = report["block"]
        self.fractions[name], self.gflops = report["fraction"], report["gflops"]
        self.cells[name, report["actor"]] = max(report["num_cells"], self.cells.get((name, report["actor"]), 0))
        self.running[name] = report
        if report["outcome"]:
            self.end(name, report["outcome"], report["reason"])

    def end(self, name: str, outcome: str, reason: str) -> None:
        self.running.pop(name, None)
        self.fractions[name] = 0.0 if outcome in LATER else 1.0
        if outcome not in ("done", *LATER):
            self.tokens.pop(name, None)  # nobody knows how many of them were computed
        self.outcomes[name] = (outcome, reason)

    def again(self, name: str, reason: str, *, most: int) -> None:
        """Let a block go into another round, unless it has been in so many."""
        self.rounds[name] = self.rounds.get(name, 0) + 1
        self.end(name, *(("again", reason) if self.rounds[name] <= most else ("failed", f"given up after {most} rounds: {reason}")))

    def line(self) -> str:
        running = list(self.running.values())
        more = f" (+{len(running) - 1} more)" if len(running) > 1 else ""
        now = running[0]["stage"] if running else f"waiting for {self.waits_for}" if self.waits_for else "starting actors"
        return f"{self.num_committed}/{self.num_cells} cells, {self.speed()}{self.remaining()}; {now}{more}"


def in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def shown(counts: Counts, console: Console) -> Iterator[None]:
    """Show progress while the block runs: a bar on a terminal, a plain line every 15 s elsewhere."""

    def log(ended: threading.Event) -> None:
        while not ended.wait(LOG_SECONDS):
            console.print(
                f"{counts.fraction:4.0%} after {in_words(time.monotonic() - counts.started)}: {counts.line()}", highlight=False, markup=False, soft_wrap=True
            )

    def draw(ended: threading.Event) -> None:
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            while not ended.wait(0.5):
                bar.update(task, completed=counts.fraction, description=counts.line())

    with background(draw if console.is_terminal else log):
        yield
