"""Orders crossed against numpy on the captures that were kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from iclgd_dist import captures
from iclgd_dist.block import run_block
from iclgd_dist.config import SweepError, load_sweep
from iclgd_dist.orders import cross_orders
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store, read_results
from tests.test_block import lm_for
from tests.test_extras import CAPTURE, changed

ORDERS = "[measures]\norders = true\n"


def three_orders(path: Path, more: str = ORDERS + CAPTURE) -> Path:
    changed(path, more)
    path.write_text(path.read_text().replace("seeds = [1]", "seeds = [1]\norders = 3"))
    return path


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def test_finetuning_in_an_order_is_compared_with_icl_in_each_order(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    blocks = make_plan(load_sweep(three_orders(sweep_file))).blocks
    lm = lm_for(blocks[0])
    for block in blocks:
        run_block(lm, block, store)
    whole = make_plan(load_sweep(sweep_file)).blocks
    assert cross_orders(store, read_results(store), whole) == 3 * 8
    results = read_results(store)
    assert cross_orders(store, results, whole) == 0, "each cell is measured once"
    cells = results.cells.to_pylist()

    def kept(**wanted: Any) -> tuple[str, captures.Capture]:
        (row,) = [row for row in cells if all(row[name] == value for name, value in wanted.items())]
        found = captures.recall(store, row["key"], row["capture_sha256"])
        assert found is not None
        return row["key"], found

    _, zero_shot = kept(kind="zero_shot")
    icl = [kept(kind="icl", order=order)[1].attention_LQD - zero_shot.attention_LQD for order in range(3)]
    scores = [kept(kind="icl", order=order)[1].scores_LQHT - zero_shot.scores_LQHT for order in range(3)]
    key, finetuned = kept(kind="finetuned", method="vanilla", learning_rate=0.05, step=4, order=1)
    ours = {(row["metric"], row["fold"]): row["mean"] for row in results.extras.to_pylist() if row["cell"] == key}
    in_a = np.array([query.fold == "A" for query in whole[0].draw.queries])
    for fold, mask in (("all", in_a | True), ("A", in_a), ("B", ~in_a)):
        change = finetuned.attention_LQD - zero_shot.attention_LQD
        of_order = [cosine(change.numpy(), each.numpy()).mean(where=mask) for each in icl]
        expected = {"same_order": of_order[1], "other_order": (of_order[0] + of_order[2]) / 2}
        assert {name: ours[f"sim_aou_{name}", fold] for name in expected} == pytest.approx(expected, abs=1e-9)
        assert ours["order_match_sim_aou", fold] == pytest.approx(expected["same_order"] - expected["other_order"], abs=1e-9)
        # Layer 0 of a model with relative positions cannot change its scores.
        moved = (finetuned.scores_LQHT - zero_shot.scores_LQHT)[1:]
        of_order = [cosine(moved.numpy(), each[1:].numpy()).mean(-1).mean(where=mask) for each in scores]
        assert ours["order_match_sim_am_delta", fold] == pytest.approx(of_order[1] - (of_order[0] + of_order[2]) / 2, abs=1e-9)
    assert not torch.equal(icl[0], icl[1])


def test_orders_are_crossed_where_there_are_several_and_captures_are_kept(sweep_file: Path) -> None:
    three_orders(sweep_file, ORDERS)
    with pytest.raises(SweepError, match=r'capture.keep must be "final_step" or "all" where \[measures\] orders = true, got "none"'):
        load_sweep(sweep_file)
    sweep_file.write_text(sweep_file.read_text().replace("orders = 3\n", "") + CAPTURE)
    with pytest.raises(SweepError, match=r"measures\.orders compares orders of the same seed, got one order for each; raise orders"):
        load_sweep(sweep_file)
