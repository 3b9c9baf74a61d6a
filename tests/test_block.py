"""A whole block without Ray, on a tiny model and a real file of text: what lands in the store, and what must not change."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iclgd_dist.block import block_steps, run_block
from iclgd_dist.blocks import Block
from iclgd_dist.config import Resources, load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.schema import POOLED, SIMILARITIES
from iclgd_dist.store import Store, read_results
from tests.tiny import lm_for

GOLDEN = Path(__file__).parent / "data" / "golden_block.json"


def planned(sweep_file: Path, *, seeds: str = "[1]", dtype: str = "float64", finished: frozenset[str] = frozenset(), **rates: str) -> Block:
    """Return the first block of the tiny sweep with other learning rates, given as text."""
    text = sweep_file.read_text().replace("seeds = [1, 2]", f"seeds = {seeds}").replace('source = "model"', f'source = "model"\ncompute_dtype = "{dtype}"')
    for method, values in rates.items():
        text = text.replace(f"{method} = [0.003, 0.05]", f"{method} = {values}")
    if "0.0," in text:
        text += "\n[controls]\nzero_learning_rate = true\n"
    path = sweep_file.with_name("other.toml")
    path.write_text(text)
    return make_plan(load_sweep(path), finished).blocks[0]


def rows_of(store: Store, **wanted) -> list[dict]:
    rows = read_results(store).cells.to_pylist()
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_a_block_commits_every_planned_cell_once_with_its_identity(sweep_file: Path, tmp_path: Path) -> None:
    block, store = planned(sweep_file), Store(tmp_path / "store")
    store.prepare()
    progress = run_block(lm_for(block), block, store)
    assert store.keys() == {cell.key for cell in block.cells}
    assert (progress.num_cells, progress.num_baselines, progress.num_training_steps) == (10, 2, 4 * 2 * 2)
    assert math.isclose(progress.done_flops, progress.total_flops, rel_tol=1e-6)
    rows = read_results(store).cells.to_pylist()
    assert sorted(row["kind"] for row in rows) == ["finetuned"] * 8 + ["icl", "zero_shot"]
    for cell in block.cells:
        (row,) = [row for row in rows if row["key"] == cell.key]
        assert (row["method"], row["learning_rate"], row["step"], row["status"]) == (cell.method, cell.learning_rate, cell.step, "done")
        assert row["label_words"] == ["Yes", "No"]
        assert row["n"] == row["num_queries"] == 8
        assert row["wall_seconds"] > 0
        assert json.loads(row["versions"])["torch"] == torch.__version__
    (zero_shot,), (icl,) = rows_of(store, kind="zero_shot"), rows_of(store, kind="icl")
    assert zero_shot["prompts"] == [query.prompt for query in block.draw.queries]
    assert icl["demonstrations"] == [f"{each.prompt} {('Yes', 'No')[each.label]}" for each in block.draw.demonstrations]
    assert all(row["prompts"] is None for row in rows if row["kind"] != "zero_shot")
    assert all(row["demonstrations"] is None for row in rows if row["kind"] != "icl")
    results = read_results(store)
    assert len(results.examples) == 10 * 8
    assert {(row["layer"], row["fold"]) for row in results.layers.to_pylist() if row["key"] == block.cells[-1].key} == {
        (n, f) for n in (0, 1) for f in ("A", "B", "all")
    }


def test_texts_that_must_not_leave_are_nowhere_in_the_store(sweep_file: Path, tmp_path: Path) -> None:
    block, store = replace(planned(sweep_file), keeps_texts=False), Store(tmp_path / "store")
    store.prepare()
    run_block(lm_for(block), block, store)
    assert {(row["prompts"], row["demonstrations"]) == (None, None) for row in rows_of(store)} == {True}
    held = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    texts = [each.prompt.encode() for each in (*block.draw.queries, *block.draw.demonstrations)]
    assert texts and not [text for text in texts if text in held]


def test_running_a_block_again_commits_nothing(sweep_file: Path, tmp_path: Path) -> None:
    block, store = planned(sweep_file), Store(tmp_path / "store")
    store.prepare()
    lm = lm_for(block)
    run_block(lm, block, store)
    before = {path: path.read_bytes() for path in (tmp_path / "store" / "cells").iterdir()}
    assert run_block(lm, block, store).num_cells == 0
    assert {path: path.read_bytes() for path in (tmp_path / "store" / "cells").iterdir()} == before
    with pytest.raises(IndexError):
        planned(sweep_file, finished=frozenset(store.keys()))


def test_stopping_after_any_piece_of_work_and_running_the_rest_gives_the_same_rows(sweep_file: Path, tmp_path: Path) -> None:
    block, whole, parts = planned(sweep_file), Store(tmp_path / "whole"), Store(tmp_path / "parts")
    whole.prepare(), parts.prepare()
    lm = lm_for(block)
    run_block(lm, block, whole)
    for pieces in (3, 8, 12, 100):
        rest = tuple(cell for cell in block.cells if cell.key not in parts)
        if rest:
            steps = block_steps(lm, replace(block, cells=rest), parts)
            for _, _progress in zip(range(pieces), steps, strict=False):
                pass
            steps.close()
    assert parts.keys() == whole.keys()
    for row in rows_of(whole):
        (other,) = rows_of(parts, key=row["key"])
        for name in (*SIMILARITIES, *POOLED, "accuracy", "nll_label", "update_ratio", "loss", "gradient_norm"):
            assert row[name] == other[name] or math.isclose(row[name], other[name], rel_tol=1e-9), name


def test_learning_rate_zero_predicts_as_zero_shot_and_every_similarity_is_null(sweep_file: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        block, store = planned(sweep_file, dtype=dtype, vanilla="[0.0, 0.05]", layer_causal="[0.0, 0.05]"), Store(tmp_path / dtype)
        store.prepare()
        run_block(lm_for(block), block, store)
        results = read_results(store)
        (zero_shot,) = rows_of(store, kind="zero_shot")
        predicted = {row["query"]: row["prediction"] for row in results.examples.to_pylist() if row["key"] == zero_shot["key"]}
        controls = rows_of(store, learning_rate=0.0)
        assert len(controls) == 4
        for row in controls:
            assert row["accuracy"] == zero_shot["accuracy"]
            assert {r["query"]: r["prediction"] for r in results.examples.to_pylist() if r["key"] == row["key"]} == predicted
            assert row["delta_norm"] == 0
            assert row["update_norm"] <= 1e-5
            assert all(row[name] is None for name in (*SIMILARITIES, "sim_aou_pooled")), {n: row[n] for n in SIMILARITIES}
        assert all(row["sim_aou"] is not None for row in rows_of(store, learning_rate=0.05))


def test_a_diverging_lane_is_a_row_and_leaves_the_other_lanes_bit_equal(sweep_file: Path, tmp_path: Path) -> None:
    good, bad = (
        planned(sweep_file, dtype="float32", vanilla="[0.003, 0.05]"),
        planned(sweep_file, dtype="float32", vanilla="[0.003, 1e38]", layer_causal="[0.003, 1e38]"),
    )
    stores = Store(tmp_path / "good"), Store(tmp_path / "bad")
    for block, store in zip((good, bad), stores, strict=True):
        store.prepare()
        run_block(lm_for(block), block, store)
    for method in ("vanilla", "layer_causal"):
        for step in (2, 4):
            (diverged,) = rows_of(stores[1], method=method, learning_rate=1e38, step=step)
            assert diverged["status"] == "diverged"
            assert diverged["diverged_step"] <= step
            assert math.isfinite(diverged["last_finite_loss"])
            assert all(diverged[name] is None for name in (*SIMILARITIES, *POOLED, "accuracy", "nll_label"))
            (alone,), (beside,) = (rows_of(store, method=method, learning_rate=0.003, step=step) for store in stores)
            unequal = {name for name in alone if alone[name] != beside[name]} - {"wall_seconds", "peak_gib", "created_at"}
            assert unequal == set()


def test_a_lane_diverges_where_its_captures_do_though_its_loss_was_still_finite(sweep_file: Path, tmp_path: Path) -> None:
    """The loss of step 1 comes before its update, which makes the weights infinite."""
    sweep_file.write_text(sweep_file.read_text().replace("steps = [2, 4]", "steps = [1, 2]"))
    block, store = planned(sweep_file, dtype="float32", vanilla="[0.003, 1e300]", layer_causal="[0.003, 1e300]"), Store(tmp_path / "store")
    store.prepare()
    run_block(lm_for(block), block, store)
    for method in ("vanilla", "layer_causal"):
        (whole,) = rows_of(store, method=method, learning_rate=0.003, step=1)
        for step in (1, 2):
            (row,) = rows_of(store, method=method, learning_rate=1e300, step=step)
            assert (row["status"], row["diverged_step"], row["last_finite_loss"]) == ("diverged", 1, whole["loss"])


def test_the_rows_of_a_lane_do_not_depend_on_which_other_lanes_ran_beside_it(sweep_file: Path, tmp_path: Path) -> None:
    rows = []
    for number, rates in enumerate(("[0.05]", "[0.003, 0.01, 0.05, 0.1, 0.2]")):
        block, store = planned(sweep_file, vanilla=rates, layer_causal=rates), Store(tmp_path / str(number))
        store.prepare()
        run_block(lm_for(block), replace(block, resources=Resources(tokens_per_batch=100 + 400 * number)), store)
        rows.append(sorted(rows_of(store, learning_rate=0.05), key=lambda row: row["key"]))
    for alone, beside in zip(*rows, strict=True):
        assert alone["key"] == beside["key"]
        for name in (*SIMILARITIES, *POOLED, "nll_label", "nll_raw", "update_ratio", "delta_norm", "loss", "gradient_norm"):
            # Ranks jump: two tokens whose attention is equal but for the last bit may change places.
            tolerance = 1e-3 if name.startswith("kendall") else 1e-12
            assert alone[name] == beside[name] or math.isclose(alone[name], beside[name], rel_tol=1e-9, abs_tol=tolerance), name


def test_the_golden_block_has_the_numbers_it_had(sweep_file: Path, tmp_path: Path) -> None:
    """If this fails on purpose, raise the method's version in extensions.py (the keys change with it) and write the file anew: ICLGD_WRITE_GOLDEN=1."""
    block, store = planned(sweep_file), Store(tmp_path / "store")
    store.prepare()
    run_block(lm_for(block), block, store)
    names = (*SIMILARITIES, *POOLED, "nll_label", "update_ratio", "delta_norm", "loss", "gradient_norm")
    got = {f"{row['kind']} {row['method']} {row['learning_rate']} {row['step']}": {n: row[n] for n in names} for row in rows_of(store)}
    if os.environ.get("ICLGD_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(got, indent=1, sort_keys=True))
    expected = json.loads(GOLDEN.read_text())
    assert got.keys() == expected.keys()
    for cell, figures in expected.items():
        for name in names:
            assert got[cell][name] == figures[name] or math.isclose(got[cell][name], figures[name], rel_tol=1e-6), f"{cell}: {name}"


def test_in_context_states_that_are_not_finite_are_refused_by_name(sweep_file: Path, tmp_path: Path) -> None:
    block, store = planned(sweep_file), Store(tmp_path / "store")
    store.prepare()
    lm = lm_for(block)
    with torch.no_grad():
        lm.layers[1].self_attn.o_proj.weight[0, 0] = float("nan")
    with pytest.raises(ArithmeticError, match="the zero-shot states of model are not finite in float64"):
        run_block(lm, block, store)
    assert store.keys() == set()
