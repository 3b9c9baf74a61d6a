"""Untrained models: what is kept is the trained bits, what is drawn has the spread that its scheme promises, and only the seed and the name decide it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from iclgd_dist.config import ModelSpec, Resources, SweepError
from iclgd_dist.model import LanguageModel, load
from iclgd_dist.untrained import part_of
from tests.test_model import exits
from tests.tiny import VARIANTS, WIDTH, config, tiny

PLACES = {"cpu": {"device_map": "cpu"}, "disk": {"device_map": "disk"}, "cpu limit": {"device_map": "auto", "max_memory": {"cpu": "60kB"}}}
every_variant = pytest.mark.parametrize("variant", list(VARIANTS))
every_scheme = pytest.mark.parametrize("scheme", ["model", "fairseq"])


@pytest.fixture
def folder(variant: str, tmp_path: Path) -> Path:
    tiny(variant, torch.float32).model.save_pretrained(tmp_path)
    return tmp_path


def untrained(folder: Path, init: str, scheme: str = "model", *, seed: int = 1, place: str = "cpu", storage: str = "float32") -> LanguageModel:
    how = {} if init == "trained" else {"init": init, "init_scheme": scheme, "init_seeds": (seed,)}
    return load(folder, ModelSpec(source=str(folder), **how), Resources(**PLACES[place]), storage_dtype=storage)


def weights(lm: LanguageModel) -> dict[str, Tensor]:
    return dict(lm.model.named_parameters())


PARTS = {"head": r"^(lm_head|embed_out)\.", "norm": r"norm|\bln_", "embedding": r"embed|\bwte\b|\bwpe\b", "linear": ""}


def by_name(name: str) -> str:
    """Say what a weight is from its name alone; the package asks for its module's class."""
    return next(part for part, pattern in PARTS.items() if re.search(pattern, name))


@every_variant
def test_every_weight_of_every_family_is_of_a_known_part(variant: str) -> None:
    model = tiny(variant).model
    found = {name: part_of(model, model.get_submodule(name.rpartition(".")[0])) for name, _ in model.named_parameters(remove_duplicate=False)}
    assert found == {name: by_name(name) for name in found}
    assert set(found.values()) >= {"embedding", "norm", "linear"}


def test_a_weight_of_no_known_part_is_refused_by_its_class() -> None:
    class Gate(nn.Module):
        pass

    with pytest.raises(SweepError, match="an untrained llama cannot be made: Gate is no embedding, norm or linear map"):
        part_of(tiny("llama").model, Gate())


@every_variant
def test_kept_weights_are_the_trained_bits_and_no_other_weight_is(variant: str, folder: Path) -> None:
    trained = weights(untrained(folder, "trained"))
    for init, kept in {"random": set(), "embeddings_norms": {"embedding", "norm", "head"}, "norms": {"norm"}}.items():
        drawn = weights(untrained(folder, init, "fairseq"))
        assert trained.keys() == drawn.keys()
        for name, weight in drawn.items():
            assert torch.equal(weight, trained[name]) == (by_name(name) in kept), f"{init}: {name}"


@every_variant
def test_a_scheme_of_the_models_own_has_the_spread_that_transformers_gives_it(variant: str, folder: Path) -> None:
    torch.manual_seed(5)
    own = dict(AutoModelForCausalLM.from_config(config(variant), dtype=torch.float32).named_parameters())
    for name, weight in weights(untrained(folder, "random")).items():
        same_spread(weight, own[name], name)


def same_spread(weight: Tensor, other: Tensor, name: str) -> None:
    """Assert that two draws have the same mean and deviation, within 5 standard errors; what is constant must be the same bits."""
    if not other.std() > 0:
        assert torch.equal(weight, other), name
        return
    spread = float(other.std())
    assert abs(float(weight.mean() - other.mean())) < 5 * spread * math.sqrt(2 / weight.numel()), name
    assert abs(float(weight.std()) / spread - 1) < 5 / math.sqrt(weight.numel()), name
    assert not torch.equal(weight, other)


@every_variant
def test_fairseqs_scheme_is_xavier_with_the_fans_of_separate_projections(variant: str, folder: Path) -> None:
    drawn, own = weights(untrained(folder, "random", "fairseq")), weights(untrained(folder, "random"))
    for name, weight in drawn.items():
        part = by_name(name)
        if part == "norm" or name.endswith("bias"):
            assert torch.equal(weight, own[name] if part == "norm" else torch.zeros_like(weight)), name
            continue
        if part in ("embedding", "head"):
            assert abs(float(weight.std()) * weight.shape[1] ** 0.5 - 1) < 5 / math.sqrt(weight.numel()), name
            continue
        is_qkv = re.search(r"[qkv]_proj|c_attn|query_key_value|Wqkv|qkv_proj", name)
        for rows in fused_rows(variant, weight) if re.search(r"c_attn|query_key_value|Wqkv|qkv_proj", name) else [weight]:
            bound = (2**-0.5 if is_qkv else 1.0) * math.sqrt(6 / sum(rows.shape))
            assert 0.98 * bound < float(rows.abs().max()) <= bound, name
            assert abs(float(rows.std()) * math.sqrt(3) / bound - 1) < 5 / math.sqrt(rows.numel()), name


