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
from tests.test_extras import CAPTURE, changed
from tests.tiny import lm_for

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
    assert cross_orders(store, read_results(store), whole) == (3 * 8, 0)
    results = read_results(store)
    assert cross_orders(store, results, whole) == (0, 0), "each cell is measured once"
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
    ours = {(row["group"], row["metric"], row["fold"]): row["mean"] for row in results.extras.to_pylist() if row["cell"] == key}
    assert len(ours) == 3 * 2 * 3
    in_a = np.array([query.fold == "A" for query in whole[0].draw.queries])
    for fold, mask in (("all", in_a | True), ("A", in_a), ("B", ~in_a)):
        change = finetuned.attention_LQD - zero_shot.attention_LQD
        for order, each in enumerate(icl):
            assert ours[f"order:{order}", "sim_aou", fold] == pytest.approx(cosine(change.numpy(), each.numpy()).mean(where=mask), abs=1e-9)
        # Layer 0 of a model with relative positions cannot change its scores.
        moved = (finetuned.scores_LQHT - zero_shot.scores_LQHT)[1:]
        for order, each in enumerate(scores):
            assert ours[f"order:{order}", "sim_am_delta", fold] == pytest.approx(cosine(moved.numpy(), each[1:].numpy()).mean(-1).mean(where=mask), abs=1e-9)
    assert not torch.equal(icl[0], icl[1])


def test_orders_that_come_later_are_added_and_cells_without_captures_are_counted(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    three_orders(sweep_file)
    text = sweep_file.read_text().replace("vanilla = [0.003, 0.05]", "vanilla = [0.05]").replace("layer_causal = [0.003, 0.05]", "layer_causal = [0.003]")
    sweep_file.write_text(text.replace("orders = 3", "orders = 2"))
    sweep = load_sweep(sweep_file)
    blocks = make_plan(sweep).blocks
    lm = lm_for(blocks[0])
    run_block(lm, blocks[0], store)
    assert cross_orders(store, read_results(store), blocks) == (4, 4), "ICL in the other order is not there yet"
    run_block(lm, blocks[1], store)
    assert cross_orders(store, read_results(store), blocks) == (8, 0), "the first four lacked one order"
    for path in Path(str(store.root), "captures").glob(f"{blocks[1].cells[-1].key}*"):
        path.unlink()
    sweep_file.write_text(text)
    whole = make_plan(load_sweep(sweep_file)).blocks
    (last,) = make_plan(load_sweep(sweep_file), store.keys()).blocks
    run_block(lm, last, store)
    assert cross_orders(store, read_results(store), whole) == (7 + 4, 1)
    rows = read_results(store).extras.to_pylist()
    assert len({(row["cell"], row["group"], row["metric"], row["fold"]) for row in rows}) == len(rows)


def test_earlier_steps_whose_captures_nobody_keeps_are_not_missed(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    three_orders(sweep_file, ORDERS + CAPTURE.replace('"all"', '"final_step"'))
    assert 'keep = "final_step"' in sweep_file.read_text() and "steps = [2, 4]" in sweep_file.read_text()
    blocks = make_plan(load_sweep(sweep_file)).blocks
    lm = lm_for(blocks[0])
    for block in blocks:
        run_block(lm, block, store)
    assert cross_orders(store, read_results(store), make_plan(load_sweep(sweep_file)).blocks) == (3 * 4, 0)


def test_the_same_order_twice_is_no_other_order(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    three_orders(sweep_file)
    sweep_file.write_text(sweep_file.read_text().replace("num_demonstrations = 4", "num_demonstrations = 1").replace("steps = [2, 4]", "steps = [1]"))
    blocks = make_plan(load_sweep(sweep_file)).blocks
    lm = lm_for(blocks[0])
    for block in blocks:
        run_block(lm, block, store)
    assert cross_orders(store, read_results(store), make_plan(load_sweep(sweep_file)).blocks) == (0, 0)


def test_orders_are_crossed_where_there_are_several_and_captures_are_kept(sweep_file: Path) -> None:
    three_orders(sweep_file, ORDERS)
    with pytest.raises(SweepError, match=r'capture.keep must be "final_step" or "all" where \[measures\] orders = true, got "none"'):
        load_sweep(sweep_file)
    sweep_file.write_text(sweep_file.read_text().replace("orders = 3\n", "") + CAPTURE)
    with pytest.raises(SweepError, match=r"measures\.orders compares orders of the same seed, got one order for each; raise orders"):
        load_sweep(sweep_file)
    sweep_file.write_text(sweep_file.read_text().replace("steps = [2, 4]", "steps = [2, 4]\norders = 2") + '[protocol]\norder_rule = "separate"\n')
    with pytest.raises(SweepError, match=r'measures\.orders needs \[protocol\] order_rule = "shared": "separate" trains in another order'):
        load_sweep(sweep_file)
