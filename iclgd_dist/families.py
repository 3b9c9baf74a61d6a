"""One row per supported architecture: where its layers, projections and output head are, and how its attention is reached.

Knows attribute paths of transformers' classes. Knows nothing of weights, prompts or training. Adding a family is one row here and one in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from iclgd_dist.config import SweepError
from iclgd_dist.toml_text import unknown


@dataclass(frozen=True)
class Family:
    """Paths are attribute paths: from the causal-LM model for `layers`, `norm`, `head`, `project_out`; from a decoder layer for the rest."""

    model_type: str
    layers: str
    norm: str | None  # final norm of the early exit; None or absent on the model: the identity
    attention: str  # the module in which queries meet keys
    query: str  # module whose output holds the queries; fused: the same as key and value
    key: str
    value: str
    output: str  # output projection of the attention; what it returns is the attention output
    mlp: tuple[str, ...]  # the linear modules of the MLP
    is_gated: bool = False  # three matrices in the MLP, fused ones counted apart
    head: str = "lm_head"
    project_out: str | None = None  # between final norm and head (OPT 350M)
    query_norm: str | None = None  # after the query projection, before rotation; absent on the layer: none
    is_norm_by_head: bool = False  # query_norm returns (B, H, T, d), not tokens first
    # separate: q, k and v have modules of their own. blocks: one module, output = q | k | v.
    # groups: one module, for each key head its query heads, then k, then v.
    fused: Literal["separate", "blocks", "groups"] = "separate"
    # Where scores are read: "interface" = transformers' AttentionInterface; "product" = the first product of two activations in `attention`.
    scores: Literal["interface", "product"] = "interface"
    scaling: float | str | None = None  # of that product: a number, an attribute of `attention`, None = 1/sqrt(channels of a head)
    implementation: Literal["sdpa", "eager"] = "sdpa"  # transformers' attention function that computes
    position: Literal["rotary", "alibi", "learned", "sinusoidal"] = "rotary"

    @property
    def has_relative_positions(self) -> bool:
        """Whether queries and keys depend on no absolute position: a context in front leaves the scores of layer 0 as they are."""
        return self.position in ("rotary", "alibi")


_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def _like_llama(model_type: str, query_norm: str | None = None) -> Family:
    q, k, v, o = (f"self_attn.{part}_proj" for part in "qkvo")
    return Family(model_type, "model.layers", "model.norm", "self_attn", q, k, v, o, _GATED, is_gated=True, query_norm=query_norm)


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _like_llama("llama"),
        _like_llama("qwen3", "self_attn.q_norm"),
        Family(
            "gpt2",
            "transformer.h",
            "transformer.ln_f",
            "attn",
            "attn.c_attn",
            "attn.c_attn",
            "attn.c_attn",
            "attn.c_proj",
            ("mlp.c_fc", "mlp.c_proj"),
            fused="blocks",
            position="learned",
        ),
        Family(
            "gpt_neox",
            "gpt_neox.layers",
            "gpt_neox.final_layer_norm",
            "attention",
            "attention.query_key_value",
            "attention.query_key_value",
            "attention.query_key_value",
            "attention.dense",
            ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
            fused="groups",
        ),
        Family(
            "opt",
            "model.decoder.layers",
            "model.decoder.final_layer_norm",
            "self_attn",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            ("fc1", "fc2"),
            project_out="model.decoder.project_out",
            position="learned",
        ),
        Family(
            "xglm",
            "model.layers",
            "model.layer_norm",
            "self_attn",
            "self_attn.q_proj",
            "self_attn.k_proj",
            "self_attn.v_proj",
            "self_attn.out_proj",
            ("fc1", "fc2"),
            scores="product",
            scaling=1.0,  # its queries are scaled before the product
            implementation="eager",
            position="sinusoidal",
        ),
    )
}


def family_of(model_type: str) -> Family:
    """Return the row of an architecture.

    Errors: SweepError listing the supported families.
    """
    if model_type not in FAMILIES:
        raise SweepError(unknown("architecture (model_type)", model_type, list(FAMILIES)))
    return FAMILIES[model_type]