def fused_rows(variant: str, weight: Tensor) -> list[Tensor]:
    """Return the matrices of q, k and v, head by head as the modules of transformers read them: 4 heads of 8 channels, as many key heads as listed."""
    if variant == "gpt2":
        return list(weight.T.reshape(3, 32, 32))
    key_heads = {"phi3": 2, "falcon": 1, "falcon_grouped": 2}.get(variant, 4)
    rows = {"q": range(32), "k": range(32, 32 + 8 * key_heads), "v": range(32 + 8 * key_heads, 32 + 16 * key_heads)}
    if variant == "falcon_grouped":  # two query heads, a key head, a value head; again
        rows = {"q": [*range(16), *range(32, 48)], "k": [*range(16, 24), *range(48, 56)], "v": [*range(24, 32), *range(56, 64)]}
    elif key_heads == 4 and not variant.startswith("mpt"):
        rows = {part: [24 * head + 8 * n + d for head in range(4) for d in range(8)] for n, part in enumerate("qkv")}
    return [weight[list(numbers)] for numbers in rows.values()]


@every_variant
@pytest.mark.parametrize("init", ["norms"])
def test_weights_that_rest_elsewhere_are_the_same_weights(variant: str, init: str, folder: Path) -> None:
    files = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    here = exits(untrained(folder, init))
    for place in ("disk", "cpu limit"):
        there = untrained(folder, init, place=place)
        assert any(parameter.device.type == "meta" for parameter in there.layers.parameters()), "nothing was offloaded"
        assert torch.equal(exits(there), here), place
    assert not torch.allclose(here, exits(untrained(folder, "trained")), rtol=0.1)
    assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()} == files, "the model's own files were written"


@pytest.mark.parametrize("variant", ["llama", "gpt_neox"])
@every_scheme
def test_only_the_seed_and_the_name_of_a_weight_decide_it(variant: str, scheme: str, tmp_path: Path) -> None:
    for layers in (2, 3):
        tiny(variant, torch.float32, layers=layers).model.save_pretrained(tmp_path / str(layers))
    torch.manual_seed(8)
    state = torch.get_rng_state()
    small = weights(untrained(tmp_path / "2", "random", scheme))
    assert torch.equal(torch.get_rng_state(), state), "the draw is seen by other users of random numbers"
    torch.manual_seed(9)
    large, kept = (weights(untrained(tmp_path / "3", init, scheme)) for init in ("random", "embeddings_norms"))
    other = weights(untrained(tmp_path / "3", "random", scheme, seed=2))
    for name, weight in large.items():
        assert name not in small or torch.equal(small[name], weight), name
        assert by_name(name) != "linear" or torch.equal(kept[name], weight), name
        assert torch.equal(other[name], weight) == (not weight.std() > 0), name
    assert len({hashlib.sha256(weight.numpy().tobytes()).digest() for weight in matrices(large)}) == len(list(matrices(large))), "two weights are alike"


def matrices(named: dict[str, Tensor]) -> Iterator[Tensor]:
    return (weight for weight in named.values() if weight.dim() == 2)


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("variant", ["llama", "gpt2", "opt", "xglm"])
def test_an_output_head_that_is_tied_to_the_embedding_stays_tied(variant: str, place: str, folder: Path) -> None:
    for init in ("random", "norms"):
        lm = untrained(folder, init, "fairseq", place=place)
        embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
        with torch.no_grad():
            logits = head(torch.eye(WIDTH)).T
            states = embedding(torch.arange(len(logits))) / getattr(embedding, "embed_scale", 1.0)
        assert torch.allclose(logits, states, rtol=1e-6), init


@pytest.mark.parametrize("place", list(PLACES))
@pytest.mark.parametrize("variant", ["gpt2"])
def test_what_is_drawn_is_rounded_to_the_storage_dtype(variant: str, place: str, folder: Path) -> None:
    exact, low = untrained(folder, "random"), untrained(folder, "random", place=place, storage="bfloat16")
    with low.resident(1):
        rounded = low.layers[1].attn.c_attn.weight
        assert rounded.dtype == torch.float32
        assert torch.equal(rounded, exact.layers[1].attn.c_attn.weight.bfloat16().float())
        assert not torch.equal(rounded, exact.layers[1].attn.c_attn.weight)
