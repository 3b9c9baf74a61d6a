"""`scale`: the real runner, store and claims under 64 actors that compute nothing: 20,000 cells whose blocks sleep as long as a cost model says.

Logical CPUs of one machine, no torch in an actor; rows are as large as those of 64 queries and 30 layers. Measured: the driver's CPU and memory, how long a commit
takes over the run (its first and last tenth), what the store is asked, and how long a driver takes from its start to the first report of the last block. Not a test.
"""

from __future__ import annotations

import argparse
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
from ray import tune

from iclgd_dist.blocks import Block
from iclgd_dist.claims import claimed
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results
from tests.benchmarks import store as stored

GOAL = {"driver_cores": 1.0, "driver_gib": 2.0, "slowdown": 0.2, "resume_seconds": 30.0}
RATES = [round(1e-4 * 3**n, 10) for n in range(4)]
STEPS = [1, 2, 4]
CELLS_OF_SEED = 1 + 2 * len(RATES) * len(STEPS)


class SimulatedActor(tune.Trainable):
    """Claims, sleeps, commits and records like ModelActor; imports no torch."""

    def setup(self, config: dict[str, Any], blocks: dict[str, Block] | None = None, store: str = "", run: str = "") -> None:
        assert blocks and "torch" not in sys.modules
        self.blocks, self.store, self.owner = blocks, Store(store), run
        self.sleep = float(os.environ["ICLGD_SIMULATED_SECONDS"])
        sizes = argparse.Namespace(layers=30, examples=64)
        self.rows = stored.made_up(["0" * 64] * 8, sizes, seed=os.getpid()).to_pylist()
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self.reports = self._steps(self.blocks[config["block"]])

    def _steps(self, block: Block) -> Generator[dict[str, Any], None, None]:
        start, done, took = time.perf_counter(), 0, list[tuple[float, float]]()
        with claimed(self.store, block, self.owner) as claim:
            assert claim is not None
            for number, cell in enumerate(block.cells):
                time.sleep(self.sleep)
                before = time.perf_counter()
                done += self.store.commit(self.rows[number % len(self.rows)] | {"key": cell.key})
                took.append((time.time(), time.perf_counter() - before))
                yield self._report(block, done, (number + 1) / len(block.cells), "")
        (Path(os.environ["ICLGD_SIMULATED_TIMES"]) / block.name).write_text("\n".join(f"{at} {seconds}" for at, seconds in took))
        attempt = dict.fromkeys(("num_model_loads", "num_baselines", "num_lanes", "num_training_steps"), 0)
        attempt |= {"block": block.name, "outcome": "done", "host": "simulated", "actor": str(os.getpid()), "run": self.owner, "num_cells": done}
        created = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.store.record_attempt(attempt | {"wall_seconds": time.perf_counter() - start, "cpus": 1, "gpus": 0, "created_at": created})
        yield self._report(block, done, 1.0, "done")

    def _report(self, block: Block, done: int, fraction: float, outcome: str) -> dict[str, Any]:
        report = {"block": block.name, "fraction": fraction, "stage": "asleep", "num_cells": done, "outcome": outcome, "reason": "", "gflops": 0.0}
        return report | {"actor": str(os.getpid()), "node": ""}

    def step(self) -> dict[str, Any]:
        start = time.perf_counter()
        for report in self.reports:
            if report["outcome"]:
                return report | {"done": True}
            if time.perf_counter() - start > 1.0:
                return report
        raise AssertionError("a block ended without an outcome")

    def cleanup(self) -> None:
        self.reports.close()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        pass

    def load_checkpoint(self, checkpoint: Any) -> None:
        pass


