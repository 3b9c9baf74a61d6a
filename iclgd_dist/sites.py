"""Sites: the projections of a layer that can be trained, whether they are modules of their own or columns of a fused one.

Knows modules and shapes. Knows nothing of deltas, losses or tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from iclgd_dist.model import LanguageModel

# What a sweep calls a set of weights -> parts of a layer: query, key, value and output projection of the attention, and the MLP.
WEIGHTS: Mapping[str, tuple[str, ...]] = {
    "attn_k": ("k",),
    "attn_v": ("v",),
    "attn_kv": ("k", "v"),
    "attn_q": ("q",),
    "attn_o": ("o",),
    "mlp": ("mlp",),
    "all_linear": ("q", "k", "v", "o", "mlp"),
}


@dataclass(frozen=True)
class Site:
    """One projection that can be trained: a module, or the query, key or value columns of a fused one."""

    name: str  # e.g. model.layers.3.self_attn.k_proj; fused: transformer.h.3.attn.c_attn.k
    part: str  # q, k, v, o, or mlp.<module name>
    module: nn.Module
    num_inputs: int
    num_outputs: int
    has_bias: bool
    columns: Tensor | None  # of the module's output; None = all


def sites(lm: LanguageModel, index: int, parts: Sequence[str] = ("k", "v")) -> dict[str, Site]:
    """Return the sites of a layer by part, in the order of `parts`; "mlp" stands for one site per linear module, keys `mlp.<module name>`."""
    family = lm.family
    attention = {"q": family.query, "k": family.key, "v": family.value, "o": family.output}
    found: dict[str, Site] = {}
    for part in parts:
        paths = {f"mlp.{path.rpartition('.')[2]}": path for path in family.mlp} if part == "mlp" else {part: attention[part]}
        found |= {key: _site(lm, index, key, path) for key, path in paths.items()}
    return found


def _site(lm: LanguageModel, index: int, part: str, path: str) -> Site:
    module = attrgetter(path)(lm.layers[index])
    num_inputs, num_outputs = _shape(module)
    columns = None
    if lm.family.fused != "separate" and part in ("q", "k", "v"):
        columns = _columns(lm.family.fused, part, num_outputs, lm.num_heads, lm.num_key_heads, lm.device_of(lm.layers[index]))
        num_outputs = len(columns)
    name = f"{lm.family.layers}.{index}.{path}" + ("" if columns is None else f".{part}")
    return Site(name, part, module, num_inputs, num_outputs, getattr(module, "bias", None) is not None, columns)


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return int(module.nx), int(module.nf)  # transformers' Conv1D


@cache
def _columns(fused: str, part: str, num_outputs: int, num_heads: int, num_key_heads: int, device: torch.device) -> Tensor:
    """Return which outputs of a fused projection are queries, keys or values, in the order of heads; made once, on the device they are used on."""
    groups = 1 if fused == "blocks" else num_key_heads
    queries, keys = num_heads // groups, num_key_heads // groups
    heads = torch.arange(num_outputs).view(groups, queries + 2 * keys, -1)
    sizes = {"q": slice(0, queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, None)}
    return heads[:, sizes[part]].reshape(-1).to(device)
