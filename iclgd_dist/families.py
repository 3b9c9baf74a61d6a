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
    """Paths are attribute paths: from the causal-LM model for `layers`, `norm`, `head`; from a decoder layer for the rest."""

    model_type: str
    layers: str
    norm: str | None  # final norm of the early exit; None or absent on the model: the identity
    attention: str  # the attention module; its output is what attention outputs are captured from
    key: str  # module whose output holds the keys
    value: str
    head: str = "lm_head"
    project_out: str | None = None  # between final norm and head (OPT 350M)
    # separate: k and v have modules of their own. blocks: one module, output = q | k | v. heads: one module, per head q | k | v.
    fused: Literal["separate", "blocks", "heads"] = "separate"
    # Where scores are read: "interface" = transformers' AttentionInterface; "projections" = outputs of the query and key modules
    # (only for families without rotary positions or q/k-norms, whose attention function cannot be replaced).
    scores: Literal["interface", "projections"] = "interface"
    query: str = ""  # module of the queries; needed for scores = "projections"
    position: Literal["rotary", "learned", "sinusoidal"] = "rotary"


def _like_llama(model_type: str) -> Family:
    return Family(model_type, "model.layers", "model.norm", "self_attn", "self_attn.k_proj", "self_attn.v_proj")


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _like_llama("llama"),
        _like_llama("qwen3"),
        Family("gpt2", "transformer.h", "transformer.ln_f", "attn", "attn.c_attn", "attn.c_attn", fused="blocks", position="learned"),
        Family(
            "gpt_neox",
            "gpt_neox.layers",
            "gpt_neox.final_layer_norm",
            "attention",
            "attention.query_key_value",
            "attention.query_key_value",
            fused="heads",
        ),
        Family(
            "opt",
            "model.decoder.layers",
            "model.decoder.final_layer_norm",
            "self_attn",
            "self_attn.k_proj",
            "self_attn.v_proj",
            project_out="model.decoder.project_out",
            position="learned",
        ),
        Family(
            "xglm",
            "model.layers",
            "model.layer_norm",
            "self_attn",
            "self_attn.k_proj",
            "self_attn.v_proj",
            scores="projections",
            query="self_attn.q_proj",
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
