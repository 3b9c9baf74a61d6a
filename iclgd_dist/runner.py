"""Run a sweep: rounds of Ray Tune over the pending blocks, as long as another driver holds some of them or their actors went with their nodes.

Knows rounds and exit codes. Tune's own state is kept nowhere: every start plans anew from the store, and a killed driver loses nothing that was committed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from iclgd_dist.blocks import Block, split
from iclgd_dist.claims import announced, is_claimed, unreachable
from iclgd_dist.config import Sweep
from iclgd_dist.plan import Plan
from iclgd_dist.progress import LATER, Counts, shown
from iclgd_dist.session import LEFT_OUT, Newcomers, connected, nodes, num_slots, preflight, require_room
from iclgd_dist.stopping import Budget, stoppable, watched
from iclgd_dist.store import Store
from iclgd_dist.terminal import DONE, FAILED, INTERRUPTED, STORAGE, say
from iclgd_dist.trackers import callbacks
from iclgd_dist.trials import MAX_ROUNDS, Running, fit

ELSEWHERE_SECONDS = 5.0  # between looks at what another driver holds, and after trouble


def run_sweep(
    sweep: Sweep,
    plan: Plan,
    store: Store,
    *,
    address: str | None,
    console: Console,
    budget: Budget | None = None,
    is_open: bool = False,
    track: Sequence[str] = (),
) -> int:
    """Run the plan's blocks and return the exit code: 0 all cells final, 3 some failed, 75 stopped by SIGTERM, at the budget's end or without cluster, 130 by Ctrl-C.

    `is_open`: the user wants a cluster without token. `track`: names of trackers that are told of each committed step.
    """
    run, resources, counts, head = uuid.uuid4().hex[:8], sweep.resources, Counts(), [""]
    with stoppable() as stopped, watched(budget or Budget(), stopped, num_gpus=lambda: resources.gpus_per_actor * len(counts.running), head=lambda: head[0]):
        with connected(address, is_open=is_open) as head[0], announced(store, run):
            require_room(resources)
            if address is not None:
                preflight(store, run)
            slots = num_slots(resources)
            num_actors = min(slots, resources.max_actors) if resources.max_actors else slots
            blocks = tuple(replace(block, is_tracked=bool(track)) for block in split(plan.blocks, num_actors))
            _say_split(plan, blocks, num_actors, console)
            counts.num_cells, counts.flops = len(plan.keys) - plan.num_done, {block.name: block.cost.flops for block in blocks}
            counts.tokens = {block.name: block.cost.training_tokens + block.cost.capture_tokens for block in blocks}
            trackers = callbacks(track, sweep.name, Path("tensorboard") / sweep.name)
            running = Running(store, run, counts, resources, stopped, Newcomers(store, run), tuple(trackers))
            with shown(counts, console):
                pending: Sequence[Block] = blocks
                while pending and not stopped.code:
                    try:
                        fit(pending, running)
                    except Exception as error:  # Tune raises what it has no rule for; a block runs again as long as there is a cluster to run it on
                        _after_trouble(error, pending, running)
                    pending = _next_round(blocks, running)
            head[0] = ""  # it goes now
        for name, (outcome, reason) in counts.outcomes.items():
            if outcome not in ("done", "stopped", *LATER):
                console.print(Text.assemble((outcome, "red"), f" {name}: {reason}"), soft_wrap=True)
        if not stopped.code:
            store.compact()
        behind = {cell.key for block in blocks if counts.outcomes.get(block.name, ("",))[0] == "stopped" for cell in block.cells}
        missing = len(set(plan.keys) - store.keys() - behind)
        console.print(
            f"{counts.num_committed} cells in {time.monotonic() - counts.started:.0f} s; {missing} of {len(plan.keys)} missing; "
            f"an actor's float32 matrix product here: {counts.gflops:.0f} GFLOP/s",
            highlight=False,
            soft_wrap=True,
        )
    if stopped.code:
        return stopped.code
    outcomes = {outcome for outcome, _ in counts.outcomes.values()}
    if not missing and not any(block.is_measuring for block in blocks):
        outcomes &= {"metric"}  # whatever went wrong, every cell is there
    if "storage" in outcomes:
        return STORAGE
    return FAILED if missing or outcomes - {"done", "stopped", *LATER} else DONE


def _after_trouble(error: Exception, pending: Sequence[Block], running: Running) -> None:
    """Let the blocks that Tune left without an outcome go into another round, or stop where there is no cluster any more."""
    counts, stopped = running.counts, running.stopped
    said = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"  # of a traceback the end says what it was
    try:
        num_nodes = len(nodes())
    except Exception:
        num_nodes = 0
    if not num_nodes and not stopped.code:
        stopped.code, stopped.why = INTERRUPTED, f"the cluster is lost: {said}"
        say(stopped.why)
    elif not stopped.code:
        say(f"Ray Tune gave a round up: {said}")
        time.sleep(ELSEWHERE_SECONDS)
    for block in pending:
        if block.name not in counts.outcomes or counts.outcomes[block.name][0] in LATER:
            counts.again(block.name, said, most=MAX_ROUNDS)


def _next_round(blocks: Sequence[Block], running: Running) -> list[Block]:
    """Return those of the blocks left for later that nobody else computes, as soon as there are any; what another driver finished is done."""
    store, counts = running.store, running.counts
    later = [block for block in blocks if counts.outcomes.get(block.name, ("",))[0] in LATER]
    if later and LEFT_OUT and not running.stopped.code and not num_slots(running.resources):
        lost = unreachable(store, running.run)
        for block in later:
            counts.end(block.name, "storage" if lost else "failed", lost or f"no node is left that can run it: {next(iter(LEFT_OUT.values()))}")
        return []
    while later and not running.stopped.code:
        keys = store.keys()
        rest = []
        for block in later:
            missing = block.cells if block.is_measuring else tuple(cell for cell in block.cells if cell.key not in keys)
            rest += [replace(block, cells=missing)] if missing else []
            if not missing:
                counts.end(block.name, "done", "")
        later = rest
        if free := [block for block in later if not is_claimed(store, block, running.run)]:
            counts.waits_for = ""
            return free
        counts.waits_for = "what another driver computes"
        time.sleep(ELSEWHERE_SECONDS)
    return []


def _say_split(plan: Plan, blocks: tuple[Block, ...], num_actors: int, console: Console) -> None:
    if len(blocks) > len(plan.blocks):
        more = sum(block.cost.baseline_flops for block in blocks) - sum(block.cost.baseline_flops for block in plan.blocks)
        total = sum(block.cost.flops for block in blocks)
        console.print(
            f"{len(plan.blocks)} blocks are split into {len(blocks)} for {num_actors} actors; repeated baselines are {more / total:.0%} of the work",
            highlight=False,
        )