def run(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"cells": 20_000, "actors": 64, "seconds": 600}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    os.environ["ICLGD_SIMULATED_SECONDS"] = str(options.seconds * options.actors / options.cells)
    os.environ["PYTHONPATH"] = str(stored.ROOT)
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(prefix="iclgd-scale-") as name:
        folder = Path(name)
        os.environ["ICLGD_CACHE"] = str(folder / "cache")
        os.environ["ICLGD_SIMULATED_TIMES"] = str(folder / "times")  # actors have the environment of their node, which starts below
        sweep, root = _save_sweep(folder, options), folder / "store"
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": options.actors, "node_ip_address": "127.0.0.1", "include_dashboard": False})
        try:
            driver = _driven(sweep, root, cluster.address)
            results = read_results(root)
            planned = len(set(make_plan(load_sweep(sweep)).keys))
            assert len(results.cells) == planned, f"{len(results.cells)} of {planned}"
            _forget_one_block(root)
            resumed = _driven(sweep, root, cluster.address)
        finally:
            cluster.shutdown()
    commits = driver["commits"]
    tenth = max(1, len(commits) // 10)
    first, last = (statistics.median(part) for part in (commits[:tenth], commits[-tenth:]))
    value = {
        "driver_cores": driver["cpu_seconds"] / driver["seconds"],
        "driver_gib": driver["peak_gib"],
        "slowdown": last / first - 1,
        "resume_seconds": resumed["until_first_report"],
    }
    return {
        "value": value,
        "goal": GOAL,
        "holds": all(value[name] <= goal for name, goal in GOAL.items()),
        "num_cells": planned,
        "num_actors": len(set(results.attempts["actor"].to_pylist())),
        "seconds": driver["seconds"],
        "cells_per_second": planned / driver["seconds"],
        "commit_seconds": {"first_tenth": first, "last_tenth": last},
        "seconds_of_resumed_run": resumed["seconds"],
    }


def _save_sweep(folder: Path, options: argparse.Namespace) -> Path:
    from tests.tiny import save_tiny, save_tokenizer

    save_tiny(folder / "model", save_tokenizer(folder / "model"))
    rows = [f"note {number},{'good' if number % 2 else 'bad'}" for number in range(400)]
    (folder / "notes.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    text = stored.SWEEP.format(seeds=list(range(1, 1 + -(-options.cells // CELLS_OF_SEED))), queries=64, rates=RATES)
    path = folder / "stored.toml"
    path.write_text(text.replace("steps = [1, 2, 4, 6, 8, 12, 16]", f"steps = {STEPS}"))
    return path


def _driven(sweep: Path, root: Path, address: str) -> dict[str, Any]:
    """Run the sweep in a driver of its own and return what it cost."""
    times = Path(os.environ["ICLGD_SIMULATED_TIMES"])
    times.mkdir(exist_ok=True)
    for old in times.iterdir():
        old.unlink()
    start = time.perf_counter()
    command = [sys.executable, "-m", "tests.benchmarks.scale", str(sweep), str(root), address]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=stored.ROOT)
    watched, figures, ended = psutil.Process(driver.pid), {"cpu_seconds": 0.0, "peak_gib": 0.0}, threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            try:
                with watched.oneshot():
                    spent = watched.cpu_times()
                    figures["cpu_seconds"] = spent.user + spent.system
                    figures["peak_gib"] = max(figures["peak_gib"], watched.memory_info().rss / 2**30)
            except psutil.Error:
                return

    thread = threading.Thread(target=watch)
    thread.start()
    first, said = 0.0, driver.stdout
    assert said is not None
    for line in said:
        print(line, end="", file=sys.stderr, flush=True)
        if line.startswith("first report") and not first:
            first = time.perf_counter() - start
    assert driver.wait() == 0
    ended.set()
    thread.join()
    lines = sorted(tuple(map(float, line.split())) for path in times.iterdir() for line in path.read_text().splitlines())
    return figures | {"seconds": time.perf_counter() - start, "until_first_report": first, "commits": [seconds for _, seconds in lines]}


def _forget_one_block(root: Path) -> None:
    from iclgd_dist import upkeep

    store = Store(root)
    upkeep.forget(store, sorted(store.keys())[:1])


def _drive(sweep: str, root: str, address: str) -> int:
    """Be a driver of simulated actors."""
    from rich.console import Console

    import iclgd_dist

    simulated: Any = types.ModuleType("iclgd_dist.actor")
    simulated.ModelActor = SimulatedActor
    sys.modules["iclgd_dist.actor"] = iclgd_dist.actor = simulated
    from iclgd_dist import progress, runner

    take = progress.Counts.take

    def told(self: progress.Counts, report: dict[str, Any]) -> None:
        if not self.fractions:
            print("first report", flush=True)
        take(self, report)

    progress.Counts.take = told  # type: ignore[method-assign]
    loaded, store = load_sweep(sweep), Store(root)
    planned = make_plan(loaded, store.keys())
    store.prepare()
    store.save_sweep(digest=loaded.digest(), resolved=loaded.resolved(), keys=list(planned.keys))
    return runner.run_sweep(loaded, planned, store, address=address, console=Console(highlight=False))


if __name__ == "__main__":
    # The module by its own name: actors look the class up there.
    from tests.benchmarks import scale

    sys.exit(scale._drive(*sys.argv[1:]))
