"""Loading through accelerate, in any place, gives the same numbers; storage and compute dtype are two things."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iclgd_dist.config import ModelSpec, Resources, SweepError
from iclgd_dist.families import FAMILIES, family_of
from iclgd_dist.layerwise import Replay
from iclgd_dist.model import LanguageModel, load
from iclgd_dist.updates import METHODS, TrainingSequence
from tests.tiny import ids, tiny


def loaded(directory: Path, *, device_map: str = "cpu", storage: str = "float32", compute: str = "float32", **resources) -> LanguageModel:
    spec = ModelSpec(source=str(directory), compute_dtype=compute)
    return load(directory, spec, Resources(device_map=device_map, **resources), storage_dtype=storage)


def exits(lm: LanguageModel) -> torch.Tensor:
    replay = Replay(lm, torch.tensor([ids(9, seed=3), ids(9, seed=4)]))
    with torch.no_grad():
        for index in range(lm.num_layers):
            with lm.resident(index) as layer:
                replay.climb(layer, index)
        return lm.early_exit(replay.hidden_BTD)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("place", [{"device_map": "disk"}, {"device_map": "auto", "max_memory": {"cpu": "60kB"}}], ids=["disk", "cpu limit"])
def test_weights_on_disk_give_the_same_logits_and_deltas_as_weights_in_memory(family: str, place: dict, tmp_path: Path) -> None:
    tiny(family, torch.float32).model.save_pretrained(tmp_path)
    there, here = loaded(tmp_path, **place), loaded(tmp_path)
    assert any(parameter.device.type == "meta" for parameter in there.model.parameters()), "nothing was offloaded"
    assert torch.equal(exits(there), exits(here))
    sequences = [TrainingSequence(torch.tensor(ids(6, seed=n)), 1) for n in range(3)]
    for method in METHODS.values():
        (a,), (b,) = (list(method.train(lm, sequences, [0.1, 0.2], steps=[3])) for lm in (there, here))
        assert all(torch.equal(a.deltas[name].weight_NIO, delta.weight_NIO) for name, delta in b.deltas.items())
    assert all(parameter.device.type == "meta" for parameter in there.layers.parameters()), "a layer stayed resident"


def test_weights_come_in_once_while_a_layer_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import hooks

    tiny("llama", torch.float32).model.save_pretrained(tmp_path)
    lm = loaded(tmp_path, device_map="disk")
    loads: list[str] = []
    real = hooks.set_module_tensor_to_device
    monkeypatch.setattr(
        hooks,
        "set_module_tensor_to_device",
        lambda module, name, device, **k: (loads.append(name) if str(device) != "meta" else None, real(module, name, device, **k))[1],
    )
    replays = [Replay(lm, torch.tensor([ids(5, seed=n)])) for n in range(4)]
    loads.clear()
    with torch.no_grad(), lm.resident(0) as layer:
        for replay in replays:
            replay.climb(layer, 0)
    assert sorted(loads) == sorted(name for name, _ in lm.layers[0].named_parameters())


def test_storage_dtype_rounds_the_weights_and_compute_dtype_is_what_they_are_used_in(tmp_path: Path) -> None:
    tiny("llama", torch.float32).model.save_pretrained(tmp_path)
    exact = load_file(tmp_path / "model.safetensors")
    for place in ("cpu", "disk"):
        lm = loaded(tmp_path, device_map=place, storage="bfloat16")
        with lm.resident(1):
            weight = lm.layers[1].self_attn.q_proj.weight
            assert weight.dtype == torch.float32
            assert torch.equal(weight, exact["model.layers.1.self_attn.q_proj.weight"].bfloat16().float())
    assert loaded(tmp_path, compute="float64").layers[0].self_attn.q_proj.weight.dtype == torch.float64
    assert loaded(tmp_path, compute="float64").delta_dtype == torch.float64
    low = loaded(tmp_path, storage="bfloat16", compute="bfloat16")
    assert low.delta_dtype == torch.float32
    assert exits(low).dtype == torch.bfloat16


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_tables_that_are_computed_and_not_stored_are_not_rounded_with_the_weights(place: str, tmp_path: Path) -> None:
    for family, module, name in (("xglm", "model.embed_positions", "weights"), ("llama", "model.rotary_emb", "inv_freq")):
        folder = tmp_path / family
        exact = tiny(family, torch.float32)
        exact.model.save_pretrained(folder)
        lm = loaded(folder, device_map=place, storage="float16")
        expected = getattr(exact.model.get_submodule(module), name)
        got = getattr(lm.model.get_submodule(module), name)
        assert got.dtype == torch.float32
        assert torch.equal(got, expected)
        assert not torch.equal(expected, expected.half().float()), "the table would survive rounding: nothing is tested"


def test_base_weights_ask_for_no_gradient_and_dropout_is_off(tmp_path: Path) -> None:
    tiny("gpt2", torch.float32).model.save_pretrained(tmp_path)
    lm = loaded(tmp_path)
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert not any(module.training for module in lm.model.modules())


def test_an_unknown_architecture_is_refused_with_the_list_of_families() -> None:
    with pytest.raises(SweepError, match=r"unknown architecture \(model_type\) 'bert'; known: bloom, cohere, falcon, .* stablelm, xglm") as refusal:
        family_of("bert")
    assert all(model_type in str(refusal.value) for model_type in FAMILIES)
