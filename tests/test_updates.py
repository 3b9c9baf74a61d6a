"""Algebra of the methods: what must hold whatever the numbers are."""

from __future__ import annotations

import pytest
import torch

from iclgd_dist.layerwise import Replay
from iclgd_dist.model import LanguageModel
from iclgd_dist.updates import BottomUp, LaneInputs, LayerCausal, Method, Probe, TrainingSequence, first_bad_step
from tests.tiny import METHODS, ids, tiny

SEQUENCES = [TrainingSequence(torch.tensor([1, 5, *ids(3 + n % 7, seed=n)]), 2) for n in range(16)]
BOTH = pytest.mark.parametrize("method", ["vanilla", "layer_causal"])


def run(lm: LanguageModel, method: str, rates: list[float], steps: list[int]) -> dict[int, Probe]:
    return {probe.step: probe for probe in METHODS[method].train(lm, SEQUENCES, rates, steps=steps)}


def largest(probe: Probe) -> float:
    return max(float(tensor.abs().max()) for delta in probe.deltas.values() for tensor in delta.tensors())


def distance(a: Probe, b: Probe, lanes_a=slice(None), lanes_b=slice(None)) -> float:
    """Return max |a - b| / max |b| over all deltas."""
    pairs = [(x[lanes_a], y[lanes_b]) for name in b.deltas for x, y in zip(a.deltas[name].tensors(), b.deltas[name].tensors(), strict=True)]
    assert a.deltas.keys() == b.deltas.keys()
    return max(float((x - y).abs().max()) for x, y in pairs) / max(float(y.abs().max()) for _, y in pairs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_on_a_one_layer_model_both_methods_give_the_same_deltas(family: str) -> None:
    lm = tiny(family, layers=1)
    vanilla, layer_causal = (run(lm, method, [0.01, 0.3], [1, 7, 16]) for method in ("vanilla", "layer_causal"))
    for step in (1, 7, 16):
        assert distance(vanilla[step], layer_causal[step]) <= 1e-12
        assert torch.allclose(vanilla[step].loss_SN, layer_causal[step].loss_SN, rtol=1e-12)


def test_on_a_deeper_model_the_methods_differ() -> None:
    lm = tiny("llama")
    assert distance(run(lm, "vanilla", [0.1], [4])[4], run(lm, "layer_causal", [0.1], [4])[4]) > 0.1


@BOTH
def test_learning_rate_zero_adds_nothing_but_still_reports_losses_and_gradients(method: str) -> None:
    probe = run(tiny("llama"), method, [0.0, 0.1], [5])[5]
    assert all(not tensor[0].any() for delta in probe.deltas.values() for tensor in delta.tensors())
    assert probe.loss_SN.isfinite().all()
    assert (probe.gradient_norm_SNL > 0).all()


@BOTH
def test_step_s_of_a_long_trajectory_equals_a_run_of_s_steps(method: str) -> None:
    lm = tiny("qwen3")
    long = run(lm, method, [0.02, 0.2], [1, 4, 9, 16])
    for step in (1, 4, 9):
        short = run(lm, method, [0.02, 0.2], [step])[step]
        assert distance(long[step], short) == 0
        assert torch.equal(long[step].loss_SN, short.loss_SN)


@BOTH
def test_a_lane_does_not_depend_on_the_lanes_beside_it(method: str) -> None:
    lm = tiny("gpt_neox")
    together = run(lm, method, [0.3, 0.01, 0.1, 0.02], [16])[16]
    for lane, rate in enumerate([0.3, 0.01, 0.1, 0.02]):
        assert distance(together, run(lm, method, [rate], [16])[16], slice(lane, lane + 1)) <= 1e-9


@BOTH
def test_a_diverging_lane_is_frozen_and_leaves_the_others_unchanged_bit_for_bit(method: str) -> None:
    lm = tiny("llama", torch.float32)
    good = run(lm, method, [0.01, 0.02, 0.03, 0.04], [2, 8, 16])
    bad = run(lm, method, [0.01, 1e38, 0.03, 0.04], [2, 8, 16])
    for step in (2, 8, 16):
        for name, delta in good[step].deltas.items():
            for x, y in zip(delta.tensors(), bad[step].deltas[name].tensors(), strict=True):
                assert torch.equal(x[[0, 2, 3]], y[[0, 2, 3]])
    for name, delta in bad[8].deltas.items():
        assert torch.equal(delta.weight_NIO[1], bad[16].deltas[name].weight_NIO[1]), "a lane that diverged went on moving"
    first = first_bad_step(bad[16].loss_SN, bad[16].gradient_norm_SNL)
    assert first[0] is first[2] is first[3] is None
    assert first[1] is not None
    assert 2 <= first[1] <= 4
    assert first_bad_step(good[16].loss_SN, good[16].gradient_norm_SNL) == [None] * 4


def test_the_loss_of_a_layer_gives_no_gradient_to_another_layer() -> None:
    """Independent of the package's own detaching: perturb one layer's deltas and see which other layers' first updates change."""
    lm = tiny("llama")
    base = run(lm, "layer_causal", [0.1], [1])[1]
    changed = tiny("llama")
    with torch.no_grad():
        changed.layers[2].self_attn.v_proj.weight += 0.05
    moved = run(changed, "layer_causal", [0.1], [1])[1]
    vanilla, vanilla_moved = run(lm, "vanilla", [0.1], [1])[1], run(changed, "vanilla", [0.1], [1])[1]
    for index in (0, 1):
        name = f"model.layers.{index}.self_attn.v_proj"
        assert torch.equal(base.deltas[name].weight_NIO, moved.deltas[name].weight_NIO), "a layer above reached down"
        assert not torch.equal(vanilla.deltas[name].weight_NIO, vanilla_moved.deltas[name].weight_NIO), "vanilla should feel the layers above"
    assert not torch.equal(base.deltas["model.layers.2.self_attn.v_proj"].weight_NIO, moved.deltas["model.layers.2.self_attn.v_proj"].weight_NIO)


@BOTH
def test_loss_of_step_one_is_the_models_own_and_the_gradient_norm_is_that_of_the_first_update(method: str) -> None:
    lm = tiny("llama")
    probe = run(lm, method, [0.25], [1])[1]
    replay = Replay(lm, SEQUENCES[0].ids_T[None])
    exits = []
    with torch.no_grad():
        for index in range(lm.num_layers):
            replay.climb(lm.layers[index], index)
            exits.append(torch.nn.functional.cross_entropy(lm.early_exit(replay.hidden_BTD)[0, 1:-1], SEQUENCES[0].ids_T[2:]))
    expected = exits[-1] if method == "vanilla" else sum(exits)
    assert float(probe.loss_SN[0, 0]) == pytest.approx(float(expected), rel=1e-12)
    for index in range(lm.num_layers):
        square = sum(float((delta.weight_NIO / 0.25).square().sum()) for name, delta in probe.deltas.items() if f".{index}." in name)
        assert float(probe.gradient_norm_SNL[0, 0, index]) == pytest.approx(square**0.5, rel=1e-12)


@BOTH
def test_twice_the_same_run_gives_the_same_bits(method: str) -> None:
    lm = tiny("opt", torch.float32)
    assert distance(run(lm, method, [0.1, 0.2], [6])[6], run(lm, method, [0.1, 0.2], [6])[6]) == 0


def test_the_built_in_methods_keep_the_contract() -> None:
    assert all(isinstance(method, Method) and method.name == name for name, method in METHODS.items())
    assert isinstance(METHODS["layer_causal"], BottomUp)
    assert not isinstance(METHODS["vanilla"], BottomUp)


def test_what_a_layer_passes_up_carries_no_graph() -> None:
    """Otherwise the graphs of all layers below, of all demonstrations, stay in memory."""
    lm = tiny("llama")
    inputs = LaneInputs(lm, SEQUENCES[:2], 1)
    with lm.resident(0) as layer:
        list(LayerCausal().train_layer(lm, 0, layer, inputs, [0.1], steps=[2]))
    assert all(replay.hidden_BTD.grad_fn is None for replay in inputs.replays)
