"""Run a sweep: one Ray Tune Tuner over the pending blocks, actors reused, in rounds as long as another driver holds some of them.

Knows Ray Tune, signals and exit codes. The driver receives counts only; actors commit results themselves, so a killed driver loses nothing that
was committed. Tune's own state is kept nowhere: every start plans anew from the store.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from iclgd_dist.background import background
from iclgd_dist.blocks import Block, split
from iclgd_dist.claims import is_claimed, note_death
from iclgd_dist.config import Resources, Sweep
from iclgd_dist.files import Vanished
from iclgd_dist.plan import Plan
from iclgd_dist.progress import Counts, shown
from iclgd_dist.session import connected, nodes, num_slots, preflight, require_room
from iclgd_dist.store import Store, StoreError
from iclgd_dist.terminal import say_how_to_resume

DONE, USAGE, FAILED, STORAGE, INTERRUPTED, CONTROL_C = 0, 2, 3, 74, 75, 130  # exit codes
COMPACT_EVERY = 5_000  # cells
MAX_FAILURES = 3  # deaths of a block's actor; after each, half as many learning rates train at once
NODES_SECONDS = 10.0  # between looks at how many actors the cluster holds
LATER = ("elsewhere", "again")  # outcomes of a block that belongs into the next round
DRAIN_SECONDS = 8.0  # from a signal to the end, whatever is under way
WATCH_SECONDS = 0.5
MAX_ROUNDS = 10  # that a block whose actor died before it had begun goes into
ELSEWHERE_SECONDS = 5.0  # between looks at what another driver holds


class Budget:
    """What a command may spend on its runs, from now on; None = without limit. A GPU counts while a block runs on it."""

    def __init__(self, hours: float | None = None, gpu_hours: float | None = None) -> None:
        self.hours, self.gpu_hours, self.spent_gpu_hours, self.started = hours, gpu_hours, 0.0, time.monotonic()

    def spend(self, num_gpus: int, seconds: float) -> None:
        self.spent_gpu_hours += num_gpus * seconds / 3600

    def over(self) -> str:
        """Return which limit is reached, or an empty text."""
        if self.hours is not None and time.monotonic() - self.started >= self.hours * 3600:
            return f"{self.hours:g} hours are spent"
        return f"{self.gpu_hours:g} GPU hours are spent" if self.gpu_hours is not None and self.spent_gpu_hours >= self.gpu_hours else ""


def run_sweep(sweep: Sweep, plan: Plan, store: Store, *, address: str | None, console: Console, budget: Budget | None = None, is_open: bool = False) -> int:
    """Run the plan's blocks and return the exit code: 0 all cells final, 3 some failed, 75 stopped by SIGTERM, at the budget's end or without cluster, 130 by Ctrl-C.

    `is_open`: the user wants a cluster without token.
    """
    run, resources = uuid.uuid4().hex[:8], sweep.resources
    with connected(address, is_open=is_open):
        require_room(resources)
        if address is not None:
            preflight(store)
        slots = num_slots(resources)
        num_actors = min(slots, resources.max_actors) if resources.max_actors else slots
        blocks = split(plan.blocks, num_actors)
        _say_split(plan, blocks, num_actors, console)
        counts = Counts(len(plan.keys) - plan.num_done, sum(block.cost.flops for block in blocks), {block.name: block.cost.flops for block in blocks})
        with _stoppable() as stopped, shown(counts, console), _watched(budget or Budget(), counts, resources, stopped):
            pending: Sequence[Block] = blocks
            while pending and not stopped.code:
                try:
                    _fit(pending, store, run, counts, resources)
                except Exception as error:  # Tune raises what it has no rule for; a block runs again as long as there is a cluster to run it on
                    _after_trouble(error, pending, counts, stopped)
                pending = _next_round(blocks, store, run, counts, stopped)
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
        console.print(stopped.why, highlight=False, soft_wrap=True, markup=False)
    if stopped.code:
        return stopped.code
    outcomes = {outcome for outcome, _ in counts.outcomes.values()}
    if not missing and not any(block.is_measuring for block in blocks):
        outcomes &= {"metric"}  # whatever went wrong, every cell is there
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

    _keep_secrets()
    bundle: dict[str, float] = {"CPU": resources.cpus_per_actor, **({"GPU": resources.gpus_per_actor} if resources.gpus_per_actor else {})}
    parameters = {"blocks": {block.name: block for block in blocks}, "store": str(store.root.absolute()), "run": run}
    trainable = tune.with_resources(tune.with_parameters(ModelActor, **parameters), lambda _config: PlacementGroupFactory([bundle]))
    # As many blocks are under way as there are places for: the rest starts in the plan's order, also on nodes that join later.
    search = BasicVariantGenerator(max_concurrent=resources.max_actors or max(1, num_slots(resources)))
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
            callbacks=[_counting(counts, store, run, search, resources, blocks)],
        ),
    )
    listening = signal.getsignal(signal.SIGUSR1)
    try:
        tuner.fit()
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, listening)  # Tune leaves its own, which listens no more


def _keep_secrets() -> None:
    """Let Tune not copy credentials of this process into the actors' runtime environment, which Ray logs; actors have those of their node."""
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update([name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])


