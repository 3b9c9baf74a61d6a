"""How much of the machine a whole block uses: useful FLOPs per second, as a share of the best rate of the model's own products in the same run."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from iclgd_dist.block import block_steps
from iclgd_dist.model import LanguageModel
from iclgd_dist.probes import TOKENS_PER_BATCH
from tests.benchmarks import flops, grid
from tests.benchmarks.agreement import Stored
from tests.benchmarks.grid import Work, say

GOAL, REPEATS = 0.70, 8


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run one block between two measurements of the machine's rate and return the figures. The value is the lowest share: of the block, of each method."""
    options = grid.parser(__doc__, k=8, queries=32).parse_args(arguments)
    with grid.work(options) as work:
        lm, useful = grid.loaded(work.block), _useful(work)
        before = product_rates(lm, work)
        seconds = _timed_parts(lm, work)
        after = product_rates(lm, work)
    rates = {shape: max(before[shape], after[shape]) for shape in before}
    rate = max(rates.values())
    parts = {name: {"seconds": took, "flops": useful.get(name, 0.0), "share": useful.get(name, 0.0) / took / rate} for name, took in seconds.items()}
    shares = {"block": sum(useful.values()) / sum(seconds.values()) / rate}
    for method in work.passes:
        own = [sum(each for name, each in found.items() if name.startswith(f"{method},")) for found in (useful, seconds)]
        shares[method] = own[0] / own[1] / rate
    value = min(shares.values())
    return {
        "value": value,
        "goal": GOAL,
        "holds": value >= GOAL,
        "shares": shares,
        "parts": parts,
        "gflops": rate / 1e9,
        "gflops_by_product": {shape: each / 1e9 for shape, each in rates.items()},
        "seconds": sum(seconds.values()),
        "grid": {name: vars(options)[name] for name in ("k", "queries", "rates", "threads")} | {"steps": work.passes["vanilla"][1]},
    }


def _timed_parts(lm: LanguageModel, work: Work) -> dict[str, float]:
    """Run the block and return the seconds of its parts, by what it says it has just done."""
    seconds: dict[str, float] = defaultdict(float)
    store, since = grid.new_store(work.folder), time.perf_counter()
    for progress in block_steps(lm, work.block, store):
        now = time.perf_counter()
        seconds[_part(progress.stage, work)] += now - since
        since = now
        say(f"{progress.stage}: {100 * progress.done_flops / progress.total_flops:.0f} %")
    seconds["ending"] = time.perf_counter() - since
    statuses = {row["status"] for row in Stored(store).cells.values()}
    assert len(store.keys()) == len(work.block.cells) and statuses <= {"done", "diverged"}, f"cells are missing: {len(store.keys())}, {statuses}"
    return seconds


def _part(stage: str, work: Work) -> str:
    """Return which part of the block ended with a stage."""
    method = next((name for name in work.passes if stage.startswith(f"{name},")), None)
    if method is None:
        return "baselines"
    if stage.endswith("committed"):
        return f"{method}, comparing and commits"
    if work.block.method(method).is_bottom_up:
        return f"{method}, training and captures"
    return f"{method}, training" if stage.endswith("trained") else f"{method}, captures"


def _useful(work: Work) -> dict[str, float]:
    """Return the useful FLOPs of the parts that can be timed."""
    counted, parts = flops.of_block(work.encoded, work.block.model.config, work.passes), {}
    parts["baselines"] = counted.pop("baselines") + counted.pop("baselines, logits")
    for method in work.passes:
        training, captures = counted.pop(f"{method}, training"), counted.pop(f"{method}, captures")
        is_bottom_up = work.block.method(method).is_bottom_up
        parts |= (
            {f"{method}, training and captures": training + captures} if is_bottom_up else {f"{method}, training": training, f"{method}, captures": captures}
        )
        parts[f"{method}, comparing and commits"] = counted.pop(f"{method}, logits")
    assert not counted, f"parts that are not timed: {list(counted)}"
    return parts


@torch.no_grad()
def product_rates(lm: LanguageModel, work: Work) -> dict[str, float]:
    """Return the best rate [FLOP/s] of each product of a layer at one micro-batch, and of the output head at the rows that training reads."""
    tokens, training = work.block.resources.tokens_per_batch or TOKENS_PER_BATCH["cpu"], work.encoded.training
    targets = [len(ids) - first for ids, first in zip(training.sequences, training.first_loss, strict=True)]
    num_lanes = max(num_rates for num_rates, _ in work.passes.values())
    products = {name: (module, tokens) for name, module in lm.layers[0].named_modules() if isinstance(module, nn.Linear)}
    products["head"] = lm.model.get_output_embeddings(), num_lanes * round(sum(targets) / len(targets))
    rates = {}
    for name, (module, rows) in products.items():
        inputs, best = torch.randn(rows, module.in_features), math.inf
        for _ in range(REPEATS):
            before = time.perf_counter()
            module(inputs)
            best = min(best, time.perf_counter() - before)
        rates[f"{name}: {rows} x {module.in_features} x {module.out_features}"] = 2 * rows * module.in_features * module.out_features / best
    return rates
