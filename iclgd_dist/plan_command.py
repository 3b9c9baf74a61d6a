"""iclgd plan: what a sweep costs, or all that is wrong with it. Knows words; loads no model and writes nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from iclgd_dist import files
from iclgd_dist.config import MAX_CELLS_UNASKED, Sweep, SweepError, load_sweep
from iclgd_dist.progress import in_words
from iclgd_dist.session import check_cluster, check_cpus
from iclgd_dist.store import Store
from iclgd_dist.terminal import AsJson, Insecure, StoreOption, SweepFile, console, say_json, store_of

if TYPE_CHECKING:
    from iclgd_dist.plan import Plan

Large = Annotated[bool, typer.Option("--yes", help=f"Run more than {MAX_CELLS_UNASKED:,} cells without asking")]


def plan(
    sweep: SweepFile,
    store: StoreOption = None,
    address: Annotated[
        str | None, typer.Option(help="Also check that an actor fits a node of this Ray cluster, e.g. auto or 10.0.0.1:6379", show_default=False)
    ] = None,
    insecure: Insecure = False,
    as_json: AsJson = False,
) -> None:
    """Show what a sweep would run, or all that is wrong with it.

    Cells, blocks, tokens, FLOPs, memory and time, by arithmetic on the actual prompts. Loads no model, writes no results.

    Example: iclgd plan sweeps/demo.toml
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "2")  # seconds; where the hub does not answer, the file alone does
    loaded = load_sweep(sweep)
    results = store_of(loaded, store)
    problems: list[str] = []
    with _collecting(problems):
        planned = planned_for(loaded, results, tolerate_unreachable=True)
    with _collecting(problems):
        if address is not None:
            check_cluster(loaded.resources, address, is_open=insecure)
    if problems:
        raise SweepError("\n".join(problems))
    planned = replace(planned, warnings=(*planned.warnings, *_lacking(loaded, results, is_here=address is None)))
    if as_json:
        costs = _costs_of(planned)
        known = dict.fromkeys(costs) if planned.unreachable else costs
        say_json({"name": loaded.name, "store": str(results.root)} | _counts_of(planned) | known)
    else:
        show_plan(loaded, planned, results)


@contextlib.contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    try:
        yield
    except SweepError as error:
        problems.append(str(error))


def _lacking(sweep: Sweep, store: Store, *, is_here: bool) -> Iterator[str]:
    """Yield what a run by this user, on this machine unless it is on a cluster, would be refused for; a plan may be for another."""
    lacking: list[str] = []
    with _collecting(lacking):
        if is_here:
            check_cpus(sweep.resources)
    yield from lacking
    if not files.is_writable(store.root):
        yield f"{store.root}: this user cannot write there, and `iclgd run` would be refused; give --store a directory that can be written"


def loaded_if_small(path: str, *, yes: bool) -> Sweep:
    """Return the sweep of a file. Errors: SweepError for a faulty one, and for more cells than anyone runs by mistake, unless `yes`."""
    from iclgd_dist.plan import count_cells

    sweep = load_sweep(path)
    if (number := count_cells(sweep)[0]) > MAX_CELLS_UNASKED and not yes:
        raise SweepError(f"{path}: {number:,} cells are more than {MAX_CELLS_UNASKED:,}; look at `iclgd plan {path}`, then add --yes")
    return sweep


def planned_for(sweep: Sweep, store: Store, *, tolerate_unreachable: bool = False) -> Plan:
    from iclgd_dist.plan import make_plan

    with console.status("planning") if console.is_terminal else contextlib.nullcontext() as shown:
        say = (lambda text: shown.update(text)) if shown is not None else (lambda text: None)
        return make_plan(sweep, store.keys(), tolerate_unreachable=tolerate_unreachable, progress=say)


def show_plan(sweep: Sweep, planned: Plan, store: Store) -> None:
    for line, kind, style in (*((w, "warning: ", "yellow") for w in planned.warnings), *((n, "note: ", "cyan") for n in planned.notes)):
        console.print(Text.assemble((kind, style), line), soft_wrap=True)
    console.print(f"{sweep.name}: {planned.num_cells:,} cells in {planned.num_blocks_planned:,} blocks; store {store.root}", soft_wrap=True)
    for problem in planned.unreachable:
        console.print(f"not reachable: tokens, FLOPs and finished cells unknown ({problem})", soft_wrap=True)
    if not planned.blocks:
        return
    cost = _costs_of(planned)
    rows = {
        "to run": f"{planned.num_to_run:,} cells in {len(planned.blocks):,} blocks; {planned.num_done:,} are there",
        "tokens": f"{cost['training_tokens']:,} trained, {cost['capture_tokens']:,} captured (times learning rates and steps)",
        "FLOPs": f"{cost['flops']:.2e}",
        "memory": f"about {cost['peak_gib']:.1f} GiB per actor",
        "time": f"about {in_words(cost['seconds'])} on this machine's CPU alone ({cost['gflops']:.0f} GFLOP/s measured; 60 % of it assumed)",
    }
    if cost["kept_captures"]:
        rows["captures"] = f"{decimal(cost['kept_bytes'])} kept, of {cost['kept_captures']:,} cells"
    if sweep.resources.is_offloaded:
        once, more = max((block.cost.layer_bytes, block.cost.vanilla_reads) for block in planned.blocks)
        vanilla = f"; methods that need the layers above read them {more} times more, {decimal(once * more)}" if more else ""
        rows["weights"] = f"{decimal(once)} of layers, read once a block by baselines and layer by layer training{vanilla}"
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _counts_of(planned: Plan) -> dict[str, Any]:
    """Return counts and what is to be told; null what is not known, as a model or task cannot be reached."""
    parts = {"cells_to_run": planned.num_to_run, "blocks_to_run": len(planned.blocks), "cells_done": planned.num_done}
    known = dict.fromkeys(parts) if planned.unreachable else parts
    told = {"warnings": planned.warnings, "notes": planned.notes, "unreachable": planned.unreachable}
    return {"cells": planned.num_cells, "blocks": planned.num_blocks_planned, **known} | {name: list(lines) for name, lines in told.items()}


def _costs_of(planned: Plan) -> dict[str, Any]:
    """Return what the blocks of a plan cost: tokens, FLOPs, GiB of an actor, seconds on this machine alone, bytes of kept captures."""
    costs = [block.cost for block in planned.blocks]
    kept = {cell.key: block.cost.capture_bytes for block in planned.blocks for cell in block.cells if cell.is_kept}
    flops, gflops = sum(cost.flops for cost in costs), machine_gflops()
    return {
        "training_tokens": sum(cost.training_tokens for cost in costs),
        "capture_tokens": sum(cost.capture_tokens for cost in costs),
        "flops": flops,
        "peak_gib": max((cost.peak_gib for cost in costs), default=0.0),
        "gflops": gflops,
        "seconds": flops / (gflops * 1e9) / 0.6,
        "kept_captures": len(kept),
        "kept_bytes": sum(kept.values()),
    }


def machine_gflops(size: int = 768) -> float:
    """Return this machine's float32 matrix-product rate through numpy, in a fraction of a second: the plan's yardstick."""
    import time

    import numpy as np

    a = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9
