"""Run a sweep: one Ray Tune Tuner over the pending blocks, actors reused, progress on the terminal.

Knows Ray, signals and exit codes. The driver receives counts only; actors commit results themselves, so a killed driver loses nothing that
was committed. Tune's own state is never read back: every start plans anew from the store.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from iclgd_dist.blocks import Block, split
from iclgd_dist.config import Resources, Sweep, SweepError
from iclgd_dist.plan import Plan
from iclgd_dist.store import Store

DONE, USAGE, FAILED, STORAGE, INTERRUPTED, CONTROL_C = 0, 2, 3, 74, 75, 130  # exit codes
COMPACT_EVERY = 5_000  # cells
LOG_SECONDS = 15.0

# Ray reads these when it is first imported; what the user has set stands.
for _name, _value in {
    "RAY_AUTH_MODE": "token",  # never leave open what runs code for whoever reaches it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that asks for no GPU sees none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours turns Ctrl-C into an orderly stop with its own exit code
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}.items():
    os.environ.setdefault(_name, _value)


@dataclass
class Counts:
    """What the driver knows while a sweep runs."""

    num_cells: int  # to be computed by this run
    total_flops: float
    fractions: dict[str, float] = field(default_factory=dict)  # per block
    cells: dict[str, int] = field(default_factory=dict)
    stages: dict[str, str] = field(default_factory=dict)  # of blocks that run now
    flops: dict[str, float] = field(default_factory=dict)  # cost per block
    outcomes: dict[str, tuple[str, str]] = field(default_factory=dict)  # block -> outcome, reason
    num_compacted: int = 0
    gflops: float = 0.0
    started: float = field(default_factory=time.monotonic)

    @property
    def fraction(self) -> float:
        return sum(self.flops[name] * part for name, part in self.fractions.items()) / self.total_flops if self.total_flops else 1.0

    @property
    def num_committed(self) -> int:
        return sum(self.cells.values())

    def remaining(self) -> str:
        """Return the time left in words, from the speed so far."""
        if self.fraction < 0.01:
            return "estimating time left"
        return f"{in_words((time.monotonic() - self.started) * (1 - self.fraction) / self.fraction)} left"

    def take(self, result: dict[str, Any]) -> None:
        name = result["block"]
        self.fractions[name], self.cells[name], self.gflops = result["fraction"], result["num_cells"], result["gflops"]
        self.stages[name] = result["stage"]
        if result["outcome"]:
            self.stages.pop(name, None)
            self.fractions[name] = 1.0
            self.outcomes[name] = (result["outcome"], result["reason"])


def in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def run_sweep(sweep: Sweep, plan: Plan, store: Store, *, address: str | None, console: Console) -> int:
    """Run the plan's blocks and return the exit code: 0 all cells final, 3 some failed, 75 stopped by SIGTERM, 130 by Ctrl-C."""
    run = uuid.uuid4().hex[:8]
    with _ray(sweep.resources, address) as free:
        num_actors = _num_actors(sweep.resources, free)
        blocks = split(plan.blocks, num_actors)
        _say_split(plan, blocks, num_actors, console)
        counts = Counts(len(plan.keys) - plan.num_done, sum(block.cost.flops for block in blocks), flops={block.name: block.cost.flops for block in blocks})
        with _shown(counts, console), _stoppable() as stopped:
            _fit(blocks, store, run, counts, sweep.resources, min(num_actors, len(blocks)), is_shared=address is not None)
    for name, (outcome, reason) in counts.outcomes.items():
        if outcome != "done":
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
    if stopped.code:
        return stopped.code
    if any(outcome == "storage" for outcome, _ in counts.outcomes.values()):
        return STORAGE
    return FAILED if missing or any(outcome != "done" for outcome, _ in counts.outcomes.values()) else DONE


