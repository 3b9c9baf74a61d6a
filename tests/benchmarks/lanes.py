"""What learning rates cost when they train as lanes of one pass: seconds per learning rate at 1, 2, 4, 8 and 16 lanes, for both methods."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch

from iclgd_dist.model import LanguageModel
from iclgd_dist.updates import Probe, TrainingSequence
from tests.benchmarks import grid
from tests.benchmarks.grid import RATES, Work, say
from tests.tiny import METHODS

GOALS = {"layer_causal": 1.8, "vanilla": 2.0}  # times, 8 lanes against one
NUM_DEMONSTRATIONS = 4
TOLERANCE = 1e-3  # of a delta, in units of its norm: float32, other orders of summation


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Time training at each number of lanes, check that a lane learns the same among any, and return the figures."""
    made = grid.parser(__doc__, k=NUM_DEMONSTRATIONS, queries=2, rates=1)
    made.add_argument("--lanes", type=lambda text: [int(number) for number in text.split(",")], default=[1, 2, 4, 8, 16])
    made.add_argument("--rounds", type=int, default=3)
    options = made.parse_args(arguments)
    with grid.work(options) as work:
        return measure(grid.loaded(work.block), work, lanes=options.lanes, rounds=options.rounds)


def measure(lm: LanguageModel, work: Work, *, lanes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Return the seconds of training per learning rate at each number of lanes, all of them in each round, and how many times faster 8 are than one."""
    seconds: dict[str, dict[int, list[float]]] = {method: {number: [] for number in lanes} for method in GOALS}
    for round_number in range(rounds):
        for method in GOALS:
            alone: Probe | None = None
            for number in lanes:
                before = time.perf_counter()
                probe = _train(lm, work, method, number)
                seconds[method][number].append((time.perf_counter() - before) / number)
                alone = alone or probe
                _check(alone, probe, f"{method} at {number} lanes")
                say(f"lanes, round {round_number + 1}: {method}, {number} lanes: {seconds[method][number][-1]:.2f} s per learning rate")
    medians = {method: {number: median(times) for number, times in by_number.items()} for method, by_number in seconds.items()}
    faster = {method: times[1] / times[8] for method, times in medians.items() if {1, 8} <= times.keys()}
    value = min((faster[method] / goal for method, goal in GOALS.items() if method in faster), default=None)
    return {
        "value": value,  # the smaller of the two, in units of its goal
        "goal": 1.0,
        "holds": value is not None and value >= 1.0,
        "times_faster_at_8": faster,
        "goals_at_8": GOALS,
        "seconds_per_learning_rate": medians,
    }


def _train(lm: LanguageModel, work: Work, method: str, num_lanes: int) -> Probe:
    """Train on the first demonstrations at so many learning rates, the first always the same."""
    training = work.encoded.training
    pairs = zip(training.sequences[:NUM_DEMONSTRATIONS], training.first_loss, strict=False)
    sequences = [TrainingSequence(torch.tensor(ids), first) for ids, first in pairs]
    rates = np.geomspace(RATES[method][2], RATES[method][-1], num_lanes).tolist()
    (probe,) = METHODS[method].train(lm, sequences, rates, steps=[len(sequences)])
    return probe


def _check(alone: Probe, among: Probe, named: str) -> None:
    for name, delta in alone.deltas.items():
        for expected, got in zip(delta.tensors(), among.deltas[name].tensors(), strict=True):
            error = float((got[0] - expected[0]).norm() / expected[0].norm())
            assert error <= TOLERANCE, f"{named}: {name} of the first lane differs by {error:.1e} of its norm, {TOLERANCE:.0e} is allowed"
