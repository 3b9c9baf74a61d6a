"""A sweep to have accidents with: starts drivers, waits for what they commit, and holds the invariants I1 to I6 against a clean run without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from iclgd_dist import files
from iclgd_dist.actor import ModelHost
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import Plan, make_plan
from iclgd_dist.store import Results, Store, read_results, short_hash
from iclgd_dist.upkeep import verify
from tests.tiny import save_fruit

ICLGD = [sys.executable, "-m", "iclgd_dist.cli"]
SWEEP = """
name = "accident"
tasks = ["fruit"]
methods = ["accident", "layer_causal"]
seeds = {seeds}
num_demonstrations = 4
num_queries = 8
steps = [2, 4]

[learning_rates]
accident = {rates}
layer_causal = {rates}

[[method]]
name = "accident"
code = "accident.py:Accident"
options = {{ folder = "{folder}" }}

[[models]]
source = "model"

[[task]]
name = "fruit"
file = "fruit.csv"
template = "{template}"
labels = {{ sweet = "Yes", sour = "No" }}

[resources]
max_actors = {actors}
"""
MARGIN = 1e-4  # float32 where lanes regroup


class Case:
    """One sweep in a folder of its own, its store, and what was planned."""

    def __init__(self, folder: Path, model: Path, *, seeds: int = 6, rates: str = "[0.003, 0.05]", actors: int = 2) -> None:
        self.folder, self.file, self.store = folder, folder / "accident.toml", Store(folder / "store")
        self.sizes: dict[str, Any] = {"seeds": list(range(1, seeds + 1)), "rates": rates, "actors": actors, "template": "Is {text} sweet?"}
        if not (folder / "model").exists():
            (folder / "model").symlink_to(model)
        (folder / "accident.py").write_text((Path(__file__).parent / "accident.py").read_text())
        save_fruit(folder / "fruit.csv")
        self.write()
        self.drivers: list[subprocess.Popen[str]] = []
        self.facts: dict[str, Any] = {"injections": 0}

    def write(self, **sizes: Any) -> None:
        self.sizes |= sizes
        self.file.write_text(SWEEP.format(folder=self.folder, **self.sizes))

    def plan(self) -> Plan:
        return make_plan(load_sweep(self.file))

    def plot(self, *accidents: dict[str, Any]) -> None:
        """Say what will happen; what has happened before is forgotten."""
        self.settle()
        (self.folder / "accidents.json").write_text(json.dumps(accidents))

    def settle(self) -> None:
        """Hold that what was plotted has happened, count it, and forget it."""
        plotted = self.folder / "accidents.json"
        for number, accident in enumerate(json.loads(plotted.read_text()) if plotted.exists() else ()):
            happened = list(self.folder.glob(f"happened-{number}-*"))
            assert happened, f"never happened: {accident}"
            self.facts["injections"] += len(happened) if accident["what"] != "slow" else 0  # which only makes time for others
            for each in happened:
                each.unlink()
        plotted.unlink(missing_ok=True)

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [*ICLGD, "run", str(self.file), "--store", str(self.store.root), *arguments]
        driver = subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=os.environ | environment
        )
        self.drivers.append(driver)
        return driver

    def run(self, *arguments: str, code: int = 0, seconds: float = 300, **environment: str) -> str:
        driver = self.start(*arguments, **environment)
        said, _ = driver.communicate(timeout=seconds)
        assert driver.returncode == code, f"exit code {driver.returncode}, {code} expected:\n{said}"
        return said

    def share(self) -> None:
        """Let two drivers run the sweep at once, and hold that both worked and little was computed twice."""
        self.write(seeds=list(range(1, 9)), actors=1)
        self.plot({"what": "slow", "seconds": 0.3, "times": 100})
        for driver in [self.start(), self.start()]:
            said, _ = driver.communicate(timeout=300)
            assert driver.returncode == 0, said
        assert len({attempt["run"] for attempt in self.attempts("done") if attempt["num_cells"]}) == 2, "both worked"
        facts = self.check()
        assert facts["steps"] <= 1.1 * (facts["steps"] - facts["recomputed"])

    def wait(self, condition: Callable[[], Any], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not condition():
            for driver in self.drivers[-1:]:
                assert driver.poll() is None, driver.communicate()[0]
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.02)

    def committed(self) -> dict[str, str]:
        """Return the cells by key, each with the hash of the file it was committed as; loose ones that a compaction takes meanwhile are in its manifest."""
        found = {}
        for key, path in self.store.loose().items():
            with contextlib.suppress(files.Vanished):
                found[key] = short_hash(files.read(path))
        return found | self.store.manifest().commits

    def attempts(self, outcome: str | None = None) -> list[dict[str, Any]]:
        return [attempt for attempt in self.store.attempts().to_pylist() if outcome in (None, attempt["outcome"])]

    def num_steps(self) -> int:
        return sum(attempt["num_training_steps"] for attempt in self.attempts())

    def clean(self) -> tuple[Results, int]:
        """Return results and training steps of the same plan in one process, without Ray and without accidents."""
        root = self.folder / f"clean-{random.getrandbits(32):x}"
        Store(root).prepare()
        host = ModelHost(str(root), "clean", 1)
        for block in self.plan().blocks:
            *_, last = host.steps(block)
            assert last["outcome"] == "done", last
        return read_results(root), sum(attempt["num_training_steps"] for attempt in Store(root).attempts().to_pylist())

    def check(self, before: dict[str, str] | None = None, *, lost: set[str] | None = None, extra: bool = False) -> dict[str, Any]:
        """Hold I1 to I6 after the resume; `lost`: cells that cannot run here. Returns the line of the matrix."""
        self.settle()
        planned, found = set(self.plan().keys), verify(self.store)
        keys = read_results(self.store).cells["key"].to_pylist()
        committed = set(keys)
        lost = lost or set()
        self.facts |= {"planned": len(planned), "committed": len(committed & planned), "duplicated": len(keys) - len(committed)}
        self.facts |= {"lost": len(planned - committed - lost), "steps": self.num_steps()}
        assert planned - committed == lost, "I1"
        assert extra or not committed - planned, "I1"
        assert len(keys) == len(committed) and not found.duplicates, "I2"
        assert found.is_whole, found.damaged
        if before is not None:
            assert before and before.keys() <= committed, "I3"
            now = self.committed()
            assert all(now[key] == data for key, data in before.items()), "I4"
        clean, clean_steps = self.clean()
        self.facts["recomputed"] = max(0, self.facts["steps"] - clean_steps)
        same_results(read_results(self.store), clean, except_for=lost)
        if not lost:
            self.run()
            assert self.num_steps() == self.facts["steps"], "I6"
        return self.facts

    def end(self) -> None:
        for driver in self.drivers:
            if driver.poll() is None:
                os.killpg(driver.pid, 9)
                driver.wait()


def same_results(ours: Results, clean: Results, *, except_for: set[str] | None = None) -> None:
    """Hold I5: figures within 1e-4; predictions where the two best labels are further apart than that."""
    unclear = _unclear(clean)
    rows, expected = ({row["key"]: row for row in results.cells.to_pylist()} for results in (ours, clean))
    for key in expected.keys() - (except_for or set()):
        for name in ("status", "num_queries", "accuracy", "sim_aou", "sim_am", "update_ratio", "nll_label", "loss", "delta_norm"):
            got, wanted = rows[key][name], expected[key][name]
            if name == "accuracy" and key in unclear:
                continue
            assert got == wanted or np.isclose(got, wanted, rtol=MARGIN, atol=MARGIN), f"I5: {name} of {key[:8]}: {got}, {wanted}"
    for name in ("layers", "examples", "folds"):
        counts = [{key: n for key, n in zip(*_counted(getattr(results, name)), strict=True) if key in expected} for results in (ours, clean)]
        missing = except_for or set()
        assert counts[0] == {key: n for key, n in counts[1].items() if key not in missing}, f"I2: {name}"


def _counted(table: Any) -> tuple[list[str], list[int]]:
    keys, numbers = np.unique(np.array(table["key"].cast("string").to_pylist(), dtype=object).astype(str), return_counts=True)
    return keys.tolist(), numbers.tolist()


def _unclear(results: Results) -> set[str]:
    """Return the keys of cells with a query whose two best labels are so close that rounding may choose."""
    rows = results.examples.select(["key", "label_scores"]).to_pylist()
    return {row["key"] for row in rows if row["label_scores"] and np.diff(np.sort(row["label_scores"])[-2:])[0] <= MARGIN}
