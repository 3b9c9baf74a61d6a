"""Blocks: their parts, what they cost, and which captures they keep."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iclgd_dist.blocks import Block, halve, split, with_cells
from iclgd_dist.config import Resources
from iclgd_dist.encoding import encode
from tests.plans import FRUIT, ONE, SMALL, SWEEP, Models, planned, trained_on, with_section


def four_lanes(folder: Path) -> Block:
    (block,) = planned(folder, *SMALL, ('["fruit", "stone"]', '["fruit"]'), ("[1e-3, 1e-2]", "[1e-3, 1e-2, 1e-1, 1]")).blocks
    return block


@pytest.mark.parametrize("num_actors", [1, 2, 3, 4, 9])
def test_splitting_keeps_every_cell_once_and_a_learning_rate_of_both_methods_together(folder: Path, num_actors: int) -> None:
    block = four_lanes(folder)
    parts = split([block], num_actors)
    assert len(parts) == min(num_actors, 4)
    assert sorted(cell.key for part in parts for cell in part.cells) == sorted(cell.key for cell in block.cells)
    homes = {(cell.learning_rate, number) for number, part in enumerate(parts) for cell in part.cells if cell.learning_rate is not None}
    assert len(homes) == 4
    assert len({part.name for part in parts}) == len(parts)
    repeated = (len(parts) - 1) * block.cost.baseline_flops
    assert sum(part.cost.flops for part in parts) == pytest.approx(block.cost.flops + repeated)
    assert sum(part.cost.training_tokens for part in parts) == pytest.approx(block.cost.training_tokens, abs=len(parts))
    assert (
        block.cost.capture_tokens - len(parts)
        <= sum(part.cost.capture_tokens for part in parts)
        < block.cost.capture_tokens * (1 if len(parts) == 1 else len(parts)) + 1
    )


def test_splitting_also_parts_what_is_trained_on(folder: Path) -> None:
    section = with_section('[controls]\ntrain_on = ["true", "random_labels", "shuffled_words"]')
    (block,) = planned(folder, *ONE, section, ("[1e-3, 1e-2, 1e-1]", "[1e-3]"), ("[1e-3, 1e-2]", "[1e-3]")).blocks
    parts = split([block], 9)
    assert sorted(trained_on(part) for part in parts) == [["random_labels"], ["shuffled_words"], ["true"]]
    assert sorted(cell.key for part in parts for cell in part.cells) == sorted(cell.key for cell in block.cells)


def test_splitting_halves_the_largest_block_that_has_more_than_one_learning_rate(folder: Path) -> None:
    wide = four_lanes(folder)
    narrow = halve(halve(wide)[0])[0]
    assert halve(narrow) == (narrow,)
    dear = replace(narrow, name="dear", cost=replace(narrow.cost, flops=1e30))
    parts = split([dear, wide], 4)
    assert len(parts) == 4
    assert parts[0] == dear
    assert split([dear], 8) == (dear,)
    assert split([], 8) == ()


def test_a_block_with_other_cells_is_named_and_costed_anew(folder: Path, models: Models) -> None:
    block = four_lanes(folder)
    encoded = encode(block.draw, models.tokenizers[-1], protocol=block.protocol, max_positions=512)
    fewer = with_cells(block, tuple(cell for cell in block.cells if cell.method != "vanilla"), encoded)
    assert fewer.learning_rates("vanilla") == []
    assert fewer.learning_rates("layer_causal") == [1e-3, 1e-2, 1e-1, 1]
    assert fewer.steps("layer_causal") == [1, 2, 4]
    assert fewer.name != block.name
    assert fewer.cost.baseline_flops == block.cost.baseline_flops
    assert with_cells(fewer, block.cells, encoded) == block
    on_disk = with_cells(replace(block, resources=Resources(device_map="disk")), block.cells, encoded)
    assert on_disk.cost.peak_gib < block.cost.peak_gib and on_disk.cost.flops == block.cost.flops


def test_cost_grows_with_lanes_steps_and_queries(folder: Path) -> None:
    def cost(*changes: tuple[str, str]) -> Any:
        (block,) = planned(folder, *SMALL, ('["fruit", "stone"]', '["fruit"]'), ("[1e-3, 1e-2, 1e-1]", "[1e-3]"), *changes).blocks
        return block.cost

    one, lanes = cost(), cost(("vanilla = [1e-3]", "vanilla = [1e-3, 1e-2, 1e-1, 1]"))
    assert lanes.training_tokens > one.training_tokens
    assert lanes.capture_tokens > one.capture_tokens
    assert lanes.flops > one.flops
    assert lanes.peak_gib > one.peak_gib
    assert lanes.baseline_flops == one.baseline_flops
    assert cost(("[1, 2, 4]", "[4]")).flops < one.flops
    assert cost(("[1, 2, 4]", "[4]")).training_tokens == one.training_tokens
    assert cost(("num_queries = 8", "num_queries = 16")).capture_tokens > one.capture_tokens


def test_training_tokens_are_the_demonstrations_tokens_times_the_learning_rates(folder: Path) -> None:
    block = four_lanes(folder)
    # sink, newline, "Is train fruit number N sweet? Yes": 9 tokens; 4 demonstrations; 3 and 4 learning rates.
    assert block.cost.training_tokens == 4 * 9 * (3 + 4)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("none", set()),
        ("final_step", {("zero_shot", None), ("icl", None), ("finetuned", 4)}),
        ("all", {("zero_shot", None), ("icl", None), *(("finetuned", step) for step in (1, 2, 4))}),
    ],
)
def test_captures_are_kept_of_the_cells_that_the_file_asks_for(folder: Path, keep: str, kept: set[tuple[str, int | None]]) -> None:
    changes = [*SMALL, ('["fruit", "stone"]', '["fruit"]')]
    (block,) = planned(folder, *changes, text=SWEEP + f'[capture]\nkeep = "{keep}"\n' + FRUIT).blocks
    assert {(cell.kind, cell.step) for cell in block.cells if cell.is_kept} == kept
    assert all(cell.is_kept == ((cell.kind, cell.step) in kept) for cell in block.cells)
    # 3 layers, width 8, 2 heads, 8 queries, 2 labels; 4 demonstrations of 7 tokens, "Is train fruit number N sweet? Yes".
    assert block.cost.capture_bytes == 4 * 3 * 8 * (8 + 2 * max_tokens(block) + 4 * 7) + 8 * 8 * 2


def max_tokens(block: Block) -> int:
    return max(len(re.findall(r"[^\s-]+|-", query.prompt)) for query in block.draw.queries)
