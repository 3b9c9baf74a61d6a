"""Plans of a small sweep over two tasks and two models, without weights: a tokenizer of words and a made-up model stand in."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

from iclgd_dist import plan as planning
from iclgd_dist.blocks import Block
from iclgd_dist.config import ModelSpec, load_sweep
from iclgd_dist.plan import Plan, make_plan
from iclgd_dist.sources import ModelIdentity, SourceUnreachable

CONFIG = {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50, "max_position_embeddings": 512}
SWEEP = """
name = "tiny"
tasks = ["fruit", "stone"]
seeds = [3, 1]
orders = 2
num_demonstrations = [1, 4]
num_queries = 8
steps = [1, 2, 4]

[learning_rates]
vanilla = [1e-3, 1e-2, 1e-1]
layer_causal = [1e-3, 1e-2]

[[models]]
source = "first"

[[models]]
source = "second"
"""
FRUIT = """
[[task]]
name = "fruit"
file = "train.csv"
query_file = "queries.csv"
template = "Is {text} sweet?"
labels = { y = "Yes", n = "No" }
"""
STONE = FRUIT.replace('"fruit"', '"stone"').replace("sweet", "hard")


class Words:
    """A tokenizer whose tokens are words, hyphens apart; it counts how often it sees a text."""

    bos_token_id, eos_token_id, name_or_path = 0, 1, "words"

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self.seen: Counter[str] = Counter()

    def __call__(self, texts: list[str], *, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        assert split_special_tokens
        self.seen.update(texts)
        words = [re.findall(r"\n| ?[^\s-]+|-|\s", text) for text in texts]
        return {"input_ids": [[self.vocabulary.setdefault(word, len(self.vocabulary) + 2) for word in row] for row in words]}

    def decode(self, ids: list[int]) -> str:
        return "".join(word for number in ids for word, other in self.vocabulary.items() if other == number)


class Models:
    """What the plan learns of models: content by source, tokenizers, and which do not answer."""

    def __init__(self) -> None:
        self.content = {"first": "1" * 64, "second": "2" * 64}
        self.tokenizers: list[Words] = []
        self.silent: set[str] = set()

    def stand_in(self, patch: pytest.MonkeyPatch) -> Models:
        """Answer for all models that a plan asks for, while the patch lasts."""
        patch.setattr(planning, "identify", self.identify)
        patch.setattr(planning, "light_tokenizer", self.light_tokenizer)
        return self

    def identify(self, spec: ModelSpec, *, folder: Path) -> ModelIdentity:
        if spec.source in self.silent:
            raise SourceUnreachable(f"model {spec.source!r}: the hub cannot be reached")
        return ModelIdentity(spec.source, spec.source, self.content[spec.source], "llama", CONFIG, None)

    def light_tokenizer(self, identity: ModelIdentity) -> Words:
        self.tokenizers.append(Words())
        return self.tokenizers[-1]


def data_in(folder: Path) -> Path:
    for name, number in (("train", 30), ("queries", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((f"{name} fruit number {n}", "yn"[n % 2]) for n in range(number))])
    return folder


def planned(folder: Path, *changes: tuple[str, str], text: str = SWEEP + FRUIT + STONE, finished: Collection[str] = (), **options: Any) -> Plan:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "sweep.toml").write_text(text)
    return make_plan(load_sweep(folder / "sweep.toml"), finished, **options)


def points(plan: Plan) -> dict[tuple, str]:
    """Return the key of every grid point, in plain values."""
    found: dict[tuple, str] = {}
    for block in plan.blocks:
        for cell in block.cells:
            drawn = () if cell.kind == "zero_shot" else (block.num_demonstrations, block.seed, block.order)
            point = (block.model.source, block.draw.task, cell.kind, *drawn, cell.method, cell.learning_rate, cell.step)
            assert found.setdefault(point, cell.key) == cell.key
    return found


SMALL = [("seeds = [3, 1]", "seeds = [1]"), ("orders = 2", "orders = 1"), ("[1, 4]", "4"), ('\n[[models]]\nsource = "second"\n', "")]


ONE = [*SMALL, ('["fruit", "stone"]', '["fruit"]')]
SECTION = '[[task]]\nname = "fruit"'
REFERENCE_SPELLED = """sink = "bos"
separator = "eos"
leading_separator = false
record_position = "label"
truncation = "greedy"
order_rule = "separate"
demonstration_draw = "shuffled"
query_draw = "shuffled"
label_tokens = "separate"
line_breaks = "eos"
first_layer = "count"
undefined = "eps"
"""


def trained_on(block: Block) -> list[str]:
    return list(dict.fromkeys(train_on for _, train_on in block.trained()))


def with_section(section: str) -> tuple[str, str]:
    return SECTION, f"{section}\n\n{SECTION}"