def _counting(counts: Counts, store: Store, run: str, search: Any, resources: Resources, blocks: Sequence[Block]) -> Any:
    from ray.tune import Callback

    by_name = {block.name: block for block in blocks}

    class Counting(Callback):
        """An exception in here would end the run."""

        def __init__(self) -> None:
            self.looked = time.monotonic()
            self.recovered: dict[str, int] = {}  # trial -> iteration in which its death was noted
            self.failures: dict[str, int] = {}  # trial -> deaths that Tune counts

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if resources.max_actors is None and time.monotonic() - self.looked > NODES_SECONDS:
                self.looked = time.monotonic()
                search.max_concurrent = max(1, num_slots(resources))  # nodes come and go

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            counts.take(result)
            if counts.num_committed - counts.num_compacted >= COMPACT_EVERY:
                counts.num_compacted = counts.num_committed
                with contextlib.suppress(StoreError, Vanished, OSError):  # the compaction at the end tells of it
                    store.compact()

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.recovered[trial.trial_id] = iteration
            self.note(trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            name = trial.config["block"]
            if self.recovered.get(trial.trial_id) != iteration:  # else the same death, told twice
                self.note(trial)
            counts.rounds[name] = counts.rounds.get(name, 0) + 1
            reason = _why(trial)
            if counts.deaths.get(name, 0) <= MAX_FAILURES and counts.rounds[name] <= MAX_ROUNDS:
                counts.end(name, "again", reason)  # Tune gives a block up whose actor died before it had begun
            else:
                counts.end(name, "failed", f"its actor died {counts.deaths.get(name, 0)} times: {reason}")

        def note(self, trial: Any) -> None:
            name, before = trial.config["block"], self.failures.get(trial.trial_id, 0)
            if trial.num_failures > before:  # no preemption
                self.failures[trial.trial_id] = before + 1
                counts.deaths[name] = counts.deaths.get(name, 0) + 1
                with contextlib.suppress(StoreError, OSError):
                    note_death(store, by_name[name], run, counts.deaths[name])
            _record_death(store, run, name, counts, _why(trial))

    return Counting()


def _why(trial: Any) -> str:
    """Return why the actor of a trial died, in one line."""
    try:
        text = Path(trial.error_file).read_text().rpartition("Failure #")[2]
    except (OSError, TypeError, ValueError):
        return "unknown"
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip() and not line.startswith("\t")]
    return " ".join(dict.fromkeys([lines[0], lines[-1]]))[:500] if lines else "unknown"


def _record_death(store: Store, run: str, name: str, counts: Counts, reason: str) -> None:
    """Leave an attempt record for an actor that could not leave its own."""
    last = counts.running.pop(name, {})
    attempt = {column: last.get(column, 0) for column in ("num_model_loads", "num_baselines", "num_lanes", "num_training_steps", "num_cells")}
    attempt |= {"block": name, "outcome": "lost", "reason": reason, "traceback": None, "run": run}
    attempt |= {"host": last.get("host", "unknown"), "actor": last.get("actor", "unknown")}
    attempt |= {column: last.get(column) for column in ("wall_seconds", "peak_gib", "cpus", "gpus", "gflops")}
    with contextlib.suppress(StoreError, OSError):
        store.record_attempt(attempt | {"created_at": datetime.datetime.now(datetime.UTC).isoformat()})


def _after_trouble(error: Exception, pending: Sequence[Block], counts: Counts, stopped: _Stopped) -> None:
    """Let the blocks that Tune left without an outcome go into another round, or stop where there is no cluster any more."""
    said = " ".join(str(error).split())[:300] or type(error).__name__
    try:
        num_nodes = len(nodes())
    except Exception:
        num_nodes = 0
    if not num_nodes:
        stopped.code, stopped.why = INTERRUPTED, f"the cluster is lost: {said}"
    for block in pending:
        if block.name not in counts.outcomes or counts.outcomes[block.name][0] in LATER:
            counts.rounds[block.name] = counts.rounds.get(block.name, 0) + 1
            counts.end(block.name, "again" if counts.rounds[block.name] <= MAX_ROUNDS else "failed", said)


def _next_round(blocks: Sequence[Block], store: Store, run: str, counts: Counts, stopped: _Stopped) -> list[Block]:
    """Return those of the blocks left for later that nobody else computes, as soon as there are any; what another driver finished is done."""
    later = [block for block in blocks if counts.outcomes.get(block.name, ("",))[0] in LATER]
    while later and not stopped.code:
        keys = store.keys()
        rest = []
        for block in later:
            missing = block.cells if block.is_measuring else tuple(cell for cell in block.cells if cell.key not in keys)
            rest += [replace(block, cells=missing)] if missing else []
            if not missing:
                counts.end(block.name, "done", "")
        later = rest
        if free := [block for block in later if not is_claimed(store, block, run)]:
            return free
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


@dataclass
class _Stopped:
    code: int = 0
    why: str = ""


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
        stopped.code = CONTROL_C if number == signal.SIGINT else INTERRUPTED
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
def _watched(budget: Budget, counts: Counts, resources: Resources, stopped: _Stopped) -> Iterator[None]:
    """Stop the run as SIGTERM would when its budget is spent, and end the process where an orderly stop takes too long."""

    def watch(ended: threading.Event) -> None:
        before, drained = time.monotonic(), 0.0
        while not ended.wait(WATCH_SECONDS):
            now = time.monotonic()
            budget.spend(resources.gpus_per_actor * len(counts.running), now - before)
            drained += now - before if stopped.code else 0.0
            before = now
            if drained > DRAIN_SECONDS:  # actors in the middle of a long step: its cells are not committed, and no half of them is
                say_how_to_resume()
                sys.stdout.flush()
                os._exit(stopped.code)
            if not stopped.code and (why := budget.over()):
                stopped.why = why
                os.kill(os.getpid(), signal.SIGTERM)

    with background(watch):
        yield
