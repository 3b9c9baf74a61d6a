"""One Ray Tune Tuner over some blocks, and what the driver makes of what Tune tells it: counts, deaths of actors, nodes that come, go or are no use.

Knows Ray Tune's callbacks. The driver receives counts only; actors commit results themselves.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from iclgd_dist.blocks import Block
from iclgd_dist.claims import note_death, take_death_back
from iclgd_dist.config import Resources
from iclgd_dist.files import Vanished
from iclgd_dist.progress import Counts
from iclgd_dist.session import Newcomers, leave_out, nodes, num_slots, place
from iclgd_dist.stopping import Stopped
from iclgd_dist.store import Store, StoreError
from iclgd_dist.terminal import say

COMPACT_EVERY = 5_000  # cells
MAX_FAILURES = 3  # deaths of a block's actor; after each, half as many learning rates train at once
MAX_ROUNDS = 10  # that a block goes into whose actors died with their nodes, or before they had begun
NODES_SECONDS = 10.0  # between looks at which nodes there are
ANSWER_SECONDS = 1.0  # between looks while a node that joined has not said whether it is of use
NOTICED_SECONDS = 60.0  # within which Ray notices that a node is gone
SILENT_SECONDS = 3600.0  # without a word from an actor, after which it is ended like one that hangs
WAIT_SECONDS = 600.0  # that a run waits for a node with room for an actor
BEHIND = "behind other learning rates at the same step"  # why a scheduler stops one


@dataclass(frozen=True)
class Running:
    """What all Tuners of a run share."""

    store: Store
    run: str
    counts: Counts
    resources: Resources
    stopped: Stopped
    newcomers: Newcomers
    trackers: tuple[Any, ...] = ()  # callbacks of Tune's


def fit(blocks: Sequence[Block], running: Running) -> None:
    """Run blocks until each has an outcome in the counts, or the run has to stop."""
    from ray import tune
    from ray.tune import CheckpointConfig, FailureConfig, RunConfig, TuneConfig, Tuner
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from iclgd_dist.actor import ModelActor
    from iclgd_dist.nowhere import nowhere

    _keep_secrets()
    resources = running.resources
    bundle: dict[str, float] = {"CPU": resources.cpus_per_actor, **({"GPU": resources.gpus_per_actor} if resources.gpus_per_actor else {})}
    parameters = {"blocks": {block.name: block for block in blocks}, "store": str(running.store.root.absolute()), "run": running.run}
    trainable = tune.with_resources(tune.with_parameters(ModelActor, **parameters), functools.partial(place, bundle))
    # As many blocks are under way as there are places for: the rest starts in the plan's order, also on nodes that join later.
    search = BasicVariantGenerator(max_concurrent=resources.max_actors or max(1, num_slots(resources)))
    tuner = Tuner(
        trainable,
        param_space={"block": tune.grid_search([block.name for block in blocks])},
        tune_config=TuneConfig(search_alg=search, scheduler=_scheduler(blocks), reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id),
        run_config=RunConfig(
            name=f"blocks-{running.run}",
            storage_path="/nowhere",
            storage_filesystem=nowhere(),
            verbose=0,
            failure_config=FailureConfig(max_failures=MAX_FAILURES),  # an actor that dies is replaced; exceptions inside a block never get here
            checkpoint_config=CheckpointConfig(checkpoint_at_end=False),
            callbacks=[_counting(running, search, blocks), *running.trackers],
        ),
    )
    listening = signal.getsignal(signal.SIGUSR1)
    try:
        tuner.fit()
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, listening)  # Tune leaves its own, which listens no more


def _scheduler(blocks: Sequence[Block]) -> Any:
    """Return None, or for blocks that are judged Ray Tune's ASHA, one for each study: what is compared must be of one task, model and method."""
    judged = {block.name: block for block in blocks if block.judged}
    if not judged:
        return None
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

    class Studies(FIFOScheduler):
        def __init__(self) -> None:
            super().__init__()
            self.of_study: dict[tuple[str, ...], Any] = {}

        def of(self, trial: Any) -> Any:
            block = judged.get(trial.config["block"])
            if block is None:
                return FIFOScheduler()
            study = (block.draw.task, *map(str, (block.model.content_hash, block.spec, block.protocol, block.num_demonstrations, *block.trained()[0])))
            judged_by = block.judged
            assert judged_by is not None
            made: dict[str, Any] = {
                "time_attr": "judged_step",
                "metric": "judged",
                "mode": "min",
                "reduction_factor": judged_by.reduction_factor,
                "stop_last_trials": False,
            }
            if study not in self.of_study:
                asha: Any = ASHAScheduler(**made, grace_period=min(judged_by.steps), max_t=max(judged_by.steps))
                self.of_study[study] = asha
                for learning_rate, steps in itertools.groupby(judged_by.known, key=lambda one: one[0]):
                    before = SimpleNamespace(trial_id=f"{learning_rate:g}, before")
                    asha.on_trial_add(None, before)
                    for _, step, figure in steps:
                        asha.on_trial_result(None, before, {"judged_step": step, "judged": figure})
            return self.of_study[study]

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            self.of(trial).on_trial_add(controller, trial)

        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            action: str = self.of(trial).on_trial_result(controller, trial, result)
            return action if action == TrialScheduler.STOP else TrialScheduler.CONTINUE

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            self.of(trial).on_trial_complete(controller, trial, result)

        def on_trial_remove(self, controller: Any, trial: Any) -> None:
            self.of(trial).on_trial_remove(controller, trial)

    return Studies()


