"""What a block computes beside its cells, and what is measured of cells that are there: controls, pairs, prefixes, own metrics, random weights."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from iclgd_dist import measured, random_deltas
from iclgd_dist.actor import ModelHost
from iclgd_dist.baselines import queries_of
from iclgd_dist.block import run_block
from iclgd_dist.blocks import Block, split, with_cells
from iclgd_dist.config import load_sweep
from iclgd_dist.measuring import Missing, measure_kept, random_targets, with_targets
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Results, Store, read_results
from iclgd_dist.upkeep import verify
from tests.tiny import lm_for

MORE = """
[controls]
contexts = ["other_draw", "separator"]
train_on = ["true", "shuffled_words"]
[capture]
keep = "{keep}"
[[metric]]
name = "moved"
code = "mine.py:moved"
[[method]]
name = "top"
base = "layer_causal"
layers = [-1]
"""
MINE = """
def moved(zero_shot, in_context, finetuned):
    return (finetuned.attention_LQD.double() - zero_shot.attention_LQD.double()).norm(dim=-1)
"""


def changed(path: Path, keep: str = "none", *, methods: str = '["vanilla", "layer_causal", "top"]', more: str = MORE) -> Path:
    (path.parent / "mine.py").write_text(MINE)
    text = path.read_text().replace("seeds = [1, 2]", f"seeds = [1]\nmethods = {methods}") + more.format(keep=keep)
    path.write_text(
        text.replace("layer_causal = [0.003, 0.05]", "layer_causal = [0.003, 0.05]\ntop = 0.05").replace(
            'source = "model"', 'source = "model"\ncompute_dtype = "float64"'
        )
    )
    return path


def ran(path: Path, store: Store) -> Block:
    store.prepare()
    (block,) = make_plan(load_sweep(path)).blocks
    run_block(lm_for(block), block, store)
    return block


def test_a_block_holds_controls_pairs_prefixes_and_own_metrics(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    block = ran(changed(sweep_file), store)
    results = read_results(store)
    cells = {row["key"]: row for row in results.cells.to_pylist()}
    assert len(cells) == len(block.cells) == 2 + 2 * 2 * (2 + 2 + 1)  # train_on x steps x learning rates of three methods
    finetuned = {key: row for key, row in cells.items() if row["kind"] == "finetuned"}
    controls = results.controls.to_pandas()
    assert set(controls[controls["cell"].isin(finetuned)]["control"]) == {"other_draw", "separator", "other_query", "centred"}
    assert set(controls[~controls["cell"].isin(finetuned)]["control"]) == {"other_draw", "separator"}  # of ICL's own change
    pairs = results.pairs.to_pandas()
    alike = {(a, b) for a, b in zip(pairs["cell_a"], pairs["cell_b"], strict=True)}
    same = {(a, b) for a, b in alike if cells[a]["learning_rate"] == cells[b]["learning_rate"]}
    for a, b in alike:
        assert all(cells[a][name] == cells[b][name] for name in ("step", "train_on")) and cells[a]["method"] != cells[b]["method"]
        assert (a, b) in same or cells[a]["step"] == 4
    assert len(same) == 2 * 2 * (1 + 3)  # at 0.003 one pair, at 0.05 three
    assert len(alike - same) == 2 * (2 + 1 + 1)  # at the largest step, of two methods with two learning rates and one with one
    crossed = pairs[[pair in alike - same for pair in zip(pairs["cell_a"], pairs["cell_b"], strict=True)]]
    assert set(crossed["metric"]) == {"alpha"} and crossed["layer"].isna().all() and sorted(crossed["fold"].unique()) == ["A", "B", "all"]
    assert len(crossed) == 3 * len(alike - same) and crossed["mean"].between(-1, 1).all()
    assert set(results.metrics.to_pandas()["cell"]) == set(finetuned)
    for row in finetuned.values():
        assert row["sim_aou_prefix"] is not None
        if row["step"] == 4 and row["train_on"] == "true":
            assert math.isclose(row["sim_aou_prefix"], row["sim_aou"], rel_tol=1e-9)
        else:
            assert not math.isclose(row["sim_aou_prefix"], row["sim_aou"], rel_tol=1e-3)
        assert (row["method_options"] is not None) == (row["method"] == "top")


def test_finetuning_on_something_else_keeps_icl_and_changes_the_training(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    ran(changed(sweep_file, methods='["vanilla"]'), store)
    rows = read_results(store).cells.to_pylist()
    assert sum(row["kind"] == "icl" for row in rows) == 1
    at = {row["train_on"]: row for row in rows if row["learning_rate"] == 0.05 and row["step"] == 4}
    assert at.keys() == {"true", "shuffled_words"}
    assert at["true"]["loss"] != at["shuffled_words"]["loss"]


def test_what_committed_cells_lack_is_measured_from_kept_captures_without_a_model(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    path = changed(sweep_file, keep="all")
    block = ran(path, store)
    before = read_results(store)
    (path.parent / "mine.py").write_text(MINE.replace(".norm(", ".mul(2).norm("))
    missing, counts = Missing(before), []

    def lacking(block: Block, encoded) -> Block | None:
        counts.append(measure_kept(store, block, missing, encoded))
        return replace(with_cells(block, cells, encoded), is_measuring=True) if (cells := missing.to_train(block, encoded)) else None

    assert make_plan(load_sweep(path), choose=lacking).blocks == ()
    assert counts == [sum(cell.kind == "finetuned" for cell in block.cells)]
    after = read_results(store)
    assert after.cells.equals(before.cells)
    values = {(row["cell"], row["layer"], row["fold"]): row["mean"] for row in before.metrics.to_pylist()}
    new = [row for row in after.metrics.to_pylist() if row["version"] not in set(before.metrics["version"].to_pylist())]
    assert len(new) == len(values)
    assert all(row["mean"] == pytest.approx(2 * values[row["cell"], row["layer"], row["fold"]], rel=1e-9) for row in new)
    assert make_plan(load_sweep(path), choose=lacking).blocks == () and counts[-1] == 0  # nothing is left to do


def test_without_captures_just_the_cells_that_lack_something_are_trained_again(sweep_file: Path, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    path = changed(sweep_file)
    ran(path, store)
    before = read_results(store)
    path.write_text(path.read_text().replace('contexts = ["other_draw", "separator"]', 'contexts = ["other_draw", "separator", "flipped_labels"]'))
    missing = Missing(before)

    def lacking(block: Block, encoded) -> Block | None:
        return replace(with_cells(block, cells, encoded), is_measuring=True) if (cells := missing.to_train(block, encoded)) else None

    (block,) = make_plan(load_sweep(path), choose=lacking).blocks
    assert {cell.kind for cell in block.cells} == {"icl", "finetuned"}
    run_block(lm_for(block), block, store)
    after = read_results(store)
    assert after.cells.equals(before.cells) and len(after.pairs) == len(before.pairs) and len(after.metrics) == len(before.metrics)
    old, new = before.controls.to_pandas(), after.controls.to_pandas()
    assert set(new["control"]) - set(old["control"]) == {"flipped_labels"}
    assert len(new) == len(old) + (new["control"] == "flipped_labels").sum()
    missing = Missing(after)
    assert make_plan(load_sweep(path), choose=lacking).blocks == ()


def test_pairs_of_learning_rates_that_a_split_block_lacks_are_measured_later(sweep_file: Path, tmp_path: Path) -> None:
    whole, store = Store(tmp_path / "whole"), Store(tmp_path / "store")
    path = changed(sweep_file)
    block = ran(path, whole)
    store.prepare()
    for part in split([block], 9):  # a block for each learning rate
        run_block(lm_for(part), part, store)

    def alphas(results: Results) -> dict[tuple[frozenset[str], str], float]:
        rows = [row for row in results.pairs.to_pylist() if row["metric"] == "alpha" and row["layer"] is None]
        found = {(frozenset((row["cell_a"], row["cell_b"])), row["fold"]): row["mean"] for row in rows}
        assert len(found) == len(rows)
        return found

    before, expected = alphas(read_results(store)), alphas(read_results(whole))
    assert not before and expected
    missing = Missing(read_results(store))

    def lacking(block: Block, encoded) -> Block | None:
        return replace(with_cells(block, cells, encoded), is_measuring=True) if (cells := missing.to_train(block, encoded)) else None

    (rest,) = split(make_plan(load_sweep(path), choose=lacking).blocks, 9)  # which would tear the pairs apart again
    assert {cell.step for cell in rest.cells} == {4}
    run_block(lm_for(rest), rest, store)
    assert alphas(read_results(store)) == pytest.approx(expected, rel=1e-9)
    missing = Missing(read_results(store))
    assert make_plan(load_sweep(path), choose=lacking).blocks == ()


def test_pairs_at_the_last_step_are_of_the_plans_last_step_whatever_is_there_already(sweep_file: Path, tmp_path: Path) -> None:
    path, store = sweep_file, Store(tmp_path / "store")
    text = path.read_text().replace("seeds = [1, 2]", "seeds = [1]")
    path.write_text(text.replace("steps = [2, 4]", 'steps = [4]\nmethods = ["vanilla"]').replace("layer_causal = [0.003, 0.05]\n", ""))
    ran(path, store)
    path.write_text(text)  # another method, and an earlier step of both
    for block in make_plan(load_sweep(path), store.keys()).blocks:
        run_block(lm_for(block), block, store)
    results = read_results(store)
    steps = {row["key"]: (row["step"], row["learning_rate"]) for row in results.cells.to_pylist()}
    pairs = {(row["cell_a"], row["cell_b"]) for row in results.pairs.to_pylist()}
    assert pairs and all(
        steps[a] == steps[b] and steps[a][0] == 2 for a, b in pairs
    )  # at step 4 the other method was there before: `iclgd measure` makes those


def test_random_weights_move_the_states_as_far_as_the_trained_ones(sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    path = changed(sweep_file)
    ran(path, store)
    results = read_results(store)
    cells = [row for row in results.cells.to_pylist() if row["step"] == 4 and row["train_on"] == "true" and row["method"] != "top"]
    targets = random_targets(results, [row["key"] for row in cells], Missing(results))
    assert targets.keys() == {row["key"] for row in cells}
    plan = make_plan(load_sweep(path), choose=lambda block, encoded: with_targets(block, targets, lambda chosen: with_cells(block, chosen, encoded)))
    (block,) = plan.blocks
    widths = []
    monkeypatch.setattr(
        random_deltas, "queries_of", lambda *args, num_lanes, **named: widths.append(num_lanes) or queries_of(*args, num_lanes=num_lanes, **named)
    )
    run_block(lm_for(block), block, store)
    assert len(block.random_targets) > 1 and max(widths) == random_deltas.NUM_DRAWS  # as many lanes at once as a cell has draws
    after = read_results(store)
    controls = after.controls.to_pandas()
    for row in cells:
        mine = controls[(controls["cell"] == row["key"]) & controls["control"].str.startswith("random_delta") & (controls["fold"] == "all")]
        assert set(mine["control"]) == {"random_delta_0", "random_delta_1", "random_delta_2"}
        for _, draw in mine.groupby("control"):
            ratios = draw[draw["metric"] == "update_ratio"]["mean"]
            assert math.exp(ratios.map(math.log).mean()) == pytest.approx(row["update_ratio"], rel=0.05)
            assert draw[draw["metric"] == "sim_aou"]["n"].min() > 0
    assert mine[mine["metric"] == "sim_aou"].groupby("control")["mean"].mean().nunique() == 3
    assert random_targets(after, [row["key"] for row in cells], Missing(after)) == {}


def test_random_weights_keep_the_trained_ratios_of_the_matrices() -> None:
    from iclgd_dist.blocks import RandomTarget
    from iclgd_dist.deltas import norms
    from iclgd_dist.random_deltas import _deltas, _Lane
    from tests.tiny import tiny

    lm = tiny("gpt2")
    target = RandomTarget("k" * 64, 0.5, {"k": (0.1, 0.0, 0.3), "v": (0.2, 0.4, None)})
    lanes = [_Lane(target, 0, factor=2.0), _Lane(target, 1, factor=3.0)]
    for index, (k, v) in enumerate([(0.1, 0.2), (0.0, 0.4), (0.3, 0.0)]):
        got = norms(lm, index, _deltas(lm, index, lanes))
        for part, norm in (("k", k), ("v", v)):
            if norm:
                assert got[part].tolist() == pytest.approx([2 * norm, 3 * norm], rel=1e-5)
    one, other = _deltas(lm, 0, lanes)["transformer.h.0.attn.c_attn.v"].weight_NIO
    assert abs(float(torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0))) < 0.2


def test_a_metric_that_fails_costs_no_cell_and_is_told(sweep_file: Path, tmp_path: Path) -> None:
    store, path = Store(tmp_path / "store"), changed(sweep_file, methods='["vanilla"]')
    (path.parent / "mine.py").write_text("def moved(zero_shot, in_context, finetuned):\n    raise KeyError('nothing')\n")
    store.prepare()
    (block,) = make_plan(load_sweep(path)).blocks
    host = ModelHost(str(store.root), "run", 1)
    *_, last = host.steps(block)
    assert (last["outcome"], last["reason"]) == ("metric", "MetricError: metric 'moved': KeyError: 'nothing'")
    results = read_results(store)
    assert len(results.cells) == len(block.cells) and len(results.metrics) == 0
    assert results.attempts["outcome"].to_pylist() == ["metric"]


def test_a_damaged_file_of_measures_is_named_and_can_be_set_aside(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.prepare()
    row = {"key": "0" * 64, "kind": "control", "name": "separator", "metric": "sim_aou", "layer": 0, "fold": "all", "n": 3, "mean": 0.5, "sd": 0.1}
    assert measured.commit(store.root, [row], reach=lambda point: None)
    assert not measured.commit(store.root, [row | {"mean": 0.7}], reach=lambda point: None), "the same figure is stored once"
    assert verify(store).damaged == [] and measured.read(store.root)["mean"].to_pylist() == [0.5]
    (file,) = (store.root / "measures").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 255
    file.write_bytes(data)
    (error,) = verify(store, quarantine=True).damaged
    assert file.name in str(error)
    assert verify(store).damaged == [] and len(measured.read(store.root)) == 0


def test_of_figures_that_were_made_twice_the_first_counts() -> None:
    keys = pa.array(["0" * 64, "1" * 64])
    row = {"key": "1" * 64, "kind": "control", "name": "a", "metric": "sim_aou", "layer": None, "fold": "all", "n": 3, "mean": 0.5, "sd": 0.1}
    rows = [row, row | {"mean": 0.6}, row | {"layer": 0, "mean": 0.7}, row | {"name": "b", "mean": 0.8}, row | {"key": "2" * 64, "mean": 0.9}]
    later = pa.Table.from_pylist(rows, schema=measured.SCHEMA)
    none = later.slice(0, 0).drop_columns(["kind"])
    none = none.set_column(0, "key", pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), keys))
    found = measured.only_new(none, later, keys)
    assert found["mean"].to_pylist() == [0.5, 0.7, 0.8]
    assert set(found["key"].to_pylist()) == {"1" * 64}
    assert measured.only_new(found.slice(1), later, keys)["mean"].to_pylist() == [0.5], "what is there is not there again"
    other = found.set_column(0, "key", pa.DictionaryArray.from_arrays(pa.array([0, 0, 0], pa.int32()), keys))
    assert len(measured.only_new(other, later, keys)) == 3, "another cell's figures of the same name"
