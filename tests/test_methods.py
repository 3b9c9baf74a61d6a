"""Variations of the methods equal plain loops that write weights and let torch.optim step; own code trains like a built-in one."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from iclgd_dist.block import run_block
from iclgd_dist.config import SweepError, load_sweep
from iclgd_dist.deltas import check_names, norms
from iclgd_dist.extensions import MethodSpec
from iclgd_dist.model import LanguageModel
from iclgd_dist.plan import make_plan
from iclgd_dist.store import Store
from iclgd_dist.updates import BottomUp, Probe, TrainingSequence, is_bottom_up, make_method
from tests.tiny import METHODS, ids, lm_for, tiny

SEQUENCES = [TrainingSequence(torch.tensor([1, 5, *ids(3 + n % 5, seed=n)]), 2) for n in range(5)]
NAMES = {
    "attn_k": ["k_proj"],
    "attn_v": ["v_proj"],
    "attn_kv": ["k_proj", "v_proj"],
    "attn_q": ["q_proj"],
    "attn_o": ["o_proj"],
    "mlp": ["gate_proj", "up_proj", "down_proj"],
    "all_linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def spec(**more) -> MethodSpec:
    return MethodSpec(**{"name": "mine", "base": "vanilla"} | more)


def run(lm: LanguageModel, method: MethodSpec, rates: list[float], steps: list[int]) -> dict[int, Probe]:
    return {probe.step: probe for probe in make_method(method).train(lm, SEQUENCES, rates, steps=steps)}


def loop(lm: LanguageModel, names: list[str], optimizer: type[torch.optim.Optimizer], rate: float, *, layers=None, loss="final", residual=False) -> nn.Module:
    """Finetune a copy of a llama: its parameters themselves, one sequence a step."""
    model = copy.deepcopy(lm.model)
    learning = {}
    for number, layer in enumerate(model.model.layers):
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in names and (layers is None or number in layers):
                learning[number, name] = module.weight.requires_grad_(True)
    stepper = optimizer(list(learning.values()), lr=rate)
    for sequence in SEQUENCES:
        tokens, states = sequence.ids_T[None], {}
        stepper.zero_grad()
        hooks = []
        for number, layer in enumerate(model.model.layers):
            if loss != "final":  # each layer starts from states that carry no gradient

                def before(module, args, number=number, states=states):
                    states[number, "in"] = args[0].detach()
                    return (states[number, "in"], *args[1:])

                hooks.append(layer.register_forward_pre_hook(before))
            hooks.append(layer.self_attn.register_forward_hook(lambda m, a, out, number=number, states=states: states.__setitem__((number, "attn"), out[0])))
        logits = [model(tokens, use_cache=False).logits]
        for hook in hooks:
            hook.remove()
        if loss == "attention":
            outputs = [states[n, "attn"] + (states[n, "in"] if residual else 0) for n in range(len(model.model.layers))]
            logits = [model.lm_head(model.model.norm(output)) for output in outputs]
        total = sum(cross_entropy(each[0, sequence.first - 1 : -1], tokens[0, sequence.first :]) for each in logits)
        total.backward()
        stepper.step()
    return model


def worst(lm: LanguageModel, probe: Probe, lane: int, trained: nn.Module) -> float:
    """Return the largest difference of any weight, relative to the largest change."""
    before, after = dict(lm.model.named_parameters()), dict(trained.named_parameters())
    largest = off = 0.0
    for name, weight in after.items():
        change = (weight - before[name]).detach()
        delta = probe.deltas.get(name.removesuffix(".weight"))
        got = torch.zeros_like(change) if delta is None else delta.weight_NIO[lane].mT
        off, largest = max(off, float((got - change).abs().max())), max(largest, float(change.abs().max()))
    assert largest > 0
    return off / largest


@pytest.mark.parametrize("weights", list(NAMES))
def test_each_group_of_weights_learns_as_torchs_sgd_would_teach_it(weights: str) -> None:
    lm = tiny("llama")
    probe = run(lm, spec(weights=weights), [0.05, 0.3], [5])[5]
    for lane, rate in enumerate([0.05, 0.3]):
        assert worst(lm, probe, lane, loop(lm, NAMES[weights], torch.optim.SGD, rate)) <= 1e-9


@pytest.mark.parametrize("layers", [(0,), (1, 2), (-1,)])
def test_only_the_named_layers_learn(layers: tuple[int, ...]) -> None:
    lm = tiny("llama")
    probe = run(lm, spec(layers=layers), [0.2], [5])[5]
    at = {layer % 3 for layer in layers}
    assert worst(lm, probe, 0, loop(lm, NAMES["attn_kv"], torch.optim.SGD, 0.2, layers=at)) <= 1e-9
    assert [bool(norms(lm, index, probe.deltas)) for index in range(3)] == [index in at for index in range(3)]
    assert [bool(norm > 0) for norm in probe.gradient_norm_SNL[0, 0]] == [index in at for index in range(3)]


def test_layers_that_do_not_learn_still_carry_a_layer_causal_method_up() -> None:
    lm = tiny("llama")
    whole, top = run(lm, spec(base="layer_causal"), [0.2], [1])[1], run(lm, spec(base="layer_causal", layers=(2,)), [0.2], [1])[1]
    name = "model.layers.2.self_attn.v_proj"
    assert torch.equal(whole.deltas[name].weight_NIO, top.deltas[name].weight_NIO)  # after one step no lower layer has changed yet
    assert list(top.deltas) == ["model.layers.2.self_attn.k_proj", name]
    assert top.loss_SN[0, 0] < whole.loss_SN[0, 0]  # its own layer's loss only


@pytest.mark.parametrize("weights", ["attn_kv", "all_linear"])
def test_adam_equals_torchs(weights: str) -> None:
    lm = tiny("llama")
    probe = run(lm, spec(optimizer="adam", weights=weights), [0.003, 0.02], [5])[5]
    for lane, rate in enumerate([0.003, 0.02]):
        assert worst(lm, probe, lane, loop(lm, NAMES[weights], torch.optim.Adam, rate)) <= 1e-7  # a sign near 0 is a matter of the last bit


@pytest.mark.parametrize("residual", [False, True])
def test_the_papers_formula_reads_the_attention_output_alone_or_with_the_residual_stream(residual: bool) -> None:
    lm = tiny("llama")
    probe = run(lm, spec(base="layer_causal_attn", residual=residual), [0.1], [5])[5]
    assert worst(lm, probe, 0, loop(lm, NAMES["attn_kv"], torch.optim.SGD, 0.1, loss="attention", residual=residual)) <= 1e-9


def test_layer_causal_attn_is_bottom_up_and_differs_from_layer_causal() -> None:
    lm = tiny("llama")
    assert isinstance(METHODS["layer_causal_attn"], BottomUp)
    own, block = (
        run(lm, spec(base=base), [0.1], [3])[3].deltas["model.layers.1.self_attn.v_proj"].weight_NIO for base in ("layer_causal_attn", "layer_causal")
    )
    assert float((own - block).abs().max()) > 1e-3 * float(block.abs().max())


@pytest.mark.parametrize("base", ["vanilla", "layer_causal"])
def test_low_rank_equals_training_the_two_thin_matrices_of_a_plain_model(base: str) -> None:
    lm = tiny("llama", layers=1)  # on one layer both methods are the same
    probe = run(lm, spec(base=base, rank=2), [0.3], [5])[5]
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"]
    start = run(lm, spec(base=base, rank=2), [0.0], [1])[1]
    pairs = {name: [start.deltas[name].down_NIR[0].clone().requires_grad_(), start.deltas[name].up_NRO[0].clone().requires_grad_()] for name in names}
    assert all(not up.any() and down.any() for down, up in pairs.values())
    for sequence in SEQUENCES:
        model = copy.deepcopy(lm.model)
        changed = {f"{name}.weight": model.get_parameter(f"{name}.weight") + (down @ up).mT for name, (down, up) in pairs.items()}
        logits = torch.func.functional_call(model, changed, (sequence.ids_T[None],), {"use_cache": False}).logits[0]
        loss = cross_entropy(logits[sequence.first - 1 : -1], sequence.ids_T[sequence.first :])
        tensors = [tensor for pair in pairs.values() for tensor in pair]
        with torch.no_grad():
            for tensor, gradient in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
                tensor -= 0.3 * gradient
    for name, (down, up) in pairs.items():
        got = probe.deltas[name]
        assert torch.allclose(got.down_NIR[0], down, atol=1e-9) and torch.allclose(got.up_NRO[0], up, atol=1e-9)
    whole = torch.linalg.matrix_norm(probe.deltas[names[0]].down_NIR @ probe.deltas[names[0]].up_NRO)
    assert torch.allclose(norms(lm, 0, probe.deltas)["k"], whole, rtol=1e-9)


def test_the_thin_matrices_start_alike_in_all_lanes_and_anew_with_each_seed() -> None:
    lm, method = tiny("llama"), make_method(spec(rank=3))
    (a,), (b,) = (list(method.train(lm, SEQUENCES, [0.0, 0.1], steps=[1], seed=seed)) for seed in (1, 2))
    first, other = (probe.deltas["model.layers.0.self_attn.k_proj"].down_NIR for probe in (a, b))
    assert torch.equal(first[0], run(lm, spec(rank=3), [0.0], [1])[1].deltas["model.layers.0.self_attn.k_proj"].down_NIR[0]) is False
    assert not torch.equal(first[0], other[0])
    (again,) = method.train(lm, SEQUENCES, [0.0], steps=[1], seed=1)
    assert torch.equal(again.deltas["model.layers.0.self_attn.k_proj"].down_NIR[0], first[0])


OWN = """
from iclgd_dist.updates import Vanilla

