"""Loading through accelerate, in any place, gives the same numbers; storage and compute dtype are two things."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iclgd_dist.config import ModelSpec, Resources, SweepError
from iclgd_dist.families import FAMILIES, family_of
from iclgd_dist.layerwise import Replay
from iclgd_dist.model import LanguageModel, load
from iclgd_dist.updates import TrainingSequence, Vanilla
from tests.tiny import METHODS, VOCABULARY, ids, save_tiny, tiny


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
        for a, b in zip(*(list(method.train(lm, sequences, [0.1, 0.2], steps=[1, 3])) for lm in (there, here)), strict=True):
            assert all(torch.equal(a.deltas[name].weight_NIO, delta.weight_NIO) for name, delta in b.deltas.items())
            assert torch.equal(a.gradient_norm_SNL, b.gradient_norm_SNL)
    assert all(parameter.device.type == "meta" for parameter in there.layers.parameters()), "a layer stayed resident"


def files_mapped() -> int:
    """How many files of an offload folder this process maps whose names are gone."""
    return sum("iclgd-offload-" in line and line.rstrip().endswith("(deleted)") for line in Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_what_is_kept_of_a_model_on_disk_rests_there_and_its_tables_as_they_are_stored(tmp_path: Path) -> None:
    model = tiny("llama", torch.float32).model
    model.config.tie_word_embeddings = False  # a table that is both is raised as a whole
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(tmp_path)
    here, there = loaded(tmp_path, storage="bfloat16"), loaded(tmp_path, storage="bfloat16", device_map="disk")
    assert here.offload_folder is None and type(here.zeros(3, dtype=torch.float32)) is torch.Tensor
    before = files_mapped()
    kept = there.zeros(3, 5, dtype=torch.float32)
    assert kept.shape == (3, 5) and not kept.any() and files_mapped() == before + 1
    replay = Replay(there, torch.tensor([ids(9, seed=3)]))
    assert replay.hidden_BTD.dtype == torch.float32
    states = replay.hidden_BTD.clone()
    replay.rest(there)
    assert torch.equal(replay.hidden_BTD, states) and files_mapped() == before + 2
    assert {module.weight.dtype for module in (there.model.get_input_embeddings(), there.model.lm_head)} == {torch.bfloat16}
    with there.head() as head:
        assert head.rows(slice(2, 4)).dtype == torch.float32
    assert torch.equal(exits(there), exits(here))
    for method in METHODS.values():
        (a,), (b,) = (list(method.train(lm, [TrainingSequence(torch.tensor(ids(6, seed=1)), 1)], [0.1, 0.2], steps=[1])) for lm in (there, here))
        assert all(torch.equal(a.deltas[name].weight_NIO, delta.weight_NIO) for name, delta in b.deltas.items())
    assert not [path for path in Path(there.offload_folder.name).iterdir() if path.name.startswith("tmp")]
    del kept, replay
    assert files_mapped() == before


def loads_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that grows by the name of every offloaded weight that comes in."""
    from accelerate import hooks

    loads: list[str] = []
    real = hooks.set_module_tensor_to_device
    monkeypatch.setattr(
        hooks,
        "set_module_tensor_to_device",
        lambda module, name, device, **k: (loads.append(name) if str(device) != "meta" else None, real(module, name, device, **k))[1],
    )
    return loads


def test_vanilla_under_offload_holds_one_layer_at_a_time_and_brings_each_in_twice_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", torch.float32, layers=6).model.save_pretrained(tmp_path)
    lm = loaded(tmp_path, device_map="disk")
    loads, resident = loads_of(monkeypatch), list[int]()
    real = torch.autograd.grad

    def watched(*args, **options):  # the graph, and what it holds, is largest when a gradient is asked for
        found = real(*args, **options)
        resident.append(sum(any(parameter.device.type != "meta" for parameter in layer.parameters()) for layer in lm.layers))
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    list(Vanilla().train(lm, [TrainingSequence(torch.tensor(ids(6, seed=n)), 1) for n in range(3)], [0.1, 0.2], steps=[3]))
    assert max(resident) == 1
    assert all(parameter.device.type == "meta" for parameter in lm.layers.parameters()), "a layer stayed resident after backward"
    assert len(loads) == 3 * 2 * len(list(lm.layers.parameters()))
    loads.clear()
    list(Vanilla(layers=(4,)).train(lm, [TrainingSequence(torch.tensor(ids(6, seed=1)), 1)], [0.1], steps=[1]))
    assert len(loads) == (6 + 2) * len(list(lm.layers[0].parameters())), "no gradient goes below the lowest layer that learns"


def test_vanilla_under_offload_keeps_the_graph_of_one_layer(tmp_path: Path) -> None:
    """What autograd saves at once does not grow with the number of layers; in memory it does."""
    most: dict[tuple[str, int], int] = {}
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        tiny("llama", torch.float32, layers=layers).model.save_pretrained(folder)
        for place in ("disk", "cpu"):
            held = dict[int, int]()
            lm = loaded(folder, device_map=place)

            def pack(tensor: torch.Tensor, held: dict[int, int] = held, key: tuple[str, int] = (place, layers)) -> torch.Tensor:
                if tensor.dim() == 3:
                    saved = tensor.clone()  # autograd drops it with the graph
                    held[id(saved)] = saved.nbytes
                    weakref.finalize(saved, held.pop, id(saved), None)
                    most[key] = max(most.get(key, 0), sum(held.values()))
                    return saved
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
                list(Vanilla().train(lm, [TrainingSequence(torch.tensor(ids(30, seed=1)), 1)], [0.1], steps=[1]))
    assert most["disk", 8] <= 1.1 * most["disk", 2]
    assert most["cpu", 8] >= 3 * most["cpu", 2]


def test_weights_come_in_once_while_a_layer_is_resident(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama", torch.float32).model.save_pretrained(tmp_path)
    lm = loaded(tmp_path, device_map="disk")
    loads = loads_of(monkeypatch)
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


def test_how_precisely_a_process_computes_is_set_anew_by_each_model_that_it_loads(tmp_path: Path) -> None:
    save_tiny(tmp_path, VOCABULARY)

    def policy(**options: bool) -> tuple[bool, ...]:
        load(tmp_path, ModelSpec(source="tiny", **options), Resources(device_map="cpu"), storage_dtype="float32")
        fused = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
        return torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled(), *fused

    assert policy() == (False, False, True, True)
    assert policy(tf32=True) == (True, False, True, True)
    assert policy(deterministic=True) == (False, True, False, False)
    assert policy() == (False, False, True, True)
