"""How work is packed changes no result: micro-batches, lanes at once, parts of the vocabulary, how a shared context is attended to and where weights rest are drawn
at random, for every family."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from iclgd_dist import losses, shared_attention
from iclgd_dist.block import run_block
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results
from tests import tiny
from tests.test_every_family import save
from tests.tiny import lm_for

MORE = """
[controls]
contexts = ["other_draw", "separator"]
train_on = ["true", "random_labels"]

[resources]
{resources}
"""
MACHINE = {"wall_seconds", "peak_gib", "lanes", "created_at"}
# float64; norms of most families are computed in float32 whatever the dtype, and round differently where a sum was ordered differently.
TOLERANCE = 1e-6
RANKED = 0.1  # a token that stands twice ties with itself in layer 0, and rounding decides which of the two comes first


def drawn(variant: str, number: int) -> tuple[str, int, int]:
    """Return the [resources] of a random packing, words of a part of the vocabulary, and of the shortest context that is attended to apart."""
    pick = random.Random(f"{variant}-{number}")
    lines = [f"tokens_per_batch = {pick.choice([1, 90, 400, 10_000])}"]
    lines += [f"lanes = {lanes}"] if (lanes := pick.choice([1, 2, 3, None])) else []
    lines += pick.choice([['device_map = "disk"'], ['device_map = "auto"', 'max_memory = { "cpu" = "150kB" }'], ['device_map = "cpu"']])
    return "\n".join(lines), pick.choice([5, 31, 1000]), pick.choice([1, 20])


def results_of(sweep: Path, text: str, root: Path) -> dict[str, list[dict[str, Any]]]:
    sweep.write_text(text)
    (block,) = make_plan(load_sweep(sweep)).blocks
    store = Store(root)
    store.prepare()
    run_block(lm_for(block), block, store)
    results = read_results(store)
    return {name: _rows(getattr(results, name)) for name in ("cells", "layers", "examples", "controls", "pairs")}


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows = table.drop_columns([name for name in table.column_names if name in MACHINE]).to_pylist()
    for row in rows:  # which of the two holds what compares them depends on which ran first
        if "cell_b" in row:
            row["cell_a"], row["cell_b"] = sorted((row["cell_a"], row["cell_b"]))
    return sorted(rows, key=lambda row: [str(value) for value in row.values() if not isinstance(value, float)])


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_results_do_not_depend_on_packing_offload_or_lanes(
    variant: str, sweep_file: Path, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(variant, tmp_path / variant, tiny_model)
    text = sweep_file.read_text().replace("seeds = [1, 2]", "seeds = [1]").replace('source = "model"', f'source = "{variant}"\ncompute_dtype = "float64"')
    text = text.replace("num_queries = 8", "num_queries = 4").replace("= [0.003, 0.05]", "= [0.003, 0.01, 0.05]")
    expected = results_of(sweep_file, text + MORE.format(resources=""), tmp_path / "plain")
    resources, words, worth = drawn(variant, 1)
    monkeypatch.setattr(shared_attention, "NUM_WORTH", worth)
    monkeypatch.setattr(losses, "WORDS", {"cpu": words})
    got = results_of(sweep_file, text + MORE.format(resources=resources), tmp_path / "packed")
    for table, rows in expected.items():
        assert len(got[table]) == len(rows) > 0
        for ours, theirs in zip(got[table], rows, strict=True):
            for name, value in theirs.items():
                is_rank = any(kind in f"{name} {theirs.get('metric')}" for kind in ("kendall", "topk"))
                assert is_same(ours[name], value, RANKED if is_rank else TOLERANCE), (table, name, resources, words, worth, ours[name], value)


def is_same(ours: Any, theirs: Any, tolerance: float) -> bool:
    if isinstance(theirs, list) and isinstance(ours, list):
        return len(ours) == len(theirs) and all(is_same(mine, other, tolerance) for mine, other in zip(ours, theirs, strict=True))
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(ours, theirs, rel_tol=TOLERANCE, abs_tol=tolerance)
    return bool(ours == theirs)