class Sign(Vanilla):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def direction(self, gradient, state):
        return self.scale * gradient.sign()
"""


def own(tmp_path: Path, text: str = OWN, name: str = "Sign", **options) -> MethodSpec:
    (tmp_path / "my_rules.py").write_text(text)
    return MethodSpec(name="signed", code=f"my_rules.py:{name}", options=options).with_text(tmp_path)


def test_a_rule_of_ones_own_is_a_few_lines(tmp_path: Path) -> None:
    lm = tiny("llama")
    probe = run(lm, own(tmp_path, scale=0.5), [0.01], [1])[1]
    assert make_method(own(tmp_path)).name == "signed"
    values = probe.deltas["model.layers.0.self_attn.v_proj"].weight_NIO.unique()
    assert torch.allclose(values, torch.tensor([-0.005, 0.005], dtype=torch.float64))


def test_own_code_is_known_by_its_text_and_its_options_and_not_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    same = own(tmp_path).key()
    assert own(tmp_path / "other").key() == same
    assert own(tmp_path, scale=2.0).key() != same
    assert own(tmp_path, OWN + "\n# another text").key() != same


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name\nclass Sign: pass", "ModuleNotFoundError: No module named"),
        ("class Sign:\n    def __init__(self, needed): pass", "TypeError"),
        ("class Sign: pass", "must have a method `train`"),
    ],
)
def test_own_code_that_cannot_be_used_is_one_clear_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SweepError, match=message):
        make_method(own(tmp_path, text))


def test_a_train_of_ones_own_is_not_passed_over_for_an_inherited_train_layer(tmp_path: Path) -> None:
    text = "from iclgd_dist.updates import LayerCausal\n\nclass Sign(LayerCausal):\n    def train(self, *args, **options):\n        yield from super().train(*args, **options)\n"
    assert not is_bottom_up(make_method(own(tmp_path, text)))
    assert is_bottom_up(make_method(own(tmp_path, text.replace("train(", "direction(").replace("(self, *args, **options)", "(self, gradient, state)"))))
    assert [is_bottom_up(method) for method in METHODS.values()] == [False, True, True]


def test_a_delta_of_no_projection_is_refused_by_name() -> None:
    lm = tiny("llama")
    (probe,) = METHODS["vanilla"].train(lm, SEQUENCES, [0.1], steps=[1])
    check_names(lm, probe.deltas)
    name, delta = next(iter(probe.deltas.items()))
    with pytest.raises(SweepError, match=f"a delta must be named after a projection, such as 'model.layers.0.mlp.down_proj', got '{name}.weight'"):
        check_names(lm, {f"{name}.weight": delta})
    with pytest.raises(SweepError, match="got none"):
        check_names(lm, {})
    check_names(lm, {}, 0)  # a layer may learn nothing
    with pytest.raises(SweepError, match=r"such as 'model.layers.1.*got 'model.layers.0"):
        check_names(lm, {name: delta}, 1)


MISSPELT = """
from dataclasses import replace

from iclgd_dist.updates import LayerCausal

class Sign(LayerCausal):
    def train_layer(self, *args, **options):
        for probe in super().train_layer(*args, **options):
            yield replace(probe, deltas={f"{name}.weight": delta for name, delta in probe.deltas.items()})
"""


def test_a_misspelt_delta_of_a_rule_that_trains_layer_by_layer_is_refused_too(sweep_file: Path, tmp_path: Path) -> None:
    (sweep_file.parent / "my_rules.py").write_text(MISSPELT)
    text = sweep_file.read_text().replace("seeds = [1, 2]", 'seeds = [1]\nmethods = ["mine"]').replace("layer_causal = [0.003, 0.05]\n", "")
    sweep_file.write_text(text.replace("vanilla = [0.003", "mine = [0.003") + '[[method]]\nname = "mine"\ncode = "my_rules.py:Sign"\n')
    (block,), store = make_plan(load_sweep(sweep_file)).blocks, Store(tmp_path / "store")
    store.prepare()
    with pytest.raises(SweepError, match=r"a delta must be named after a projection, such as .*got 'model.layers.0"):
        run_block(lm_for(block), block, store)
