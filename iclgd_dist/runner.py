"""Run a sweep: one Ray Tune Tuner over the pending blocks, actors reused, in rounds as long as another driver holds some of them.

Knows Ray Tune, signals and exit codes. The driver receives counts only; actors commit results themselves, so a killed driver loses nothing that
was committed. Tune's own state is kept nowhere: every start plans anew from the store.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from iclgd_dist.blocks import Block, split
from iclgd_dist.claims import is_claimed
from iclgd_dist.config import Resources, Sweep
from iclgd_dist.plan import Plan
from iclgd_dist.progress import Counts, shown
from iclgd_dist.session import connected, num_slots, preflight, require_room
from iclgd_dist.store import Store, StoreError
from iclgd_dist.terminal import say_how_to_resume

DONE, USAGE, FAILED, STORAGE, INTERRUPTED, CONTROL_C = 0, 2, 3, 74, 75, 130  # exit codes
COMPACT_EVERY = 5_000  # cells
MAX_FAILURES = 3  # deaths of a block's actor; after each, half as many learning rates train at once
NODES_SECONDS = 10.0  # between looks at how many actors the cluster holds
LATER = ("elsewhere", "again")  # outcomes of a block that belongs into the next round
DRAIN_SECONDS = 8.0  # from a signal to the end, whatever is under way
ELSEWHERE_SECONDS = 5.0  # between looks at what another driver holds


@dataclass(frozen=True)
class Budget:
    """What a run may spend; None = without limit. A GPU counts while a block runs on it."""

    hours: float | None = None
    gpu_hours: float | None = None


def run_sweep(sweep: Sweep, plan: Plan, store: Store, *, address: str | None, console: Console, budget: Budget | None = None) -> int:
    """Run the plan's blocks and return the exit code: 0 all cells final, 3 some failed, 75 stopped by SIGTERM or at the budget's end, 130 by Ctrl-C."""
    run, resources = uuid.uuid4().hex[:8], sweep.resources
    with connected(address):
        require_room(resources)
        if address is not None:
            preflight(store)
        num_actors = min(num_slots(resources), resources.max_actors or len(plan.blocks))
        blocks = split(plan.blocks, num_actors)
        _say_split(plan, blocks, num_actors, console)
        counts = Counts(len(plan.keys) - plan.num_done, sum(block.cost.flops for block in blocks), {block.name: block.cost.flops for block in blocks})
        with shown(counts, console), _stoppable() as stopped, _spending(budget or Budget(), counts, resources, stopped):
            pending: Sequence[Block] = blocks
            while pending and not stopped.code:
                _fit(pending, store, run, counts, resources)
                pending = _wait_for_others([block for block in pending if counts.outcomes.get(block.name, ("",))[0] in LATER], store, stopped)
    for name, (outcome, reason) in counts.outcomes.items():
        if outcome not in ("done", *LATER):
            console.print(Text.assemble((outcome, "red"), f" {name}: {reason}"), soft_wrap=True)
    store.compact()
    missing = len(set(plan.keys) - store.keys())
    seconds = time.monotonic() - counts.started
    console.print(
        f"{counts.num_committed} cells in {seconds:.0f} s; {missing} of {len(plan.keys)} missing; "
        f"an actor's float32 matrix product here: {counts.gflops:.0f} GFLOP/s",
        highlight=False,
        soft_wrap=True,
    )
    if stopped.why:
        console.print(stopped.why, highlight=False)
    if stopped.code:
        return stopped.code
    outcomes = {outcome for outcome, _ in counts.outcomes.values()}
    if "storage" in outcomes:
        return STORAGE
    return FAILED if missing or outcomes - {"done", *LATER} else DONE


def _fit(blocks: Sequence[Block], store: Store, run: str, counts: Counts, resources: Resources) -> None:
    from ray import tune
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
    from ray.tune.execution.placement_groups import PlacementGroupFactory
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from iclgd_dist.actor import ModelActor
    from iclgd_dist.nowhere import nowhere

    bundle: dict[str, float] = {"CPU": resources.cpus_per_actor, **({"GPU": resources.gpus_per_actor} if resources.gpus_per_actor else {})}
    parameters = {"blocks": {block.name: block for block in blocks}, "store": str(store.root.absolute()), "run": run}
    trainable = tune.with_resources(tune.with_parameters(ModelActor, **parameters), lambda _config: PlacementGroupFactory([bundle]))
    # As many blocks are under way as there are places for: the rest starts in the plan's order, also on nodes that join later.
    search = BasicVariantGenerator(max_concurrent=resources.max_actors or num_slots(resources))
    tuner = Tuner(
        trainable,
        param_space={"block": tune.grid_search([block.name for block in blocks])},
        tune_config=TuneConfig(search_alg=search, reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id),
        run_config=RunConfig(
            name=f"blocks-{run}",
            storage_path="/nowhere",
            storage_filesystem=nowhere(),
            verbose=0,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),  # an actor that dies is replaced; exceptions inside a block never get here
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_counting(counts, store, run, search, resources)],
        ),
    )
    tuner.fit()


def _counting(counts: Counts, store: Store, run: str, search: Any, resources: Resources) -> Any:
    from ray.tune import Callback

    class Counting(Callback):
        looked = time.monotonic()

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if resources.max_actors is None and time.monotonic() - self.looked > NODES_SECONDS:
                self.looked = time.monotonic()
                search.max_concurrent = max(1, num_slots(resources))  # nodes come and go

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            counts.take(result)
            if counts.num_committed - counts.num_compacted >= COMPACT_EVERY:
                counts.num_compacted = counts.num_committed
                store.compact()

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            _record_death(store, run, trial, counts)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            name, reason = trial.config["block"], _record_death(store, run, trial, counts)
            counts.deaths[name] = counts.deaths.get(name, 0) + max(1, trial.num_failures)
            if counts.deaths[name] <= MAX_FAILURES:  # Tune gives a block up whose actor died before it had begun
                counts.end(name, "again", reason)
            else:
                counts.end(name, "failed", f"its actor died {counts.deaths[name]} times: {reason}")

    return Counting()


def _record_death(store: Store, run: str, trial: Any, counts: Counts) -> str:
    """Leave an attempt record for an actor that could not leave its own; return why it died."""
    name = trial.config["block"]
    last = counts.running.pop(name, {})
    text = Path(trial.error_file).read_text().rpartition("Failure #")[2] if trial.error_file else "unknown"
    reason = next((line.strip() for line in text.splitlines()[1:] if line.strip()), "unknown")[:500]
    attempt = {column: last.get(column, 0) for column in ("num_model_loads", "num_baselines", "num_lanes", "num_training_steps", "num_cells")}
    attempt |= {"block": name, "outcome": "lost", "reason": reason, "traceback": text, "run": run}
    attempt |= {"host": last.get("host", platform.node()), "actor": last.get("actor", "unknown"), "gflops": last.get("gflops")}
    attempt |= {column: last.get(column) for column in ("wall_seconds", "peak_gib", "cpus", "gpus")}
    with contextlib.suppress(StoreError):
        store.record_attempt(attempt | {"created_at": datetime.datetime.now(datetime.UTC).isoformat()})
    return reason


def _wait_for_others(blocks: Sequence[Block], store: Store, stopped: _Stopped) -> list[Block]:
    """Wait until none of the blocks is somebody else's, and return those that still have cells to be computed."""
    while blocks and not stopped.code and all(is_claimed(store, block) for block in blocks):
        stopped.event.wait(ELSEWHERE_SECONDS)
    keys = store.keys() if blocks else set()
    rest = [replace(block, cells=tuple(cell for cell in block.cells if cell.key not in keys or block.is_measuring)) for block in blocks]
    return [block for block in rest if block.cells]