def _fit(blocks: tuple[Block, ...], store: Store, run: str, counts: Counts, resources: Resources, num_actors: int, *, is_shared: bool) -> None:
    from ray import tune
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
    from ray.tune.execution.placement_groups import PlacementGroupFactory

    from iclgd_dist.actor import ModelActor

    bundle: dict[str, float] = {"CPU": resources.cpus_per_actor, **({"GPU": resources.gpus_per_actor} if resources.gpus_per_actor else {})}
    parameters = {"blocks": {block.name: block for block in blocks}, "store": str(store.root.absolute()), "run": run}
    trainable = tune.with_resources(tune.with_parameters(ModelActor, **parameters), lambda _config: PlacementGroupFactory([bundle]))
    # Tune's own state: never read again. On a cluster it has to lie where every node can write.
    folder = store.root.absolute() / f".tune-{run}" if is_shared else Path(tempfile.mkdtemp(prefix="iclgd-tune-"))
    tuner = Tuner(
        trainable,
        param_space={"block": tune.grid_search([block.name for block in blocks])},
        tune_config=TuneConfig(reuse_actors=True, max_concurrent_trials=num_actors, trial_dirname_creator=lambda trial: trial.trial_id),
        run_config=RunConfig(
            name="blocks",
            storage_path=str(folder),
            verbose=0,
            failure_config=FailureConfig(max_failures=2),  # an actor that dies is replaced; exceptions inside a block never get here
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_counting(counts, store)],
        ),
    )
    try:
        tuner.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _counting(counts: Counts, store: Store) -> Any:
    from ray.tune import Callback

    class Counting(Callback):
        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            counts.take(result)
            if counts.num_committed - counts.num_compacted >= COMPACT_EVERY:
                counts.num_compacted = counts.num_committed
                store.compact()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            name = trial.config["block"]
            counts.stages.pop(name, None)
            counts.outcomes[name] = ("failed", "its actor died; `iclgd status` shows the attempts")

    return Counting()


def check_machine(resources: Resources) -> None:
    """Raise SweepError when this machine alone cannot hold one actor; asked before anything is written or started."""
    here = len(os.sched_getaffinity(0))
    if resources.cpus_per_actor > here:
        raise SweepError(f"[resources] cpus_per_actor = {resources.cpus_per_actor}, but this machine has {here}; lower it, or give --address of a cluster")


def _require_answer(address: str, seconds: float = 5.0) -> None:
    """Raise SweepError when nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():  # "auto", or a name that Ray resolves
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as error:
        raise SweepError(f"no Ray cluster answers at {address}: {error.strerror or error}") from None


@contextlib.contextmanager
def _ray(resources: Resources, address: str | None) -> Iterator[dict[str, float]]:
    """Connect to a cluster, or start Ray on this machine for loopback only; yield what one node and the whole cluster offer."""
    if address is not None:
        _require_answer(address)
    if address is None or address.startswith(("127.", "localhost:")):
        # Otherwise Ray turns 127.0.0.1 into this machine's public address, to listen there and to look for the cluster there.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is None and os.environ["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this run alone: never written to a file
    import ray

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise SweepError(f"no Ray cluster answers at {address or 'this machine'}: {' '.join(str(error).split())[:300]}") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield {
            "cpus": sum(node.get("CPU", 0) for node in nodes),
            "gpus": sum(node.get("GPU", 0) for node in nodes),
            "node_cpus": max((node.get("CPU", 0) for node in nodes), default=0),
            "node_gpus": max((node.get("GPU", 0) for node in nodes), default=0),
            "slots": sum(_slots(node, resources) for node in nodes),
        }
    finally:
        ray.shutdown()


def _slots(node: dict[str, float], resources: Resources) -> int:
    slots = int(node.get("CPU", 0) // resources.cpus_per_actor)
    return min(slots, int(node.get("GPU", 0) // resources.gpus_per_actor)) if resources.gpus_per_actor else slots


def _num_actors(resources: Resources, free: dict[str, float]) -> int:
    for what, wanted in (("cpus", resources.cpus_per_actor), ("gpus", resources.gpus_per_actor)):
        if wanted > free[f"node_{what}"]:
            raise SweepError(
                f"[resources] {what}_per_actor = {wanted}, but no node of the cluster has more than {free[f'node_{what}']:.0f}; lower it or use larger nodes"
            )
    slots = int(free["slots"])
    if slots < 1:
        raise SweepError(f"[resources] {resources.cpus_per_actor} CPUs and {resources.gpus_per_actor} GPUs per actor: no single node of the cluster has both")
    return min(slots, resources.max_actors) if resources.max_actors else slots


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
def _shown(counts: Counts, console: Console) -> Iterator[None]:
    """Show progress while the block runs: a bar on a terminal, a plain line every 15 s elsewhere."""
    ended = threading.Event()

    def line() -> str:
        stage = next(iter(list(counts.stages.values())), "starting actors")
        running = len(counts.stages)
        return f"{counts.num_committed}/{counts.num_cells} cells, {counts.remaining()}; {stage}" + (f" (+{running - 1} more)" if running > 1 else "")

    def log() -> None:
        while not ended.wait(LOG_SECONDS):
            console.print(f"{counts.fraction:4.0%} after {in_words(time.monotonic() - counts.started)}: {line()}", highlight=False, markup=False)

    def draw() -> None:
        columns = (BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=1.0)
            while not ended.wait(0.5):
                bar.update(task, completed=counts.fraction, description=line())

    thread = threading.Thread(target=draw if console.is_terminal else log, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
