"""The papers' procedure against one block of ours: how many times faster, beside how many times fewer FLOPs.

A sample of the cells runs as the papers ran each of them (papers.py), the rest is extrapolated: what all cells repeat is the mean of the sample's, training
is linear between the sampled steps. Ours is the whole block in one fresh process: planning, loading and commits included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from iclgd_dist.store import Store
from tests.benchmarks import flops, grid
from tests.benchmarks.agreement import Stored
from tests.benchmarks.grid import Work, say

GOAL, SHARE = 20.0, 0.9  # times, on the default grid; of the ratio of FLOPs, on any
ROOT = Path(__file__).parents[2]
EVALUATED = ("zero_shot", "in_context", "finetuned")
Point = tuple[str, float, int]  # method, learning rate, step


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Time both procedures, check that their results agree, and return the figures."""
    made = grid.parser(__doc__)
    made.add_argument("--sample", type=int, default=2, help="cells of each method that the papers' procedure runs, spread over the steps")
    made.add_argument("--queries-sample", type=int, help="queries that it evaluates in each of them, spread over their lengths; by default all")
    options = made.parse_args(arguments)
    is_full = (options.k, options.queries, options.rates, options.steps, options.tiny) == (32, 200, 8, None, False)
    with grid.work(options) as work:
        store = grid.new_store(work.folder)
        ours_seconds = run_ours(work, store)
        say(f"ours: {ours_seconds:.1f} s for {len(work.block.cells)} cells")
        stored, queries = Stored(store), _spread_over_lengths(work, options.queries_sample)
        seconds: dict[Point, dict[str, float]] = {}
        errors: dict[str, float] = defaultdict(float)
        for point in _sampled(work, options.sample):
            seconds[point], found = _cell(work, point, queries, threads=options.threads)
            say(f"papers' procedure, {point}: {sum(seconds[point].values()):.1f} s with {len(queries)} of {len(work.encoded.queries)} queries")
            for key, figures in ((point, found["found"]), *(((kind, None, None), found["baselines"][kind]) for kind in ("zero_shot", "icl"))):
                for name, error in stored.errors(key, figures, queries).items():
                    errors[name] = max(errors[name], error)
        scaled = len(work.encoded.queries) / len(queries)
        papers_seconds = _extrapolated(work, seconds, scaled)
        counted = [flops.of_papers, flops.of_block]
        papers_flops, ours_flops = (sum(count(work.encoded, work.block.model.config, work.passes).values()) for count in counted)
    value, ratio = papers_seconds / ours_seconds, papers_flops / ours_flops
    goal = max(SHARE * ratio, GOAL if is_full else 0.0)
    return {
        "value": value,
        "goal": goal,
        "holds": value >= goal,
        "flops_ratio": ratio,
        "papers": {"seconds": papers_seconds, "flops": papers_flops, "gflops": papers_flops / papers_seconds / 1e9},
        "ours": {"seconds": ours_seconds, "flops": ours_flops, "gflops": ours_flops / ours_seconds / 1e9},
        "grid": {name: vars(options)[name] for name in ("k", "queries", "rates", "threads")} | {"steps": work.passes["vanilla"][1]},
        "sampled": [{"method": m, "learning_rate": rate, "step": step, "seconds": parts} for (m, rate, step), parts in seconds.items()],
        "queries_sampled": len(queries),
        "largest_errors": dict(errors),
    }


def run_ours(work: Work, store: Store) -> float:
    """Run the whole block in a fresh process and return the seconds from its start to its end."""
    return _timed("tests.benchmarks.grid", work.sweep, store.root)


def _timed(module: str, *arguments: Path) -> float:
    before = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, check=True, stdout=sys.stderr)
    return time.perf_counter() - before


def _sampled(work: Work, num: int) -> list[Point]:
    """Return `num` steps of each method, the last among them, at the learning rate in the middle."""
    points: list[Point] = []
    for method, (num_rates, steps) in work.passes.items():
        rate = work.block.learning_rates(method)[num_rates // 2]
        points += [(method, rate, step) for step in {steps[round(n)] for n in np.linspace(len(steps) - 1, 0, min(num, len(steps)))}]
    return points


def _spread_over_lengths(work: Work, num: int | None) -> list[int]:
    by_length = sorted(range(len(work.encoded.queries)), key=lambda number: len(work.encoded.queries[number]))
    num = len(by_length) if num is None else min(num, len(by_length))
    return [by_length[int((n + 0.5) * len(by_length) / num)] for n in range(num)]


def _cell(work: Work, point: Point, queries: Sequence[int], *, threads: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Run one cell as the papers did and return how long its parts took, and what it found."""
    (method, rate, step), encoded = point, work.encoded
    job, result = work.folder / "job.json", work.folder / "result.pt"
    job.write_text(
        json.dumps(
            {
                "model": str(work.directory),
                "threads": threads,
                "method": method,
                "rate": rate,
                "lead": encoded.prefix_ids,
                "context": encoded.context_ids,
                "queries": [encoded.queries[number] for number in queries],
                "labels": work.labels,
                "sequences": encoded.training.sequences[:step],
                "first": encoded.training.first_loss[:step],
            }
        )
    )
    whole = _timed("tests.benchmarks.papers", job, result)
    found = torch.load(result)
    seconds = found.pop("seconds")
    return seconds | {"start": whole - sum(seconds.values())}, found


def _extrapolated(work: Work, seconds: Mapping[Point, Mapping[str, float]], scaled: float) -> float:
    """Return the seconds of all cells, each a process of its own."""
    repeated = mean(sum(part * (scaled if name in EVALUATED else 1) for name, part in parts.items() if name != "training") for parts in seconds.values())
    total = 0.0
    for method, (num_rates, steps) in work.passes.items():
        known = sorted((step, parts["training"]) for (name, _, step), parts in seconds.items() if name == method)
        training = np.interp(steps, [0, *(step for step, _ in known)], [0, *(part for _, part in known)])
        total += num_rates * float(len(steps) * repeated + training.sum())
    return total
