"""ModelActor: the Tune trial that holds one model and runs blocks on it, one after another.

Knows Ray Tune's Trainable, models and blocks. Knows nothing of sweeps. Results go to the store from here; Tune sees counts only.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import time
import traceback
import uuid
from collections.abc import Generator
from dataclasses import replace
from typing import Any

from ray import get_runtime_context, tune

from iclgd_dist.block import Progress, block_steps
from iclgd_dist.blocks import Block, Cell
from iclgd_dist.claims import claimed, num_deaths, unreachable
from iclgd_dist.loading import load_model
from iclgd_dist.machine import is_out_of_memory, matmul_gflops, set_num_threads, without_gpus
from iclgd_dist.measures import MetricError
from iclgd_dist.model import LanguageModel
from iclgd_dist.provenance import peak_gib
from iclgd_dist.store import Store, StoreError

REPORT_SECONDS = 1.0
LOADING = "loading the model"
SILENT_SECONDS = 3600.0  # without a piece of work done, after which another driver may take a block over


class ModelHost:
    """Holds at most one model and runs blocks on it; swaps it when a block needs another. No Ray."""

    def __init__(self, store: str, run: str, num_threads: int, *, node: str = "") -> None:
        """`node`: id of the cluster's node; then the store has to be the one that the driver of the run means."""
        set_num_threads(num_threads)
        self.store, self.run, self.node = Store(store), run, node
        self.problem: str | None = None if node else ""  # what keeps this node from the store or from its GPUs; None: not known yet
        self.actor = f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}"
        self.held: tuple[str, ...] | None = None
        self.lm: LanguageModel | None = None
        self.gflops = matmul_gflops()
        self.moved = time.monotonic()  # when a piece of work was last done
        self.since = time.perf_counter()

    def steps(self, block: Block) -> Generator[dict[str, Any], None, None]:
        """Run a block, yielding counts between pieces of work; the last one has `outcome`. Every execution leaves an attempt record.

        What cannot be run here leaves its cells pending.
        """
        if self.problem is None:
            self.problem = unreachable(self.store, self.run) or without_gpus(block.resources.gpus_per_actor)
        if self.problem:  # what is written here would be lost, or computed on the CPU without a word
            yield self._report(block, Progress(block.cost.flops)) | {"outcome": "unreachable", "reason": self.problem}
            return
        try:
            if not self._missing(block):
                yield from self._run(block)
                return
            with claimed(self.store, block, self.run, lives=lambda: time.monotonic() - self.moved < SILENT_SECONDS) as is_ours:
                if is_ours:
                    yield from self._run(_with_fewer_lanes(block, num_deaths(self.store, block, self.run)))
                    return
            yield self._report(block, Progress(block.cost.flops).at("elsewhere")) | {"outcome": "elsewhere", "reason": "another driver computes it"}
        except StoreError as error:  # before anything could be computed, or recorded
            yield self._report(block, Progress(block.cost.flops)) | self._trouble(error)

    def _missing(self, block: Block) -> tuple[Cell, ...]:
        """Return what is to be computed. Some may be there by now: from another driver, or from before this actor was restarted."""
        keys = set() if block.is_measuring else self.store.keys()
        return tuple(cell for cell in block.cells if cell.key not in keys)

    def _run(self, block: Block) -> Generator[dict[str, Any], None, None]:
        self.since = time.perf_counter()
        missing = self._missing(block)
        block = replace(block, cells=missing)
        counts = Progress(block.cost.flops)
        num_loads, outcome, reason, trace = 0, "interrupted", "the run was stopped", ""
        trouble: StoreError | None = None
        try:
            if missing:
                if self._needs_another_model(block):
                    yield self._report(block, counts.at(LOADING))
                    self._load(block)
                    num_loads = 1
                assert self.lm is not None
                for counts in block_steps(self.lm, block, self.store):
                    yield self._report(block, counts)
        except Exception as error:
            trace = traceback.format_exc()
            outcome = "oom" if is_out_of_memory(error) else "storage" if isinstance(error, StoreError) else "failed"
            outcome = "metric" if isinstance(error, MetricError) else outcome
            trouble = error if isinstance(error, StoreError) else None
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        else:
            outcome, reason = "done", ""
        finally:
            if missing and not (counts.judged and outcome == "interrupted"):  # then a scheduler stopped it, and the driver says so
                self._record(block, counts, outcome=outcome, reason=reason or None, traceback=trace or None, num_model_loads=num_loads)
        if trouble:
            yield self._report(block, counts) | self._trouble(trouble)
            return
        is_whole = block.is_measuring or not self._missing(block)
        if outcome not in ("metric", "done") and is_whole and not block.is_measuring:
            outcome = "done"  # by another driver, meanwhile
        if outcome == "done":
            outcome, reason = ("done", "") if is_whole else ("failed", f"{block.name}: a method yielded no probe for some of its steps")
        yield self._report(block, counts.at(outcome)) | {"outcome": outcome, "reason": reason}

    def _trouble(self, error: StoreError) -> dict[str, str]:
        """Return the outcome of a block that met trouble with the store: this node's, which does not reach it any more, or the store's own."""
        self.problem = unreachable(self.store, self.run) if self.node else ""
        return {"outcome": "unreachable" if self.problem else "storage", "reason": self.problem or str(error)}

    def _record(self, block: Block, counts: Progress, *, outcome: str, **more: Any) -> None:
        made = self._described(block, counts) | {"outcome": outcome, "run": self.run}
        made |= {"created_at": datetime.datetime.now(datetime.UTC).isoformat()}
        with contextlib.suppress(StoreError) if outcome != "done" else contextlib.nullcontext():  # a full store takes no record of that either
            self.store.record_attempt(made | more)

    def _needs_another_model(self, block: Block) -> bool:
        return self.held != _model_key(block)

    def _load(self, block: Block) -> None:
        self.lm, self.held = None, None  # the old one goes before the new one comes
        self.lm = load_model(block)
        self.held = _model_key(block)

    def _described(self, block: Block, counts: Progress) -> dict[str, Any]:
        """Return the columns of an attempt that are known while it runs."""
        self.moved = time.monotonic()
        made: dict[str, Any] = {"block": block.name, "host": platform.node(), "actor": self.actor, "gflops": self.gflops, "peak_gib": peak_gib()}
        made["wall_seconds"] = time.perf_counter() - self.since
        made |= {name: getattr(counts, name) for name in ("num_baselines", "num_lanes", "num_training_steps", "num_cells")}
        return made | {"cpus": block.resources.cpus_per_actor, "gpus": block.resources.gpus_per_actor}

    def _report(self, block: Block, counts: Progress) -> dict[str, Any]:
        fraction = counts.done_flops / counts.total_flops if counts.total_flops else 1.0
        # Tune's callbacks take timesteps_total for the place of a point.
        tracked = {"figures": counts.figures, "timesteps_total": counts.step} if counts.figures else {}
        judged = dict(zip(("judged_step", "judged"), counts.judged, strict=True)) if counts.judged else {}
        return self._described(block, counts) | {"fraction": fraction, "stage": counts.stage, "outcome": "", "node": self.node} | judged | tracked


