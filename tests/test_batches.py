"""Batches of several demonstrations and repeated passes over them, against the slow loop of tests/plain.py; balanced draws."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from iclgd_analysis import alpha
from iclgd_analysis.load import load

from iclgd_dist.block import run_block
from iclgd_dist.config import SweepError, load_sweep
from iclgd_dist.encoding import encode
from iclgd_dist.extensions import BUILTIN, MethodSpec
from iclgd_dist.measuring import Missing
from iclgd_dist.model import LanguageModel
from iclgd_dist.plan import count_cells, make_plan
from iclgd_dist.protocol import Protocol
from iclgd_dist.store import Store, read_results
from iclgd_dist.tasks import demonstration_order, draw_demonstrations, load_task
from iclgd_dist.updates import Probe, TrainingSequence, make_method
from tests import plain
from tests.test_extras import changed
from tests.tiny import ids, lm_for, tiny

FIRST = 2
SEQUENCES = [TrainingSequence(torch.tensor([1, 5, *ids(3 + 2 * n, seed=n)]), FIRST) for n in range(5)]
BASES = ["vanilla", "layer_causal"]


def trained(lm: LanguageModel, base: str, steps: list[int], rates: list[float], **options: Any) -> dict[int, Probe]:
    method = make_method(MethodSpec(name="varied", base=base, **options))  # type: ignore[arg-type]
    return {probe.step: probe for probe in method.train(lm, SEQUENCES, rates, steps=steps)}


def slow(lm: LanguageModel, base: str, batches: list[list[int]], rate: float) -> tuple[list[torch.Tensor], list[float]]:
    """Return what training on batches added to each K and V, and the loss before each update: gradients of one sequence at a time, averaged by hand."""
    start = plain.copied(lm.model)
    model = plain.copied(lm.model)
    places = [(layer, part) for layer in range(len(plain.layers_of(model))) for part in "kv"]
    parts = [tensor for place in places for tensor in plain.tensors(model, *place)]
    for parameter, _, _ in parts:
        parameter.requires_grad_(True)
    losses = []
    for batch in batches:
        found = [plain._gradients(model, parts, SEQUENCES[n].ids_T[None], FIRST, base) for n in batch]
        for number, part in enumerate(parts):
            plain.write(part, -rate * sum(gradients[number] for gradients, _ in found) / len(batch))
        losses.append(float(sum(loss for _, loss in found)) / len(batch))
    initial = [tensor for place in places for tensor in plain.tensors(start, *place)]
    return [plain.read(part) - plain.read(before) for part, before in zip(parts, initial, strict=True)], losses


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    ("options", "batches"),
    [
        ({"batch_size": 2}, [[0, 1], [2, 3], [4]]),
        ({"epochs": 2}, [[0], [1], [2], [3], [4], [0], [1]]),
        ({"batch_size": 3, "epochs": 3}, [[0, 1, 2], [3, 4], [0, 1, 2], [3, 4], [0, 1, 2]]),
    ],
)
def test_an_update_takes_the_mean_over_its_batch(base: str, options: dict[str, int], batches: list[list[int]]) -> None:
    lm = tiny("gpt2")  # no norm of its rounds to float32, where a third of a gradient is another number
    probe = trained(lm, base, [len(batches)], [0.2, 0.05], **options)[len(batches)]
    for lane, rate in enumerate([0.2, 0.05]):
        expected, losses = slow(lm, base, batches, rate)
        got = [
            tensor[lane] for layer in range(lm.num_layers) for part in "kv" for tensor in probe.deltas[f"transformer.h.{layer}.attn.c_attn.{part}"].tensors()
        ]
        scale = max(float(each.abs().max()) for each in expected)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-8 * scale) for a, b in zip(got, expected, strict=True))
        assert probe.loss_SN[:, lane].tolist() == pytest.approx(losses, rel=1e-9)


@pytest.mark.parametrize("base", BASES)
def test_one_demonstration_at_a_time_once_is_the_built_in_method_bit_for_bit(base: str) -> None:
    lm = tiny("qwen3", torch.float32)
    (a,) = trained(lm, base, [5], [0.1], batch_size=1, epochs=1).values()
    (b,) = make_method(BUILTIN[base]).train(lm, SEQUENCES, [0.1], steps=[5])
    assert all(torch.equal(x, y) for name in b.deltas for x, y in zip(a.deltas[name].tensors(), b.deltas[name].tensors(), strict=True))


VARIED = """
[[method]]
name = "batched"
base = "vanilla"
batch_size = 2
epochs = 2
[[method]]
name = "twice"
base = "layer_causal"
epochs = 2
"""


def test_a_block_of_varied_methods_compares_them_with_what_they_saw(sweep_file: Path, tmp_path: Path) -> None:
    path = changed(sweep_file, VARIED)
    text = path.read_text().replace("steps = [2, 4]", 'steps = [1, 2, 4, 8]\nmethods = ["vanilla", "batched", "twice"]')
    path.write_text(text.replace("layer_causal = [0.003, 0.05]", "batched = [0.05]\ntwice = [0.05]"))
    sweep = load_sweep(path)
    plan = make_plan(sweep)
    assert plan.warnings == ("num_demonstrations 4: steps 8 exceed the 4 updates of vanilla, batched and are left out there",)
    (block,) = plan.blocks
    steps = {name: sorted({cell.step for cell in block.cells if cell.method == name}) for name in sweep.methods}
    assert steps == {"vanilla": [1, 2, 4], "batched": [1, 2, 4], "twice": [1, 2, 4, 8]}
    assert count_cells(sweep)[0] == len(block.cells) == 2 + 6 + 3 + 4
    assert len({cell.key for cell in block.cells}) == len(block.cells)
    store = Store(tmp_path / "store")
    store.prepare()
    run_block(lm_for(block), block, store)
    rows = {(row["method"], row["learning_rate"], row["step"]): row for row in read_results(store).cells.to_pylist()}
    assert all(row["status"] == "done" for row in rows.values())
    for (method, _, step), row in rows.items():
        if method is None:
            continue
        num_seen = min(4, step * (2 if method == "batched" else 1))
        assert math.isclose(row["sim_aou_prefix"], row["sim_aou"], rel_tol=1e-9) == (num_seen == 4), (method, step)
        assert row["kendall_tokens"] is not None or num_seen < 4, (method, step)
    assert rows["batched", 0.05, 2]["loss"] != rows["vanilla", 0.05, 2]["loss"]
    assert '"batch_size": 2' in rows["batched", 0.05, 2]["method_options"]


def test_methods_of_different_lengths_are_compared_at_their_own_last_steps(sweep_file: Path, tmp_path: Path) -> None:
    path = changed(sweep_file, VARIED)
    text = path.read_text().replace("steps = [2, 4]", 'steps = [2, 4, 8]\nmethods = ["vanilla", "layer_causal", "twice"]')
    path.write_text(text.replace("layer_causal = [0.003, 0.05]", "layer_causal = [0.003]\ntwice = [0.05]"))
    (block,) = make_plan(load_sweep(path)).blocks
    store = Store(tmp_path / "store")
    store.prepare()
    run_block(lm_for(block), block, store)
    results = read_results(store)
    cells = {row["key"]: (row["method"], row["learning_rate"], row["step"]) for row in results.cells.to_pylist()}
    pairs = {frozenset((cells[row["cell_a"]], cells[row["cell_b"]])) for row in results.pairs.to_pylist()}
    assert frozenset({("vanilla", 0.05, 4), ("layer_causal", 0.003, 4)}) in pairs, "what they had without the longer method"
    assert frozenset({("vanilla", 0.003, 4), ("twice", 0.05, 8)}) in pairs
    assert Missing(results).to_train(block, encode(block.draw, lm_for(block).tokenizer, protocol=block.protocol, max_positions=512)) == ()
    (setting,) = load(str(store.root)).settings()
    assert [setting.last_step_of(method) for method in ("vanilla", "layer_causal", "twice")] == [4, 4, 8]
    assert setting.last_step == "8 (vanilla: 4, layer_causal: 4)"
    rows = alpha.data(load(str(store.root)), setting)
    at = rows[(rows["method"] == "layer_causal") & (rows["place"] == alpha.SELECTED)]
    assert at["num_used"].tolist() == [1]


def test_queries_are_kept_once_for_each_demonstration_however_many_passes() -> None:
    probe = trained(tiny("llama"), "vanilla", [12], [0.1], epochs=3)[12]
    assert {len(recorded) for recorded in probe.queries.values()} == {5}
    again = trained(tiny("llama"), "vanilla", [7], [0.1], epochs=3)[7]
    alone = trained(tiny("llama"), "vanilla", [5], [0.1])[5]
    assert not torch.equal(again.queries[1][1], alone.queries[1][1]) and torch.equal(again.queries[1][2], alone.queries[1][2]), "as it was trained on last"


def test_code_of_ones_own_has_batches_of_one(tmp_path: Path) -> None:
    text = "from iclgd_dist.updates import Vanilla\nclass Mine(Vanilla):\n    pass\n"
    spec = MethodSpec(name="mine", code="mine.py:Mine", options={"batch_size": 4}, text=text)
    with pytest.raises(SweepError, match=r"mine: batch_size of code of one's own must be 1, got 4; it is an option of \[\[method\]\] with base"):
        make_method(spec)


def test_steps_beyond_every_methods_updates_are_refused(sweep_file: Path) -> None:
    path = changed(sweep_file, VARIED)
    path.write_text(path.read_text().replace("steps = [2, 4]", 'steps = [2, 9]\nmethods = ["vanilla", "twice"]').replace("layer_causal =", "twice ="))
    with pytest.raises(SweepError, match=r"steps must lie in 1\.\.8 \(4 demonstrations / batch 1 x 2 epochs\), got 9"):
        load_sweep(path)


def test_a_balanced_draw_gives_every_label_its_turn() -> None:
    task, balanced = load_task("trec"), Protocol(demonstration_draw="balanced")
    whole = demonstration_order(task, seed=3, protocol=balanced)
    assert sorted(row.id for row in whole) == sorted(row.id for row in task.train)
    least = min(Counter(row.label for row in task.train).values())
    for num in range(1, 6 * least, 7):
        counts = Counter(row.label for row in whole[:num])
        assert max(counts.values()) - min(counts[label] for label in range(6)) <= 1
    first = [[row.label for row in demonstration_order(task, seed=seed, protocol=balanced)[:6]] for seed in range(12)]
    assert all(sorted(labels) == list(range(6)) for labels in first) and len({labels[0] for labels in first}) > 2, "no label always comes first"
    assert draw_demonstrations(task, num_demonstrations=4, seed=3, protocol=balanced) == tuple(whole[:4])
    # Within a label the rows have the order of the plain draw.
    plain_order = [row.id for row in demonstration_order(task, seed=3) if row.label == 2]
    assert [row.id for row in whole if row.label == 2] == plain_order
