"""Untrained models: the weights of a loaded model drawn anew, in part or whole. The control that asks what training has to do with a similarity.

Knows the parts of a model and two initialisations. Knows nothing of devices: a weight depends on the seed and its name alone, wherever it rests.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import OffloadedWeightsLoader
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.integrations.accelerate import offload_weight
from transformers.pytorch_utils import Conv1D

from iclgd_dist.config import ModelSpec, SweepError
from iclgd_dist.families import Family, num_key_heads

KEPT: dict[str, frozenset[str]] = {
    "random": frozenset(),
    "embeddings_norms": frozenset({"embedding", "norm", "head"}),
    "norms": frozenset({"norm"}),
}


def part_of(model: Any, module: nn.Module) -> str:
    """Return what a module with weights of its own is: embedding (of tokens or positions), head, norm or linear.

    Errors: SweepError for anything else: it could be neither kept nor drawn with a meaning.
    """
    if module is model.get_output_embeddings():
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    if "Norm" in type(module).__name__:
        return "norm"
    raise SweepError(f"an untrained {model.config.model_type} cannot be made: {type(module).__name__} is no embedding, norm or linear map")


def redraw(model: Any, family: Family, spec: ModelSpec, offloaded: OffloadedWeightsLoader | None) -> None:
    """Give `model` the weights that `spec` asks for: trained ones stay, the others are drawn in float32 and rounded to the dtype they replace.

    Errors: SweepError for a module that is of no known part.
    """
    if spec.init_seed is None:
        return
    with init_empty_weights():
        skeleton = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
    copies: dict[str, list[str]] = {}  # names of one weight that is used in several places
    for name, source in model.all_tied_weights_keys.items():
        copies.setdefault(source, []).append(name)
    for name, tensor in _drawn(skeleton, family, spec, tied=set(model.all_tied_weights_keys)):
        for place in (name, *copies.get(name, ())):
            _put(model, place, tensor, offloaded)


def _drawn(skeleton: Any, family: Family, spec: ModelSpec, *, tied: set[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield name and values of every weight that is not kept, with one decoder layer or one outer module in memory at a time."""
    owners = {name.rpartition(".")[0] for name, _ in skeleton.named_parameters(remove_duplicate=False) if name not in tied}
    parts = {name: part_of(skeleton, skeleton.get_submodule(name)) for name in owners}
    layers = [f"{family.layers}.{n}" for n in range(len(attrgetter(family.layers)(skeleton)))]
    for root in (*layers, *(name for name in parts if not name.startswith(f"{family.layers}."))):
        unit = skeleton.get_submodule(root).to_empty(device="cpu")
        # Inner modules first, as in transformers: GPT-2's attention draws its output projection again, with a spread of its own.
        for inner, module in reversed(list(unit.named_modules(prefix=root))):
            if parts.get(inner) not in KEPT[spec.init]:
                _draw(skeleton, family, inner, module, parts.get(inner), spec)
        for name, weight in unit.named_parameters(prefix=root):
            if name not in tied and parts[name.rpartition(".")[0]] not in KEPT[spec.init]:
                yield name, weight.detach()
        unit.to_empty(device="meta")


@torch.no_grad()
def _draw(skeleton: Any, family: Family, name: str, module: nn.Module, part: str | None, spec: ModelSpec) -> None:
    """Fill one module's weights from a generator that is seeded by the model's seed and the module's name."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(hashlib.sha256(f"{spec.init_seed} {name}".encode()).hexdigest()[:8], 16))
        # A norm starts as the identity in both schemes; the class knows whether that is weight 1 or, in Gemma, 0.
        if spec.init_scheme == "model" or part == "norm":
            skeleton._init_weights(module)
        elif part is not None:
            _draw_as_fairseq(skeleton, family, name, module, part)


def _draw_as_fairseq(skeleton: Any, family: Family, name: str, module: Any, part: str) -> None:
    """Draw as fairseq's dense models: embeddings and head normal(0, 1 / sqrt(width)), projections Xavier-uniform, biases 0.

    The gain of query, key and value projections is 1 / sqrt(2); in a fused one each of the three has its own fan.
    Xavier's bound is gain x sqrt(6 / (inputs + outputs)).
    Source: fairseq, modules/multihead_attention.py (reset_parameters) and models/transformer (Embedding, Linear).
    """
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)
    if part in ("embedding", "head"):
        nn.init.normal_(module.weight, std=module.weight.shape[-1] ** -0.5)
        if getattr(module, "padding_idx", None) is not None:
            module.weight[module.padding_idx].zero_()
        return
    is_qkv = name.endswith(tuple(f".{path}" for path in (family.query, family.key, family.value)))
    weight_OI = module.weight.T if isinstance(module, Conv1D) else module.weight
    for rows in _separated(skeleton.config, family, weight_OI) if is_qkv and family.fused != "separate" else (weight_OI,):
        fans = rows.numel() // weight_OI.shape[1] + weight_OI.shape[1]
        rows.uniform_(-1, 1).mul_(math.sqrt((3 if is_qkv else 6) / fans))


def _separated(config: Any, family: Family, weight_OI: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of a fused projection that make queries, keys and values, as three views (groups, heads, channels, inputs)."""
    key_heads = num_key_heads(config.to_dict(), config.num_attention_heads)
    groups = 1 if family.fused == "blocks" else key_heads
    queries, keys = config.num_attention_heads // groups, key_heads // groups
    return weight_OI.unflatten(0, (groups, queries + 2 * keys, -1)).split([queries, keys, keys], dim=1)


def _put(model: Any, name: str, tensor: Tensor, offloaded: OffloadedWeightsLoader | None) -> None:
    """Replace one weight where it rests: in the module, in the memory it is offloaded to, or on disk (never in the model's own files)."""
    parameter = model.get_parameter(name)
    if parameter.device.type != "meta":
        parameter.data = tensor.to(parameter)
        return
    assert offloaded is not None, f"{name} is on no device and not offloaded"
    if name in offloaded.state_dict:
        offloaded.state_dict[name] = tensor.to(offloaded.state_dict[name])
    else:
        offload_weight(tensor.to(parameter.dtype), name, offloaded.save_folder, offloaded.index)