def _with_fewer_lanes(block: Block, num_deaths: int) -> Block:
    """Return the block with half as many learning rates at once for each actor that died over it: what killed them may have been the memory they took."""
    if not num_deaths:
        return block
    widest = max((len(block.learning_rates(*trained)) for trained in block.trained()), default=1)
    limit = widest if block.resources.lanes == "auto" else min(widest, block.resources.lanes)
    return replace(block, resources=block.resources.model_copy(update={"lanes": max(1, limit >> num_deaths)}))


def _model_key(block: Block) -> tuple[str, ...]:
    spec, resources = block.spec, block.resources
    weights = (block.model.content_hash, spec.init, spec.init_scheme, str(spec.init_seed), block.storage_dtype)
    return (*weights, spec.compute_dtype, str((spec.tf32, spec.deterministic)), str(resources.device_map), str(resources.max_memory))


class ModelActor(tune.Trainable):
    """A Tune trial is a block; `reuse_actors` keeps this process, and the model in it, for the next one."""

    def setup(self, config: dict[str, Any], blocks: dict[str, Block] | None = None, store: str = "", run: str = "") -> None:
        assert blocks, "blocks travel beside the configuration, which Tune would write out"
        self.blocks = blocks
        first = blocks[config["block"]]
        self.host = ModelHost(store, run, first.resources.cpus_per_actor, node=get_runtime_context().get_node_id())
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self.reports.close()  # a scheduler may have stopped the block before its end
        self._take(new_config)
        return True  # False would kill this process and the model with it

    def _take(self, config: dict[str, Any]) -> None:
        self.reports = self.host.steps(self.blocks[config["block"]])

    def step(self) -> dict[str, Any]:
        """Work for about a second, then report counts."""
        start = time.perf_counter()
        for report in self.reports:
            if report["outcome"]:
                self.reports.close()  # gives its claims back
                return report | {"done": True}
            if report["stage"] == LOADING or report.keys() & {"judged", "figures"} or time.perf_counter() - start > REPORT_SECONDS:
                return report
        raise AssertionError("a block ended without an outcome")

    def cleanup(self) -> None:
        self.reports.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Keep nothing: the store is the record."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Restore nothing: what is in the store is not run again."""