def _say_split(plan: Plan, blocks: tuple[Block, ...], num_actors: int, console: Console) -> None:
    if len(blocks) > len(plan.blocks):
        more = sum(block.cost.baseline_flops for block in blocks) - sum(block.cost.baseline_flops for block in plan.blocks)
        total = sum(block.cost.flops for block in blocks)
        console.print(
            f"{len(plan.blocks)} blocks are split into {len(blocks)} for {num_actors} actors; repeated baselines are {more / total:.0%} of the work",
            highlight=False,
        )


@dataclass
class _Stopped:
    code: int = 0
    why: str = ""
    event: threading.Event = field(default_factory=threading.Event)

    def stop(self, code: int) -> None:
        self.code = code
        self.event.set()
        last = threading.Timer(DRAIN_SECONDS, _leave, [code])  # actors may be in the middle of a long step: its cells were not committed
        last.daemon = True
        last.start()


def _leave(code: int) -> None:
    say_how_to_resume()
    sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def _stoppable() -> Iterator[_Stopped]:
    """Turn SIGINT and SIGTERM into an orderly stop of Tune; a second one stops at once. Handlers that were there are put back."""
    stopped = _Stopped()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def stop(number: int, frame: Any) -> None:
        if stopped.code:
            raise KeyboardInterrupt
        stopped.stop(CONTROL_C if number == signal.SIGINT else INTERRUPTED)
        if callable(signal.getsignal(signal.SIGUSR1)):  # Tune listens: finish the current second of work and end
            os.kill(os.getpid(), signal.SIGUSR1)
        elif callable(earlier := before[signal.Signals(number)]):
            earlier(number, frame)  # nothing runs yet: stop as the command line does

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.code = stopped.code or CONTROL_C
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _spending(budget: Budget, counts: Counts, resources: Resources, stopped: _Stopped) -> Iterator[None]:
    """Stop the run as SIGTERM would when its budget is spent."""
    ended = threading.Event()

    def watch() -> None:
        gpu_hours, before = 0.0, time.monotonic()
        while not ended.wait(1.0):
            now = time.monotonic()
            gpu_hours += resources.gpus_per_actor * len(counts.running) * (now - before) / 3600
            before = now
            over = [
                f"{limit:g} {what} are spent"
                for what, limit, spent in (("hours", budget.hours, (now - counts.started) / 3600), ("GPU hours", budget.gpu_hours, gpu_hours))
                if limit is not None and spent >= limit
            ]
            if over:
                stopped.why = over[0]
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
