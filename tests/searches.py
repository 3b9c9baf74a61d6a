"""What tests of the search use: a store that is made up, and the tiny sweep with a scheduler that may stop a learning rate early."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from iclgd_dist.blocks import Cell
from iclgd_dist.config import Sweep
from iclgd_dist.plan import Plan
from iclgd_dist.search import Study, rounds, studies_of

ASHA = """
[resources]
max_actors = 1

[[method]]
name = "wide"
base = "vanilla"
weights = "all_linear"

[search]
samples = 6
scheduler = "asha"
{more}
[search.learning_rates]
wide = [1e-4, {highest}]
"""


def stopped_early(text: str, more: str = 'sampler = "grid"', highest: float = 0.1) -> str:
    """Return the tiny sweep with one seed and one method, whose learning rates a scheduler may stop after a step of three."""
    changes = {"seeds = [1, 2]": 'seeds = [1]\nmethods = ["wide"]', "steps = [2, 4]": "steps = [1, 2, 4]", "layer_causal = [0.003, 0.05]\n": ""}
    changes["vanilla = [0.003, 0.05]"] = "wide = [0.003]"
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text + ASHA.format(more=more, highest=highest)


def bowl(cell: Cell, seed: int, num_queries: int) -> float:
    """Return a loss with its best at 4e-3 (vanilla) or 1e-3, as flat and as steep as a real one; another seed is a little different."""
    assert cell.learning_rate is not None and cell.step is not None
    away = math.log10(cell.learning_rate / (4e-3 if cell.method == "vanilla" else 1e-3))
    return 0.5 + 0.12 * min(away**2, 4.0) + 0.02 / cell.step + 0.001 * seed


class Made:
    """A store that is made up: a cell is there once it was planned, with a figure of our own."""

    def __init__(self, figure: Callable[[Cell, int, int], float | None], fails: Callable[[Cell], bool] = lambda cell: False) -> None:
        self.figure, self.fails = figure, fails
        self.cells: dict[str, tuple[Cell, int, int]] = {}
        self.plans: list[Plan] = []
        self.stopped: set[str] = set()
        self.ends_after = 10**9
        self.accuracies = {"zero_shot": 0.6, "icl": 0.6}

    def run(self, plan: Plan, said: str) -> int:
        self.plans.append(plan)
        for block in plan.blocks:
            assert block.origin == "search"
            for cell in block.cells:
                if not self.fails(cell):
                    self.cells[cell.key] = (cell, block.seed, len(block.draw.queries))
        return 75 if len(self.plans) >= self.ends_after else 0

    def judge(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, float | None]]:
        found = {}
        for key in keys:
            if key in self.cells:
                cell, seed, num_queries = self.cells[key]
                trained = cell.kind == "finetuned"
                found[key] = {
                    "nll_label": self.figure(cell, seed, num_queries) if trained else 0.7,
                    "balanced_accuracy": (0.8 if cell.learning_rate < 2e-3 else 0.5) if trained else self.accuracies[cell.kind],
                }
        return found

    def search(self, sweep: Sweep) -> list[Study]:
        studies = studies_of(sweep)
        for code in rounds(sweep, studies, lambda: set(self.cells), self.judge, self.run, lambda: self.stopped):
            if code:
                break
        return studies

    @property
    def num_finetuned(self) -> int:
        return sum(cell.kind == "finetuned" for cell, _, _ in self.cells.values())