def _keep_secrets() -> None:
    """Let Tune not copy credentials of this process into the actors' runtime environment, which Ray logs; actors have those of their node."""
    from ray.tune.execution import class_cache

    class_cache.ENV_VARS_TO_PROPAGATE.difference_update([name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")])


def _counting(running: Running, search: Any, blocks: Sequence[Block]) -> Any:
    from ray.tune import Callback

    store, run, counts, resources = running.store, running.run, running.counts, running.resources
    by_name = {block.name: block for block in blocks}

    class Counting(Callback):
        """An exception in here would end the round."""

        def __init__(self) -> None:
            self.looked = self.had_room = time.monotonic()
            self.heard: dict[str, float] = {}  # trial -> when it last said something
            self.recovered: dict[str, int] = {}  # trial -> iteration in which its death was noted
            self.failures: dict[str, int] = {}  # trial -> deaths that Tune counts
            self.suspects: list[tuple[float, str, str, int]] = []  # time, node, block and number of deaths that may turn out to be the node's

        def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
            if time.monotonic() - self.looked < (ANSWER_SECONDS if running.newcomers.asked else NODES_SECONDS):
                return
            self.looked = time.monotonic()
            with contextlib.suppress(Exception):  # the head may be away for a moment
                self.look_at_nodes()
                self.end_silent(trials)

        def look_at_nodes(self) -> None:
            alive = {node["NodeID"] for node in nodes()}
            self.suspects = [suspect for suspect in self.suspects if self.looked - suspect[0] < NOTICED_SECONDS]
            for suspect in list(self.suspects):
                _, node, name, number = suspect
                if node and node not in alive and counts.deaths.get(name):
                    self.suspects.remove(suspect)
                    counts.deaths[name] -= 1
                    take_death_back(store, by_name[name], run, number)
                    say(f"{name}: its actor went with its node; that does not count against it")
            for sentence in running.newcomers.look():
                counts.deaths.clear()  # who knows which of them were that node's
                say(sentence)
            slots, now = num_slots(resources), self.looked
            if resources.max_actors is None and search.max_concurrent != max(1, slots):
                say(f"the cluster has room for {slots} actors now")
                search.max_concurrent = max(1, slots)
            counts.waits_for = "" if slots else "a node with room for an actor"
            self.had_room = now if slots else self.had_room
            if now - self.had_room > WAIT_SECONDS:
                running.stopped.ask(f"no node with room for an actor for {WAIT_SECONDS / 60:.0f} minutes")

        def end_silent(self, trials: list[Any]) -> None:
            import ray

            for trial in trials:
                if trial.status == "RUNNING" and self.looked - self.heard.setdefault(trial.trial_id, self.looked) > SILENT_SECONDS:
                    say(f"{trial.config['block']}: nothing heard of its actor for {SILENT_SECONDS / 60:.0f} minutes; it is ended")
                    del self.heard[trial.trial_id]
                    ray.kill(trial.temporary_state.ray_actor)

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.heard[trial.trial_id] = time.monotonic()

        def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
            self.heard[trial.trial_id] = time.monotonic()
            counts.take(result)
            if result["outcome"] == "unreachable":
                counts.again(result["block"], result["reason"], most=MAX_ROUNDS)
                if sentence := leave_out(result["node"], result["reason"]):
                    say(sentence)
            if counts.num_committed - counts.num_compacted >= COMPACT_EVERY:
                counts.num_compacted = counts.num_committed
                with contextlib.suppress(StoreError, Vanished, OSError):  # the compaction at the end tells of it
                    store.compact()

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if by_name[name := trial.config["block"]].judged and not trial.last_result["outcome"]:  # it did not end by itself
                _record(running, name, "stopped", BEHIND)
                counts.end(name, "stopped", BEHIND)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            self.recovered[trial.trial_id] = iteration
            self.note(trial)

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            name = trial.config["block"]
            if self.recovered.get(trial.trial_id) != iteration:  # else the same death, told twice
                self.note(trial)
            reason, num_deaths = _why(trial), counts.deaths.get(name, 0)
            if num_deaths > MAX_FAILURES:
                counts.end(name, "failed", f"its actor died {num_deaths} times: {reason}")
            else:  # Tune gives a block up whose actors went with their nodes, or died before they had begun
                counts.again(name, reason, most=MAX_ROUNDS)

        def note(self, trial: Any) -> None:
            name, before, reason = trial.config["block"], self.failures.get(trial.trial_id, 0), _why(trial)
            if trial.num_failures > before:  # no preemption with notice
                self.failures[trial.trial_id] = before + 1
                if "creation task" in reason:  # it never came to the block: a node that joined may be of no use
                    self.looked = 0.0
                elif "node has died" not in reason:  # else the block is not at fault
                    counts.deaths[name] = counts.deaths.get(name, 0) + 1
                    self.suspects.append((time.monotonic(), counts.running.get(name, {}).get("node", ""), name, counts.deaths[name]))
                    with contextlib.suppress(StoreError, OSError):
                        note_death(store, by_name[name], run, counts.deaths[name])
            say(f"{name}: its actor is gone{f' ({counts.deaths[name]} of {MAX_FAILURES + 1})' if counts.deaths.get(name) else ''}: {reason}")
            _record(running, name, "lost", reason)

    return Counting()


def _why(trial: Any) -> str:
    """Return why the actor of a trial died, in one line."""
    try:
        text = Path(trial.error_file).read_text().rpartition("Failure #")[2]
    except (OSError, TypeError, ValueError):
        return "unknown"
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip() and not line.startswith("\t")]
    return " ".join(dict.fromkeys([lines[0], lines[-1]]))[:500] if lines else "unknown"


def _record(running: Running, name: str, outcome: str, reason: str) -> None:
    """Leave an attempt record for an actor that could not leave its own."""
    last = running.counts.running.pop(name, {})
    attempt = {column: last.get(column, 0) for column in ("num_model_loads", "num_baselines", "num_lanes", "num_training_steps", "num_cells")}
    attempt |= {"block": name, "outcome": outcome, "reason": reason, "traceback": None, "run": running.run}
    attempt |= {"host": last.get("host", "unknown"), "actor": last.get("actor", "unknown")}
    attempt |= {column: last.get(column) for column in ("wall_seconds", "peak_gib", "cpus", "gpus", "gflops")}
    with contextlib.suppress(StoreError, OSError):
        running.store.record_attempt(attempt | {"created_at": datetime.datetime.now(datetime.UTC).isoformat()})
