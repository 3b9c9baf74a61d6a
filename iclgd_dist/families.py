"""One row per supported architecture: where its layers, projections and output head are, and how its attention is reached.

Knows attribute paths of transformers' classes. Knows nothing of weights, prompts or training. Adding a family is one row here and one in the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    logits: tuple[Literal["times", "over", "cap"], str] | None = None  # what the model does to them, and the number's name in its config
    query_norm: str | None = None  # after the query projection, before rotation; absent on the layer: none
    is_norm_by_head: bool = False  # query_norm returns (B, H, T, d), not tokens first
    # separate: q, k and v have modules of their own. blocks: one module, output = q | k | v.
    # groups: one module, for each key head its query heads, then k, then v.
    fused: Literal["separate", "blocks", "groups"] = "separate"
    # Where scores are read: "interface" = transformers' AttentionInterface; "product" = the first product of two activations in `attention`.
    scores: Literal["interface", "product"] = "interface"
    scaling: float | str | None = None  # of that product: a number, an attribute of `attention`, None = 1/sqrt(channels of a head)
    implementation: Literal["sdpa", "eager"] = "sdpa"  # transformers' attention function that computes
    adds_plainly: bool = True  # the attention output is added to the residual stream as it is: no norm and no factor in between
    returns_tuple: bool = False  # what a layer returns: (states, ...), not states
    position: Literal["rotary", "alibi", "learned", "sinusoidal"] = "rotary"

    @property
    def has_relative_positions(self) -> bool:
        """Whether queries and keys depend on no absolute position: a context in front leaves the scores of layer 0 as they are."""
        return self.position in ("rotary", "alibi")


_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_FALCON_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def _separate(attention: str, output: str) -> tuple[str, str, str, str, str]:
    """Return the paths of an attention whose projections are modules of their own."""
    return (attention, f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj", f"{attention}.{output}")


def _fused(attention: str, projection: str, output: str) -> tuple[str, str, str, str, str]:
    """Return the paths of an attention whose queries, keys and values come from one module."""
    return (attention, *[f"{attention}.{projection}"] * 3, f"{attention}.{output}")  # type: ignore[return-value]


def _like_llama(model_type: str, **special: Any) -> Family:
    return Family(model_type, "model.layers", "model.norm", *_separate("self_attn", "o_proj"), _GATED, is_gated=True, **special)


FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        _like_llama("llama"),
        _like_llama("mistral"),
        _like_llama("qwen2"),
        _like_llama("qwen3", query_norm="self_attn.q_norm"),
        # Its scores are soft-capped, which SDPA cannot do.
        _like_llama("gemma2", adds_plainly=False, implementation="eager", logits=("cap", "final_logit_softcapping")),
        _like_llama("gemma3_text", adds_plainly=False, query_norm="self_attn.q_norm", is_norm_by_head=True, logits=("cap", "final_logit_softcapping")),
        _like_llama("olmo2", adds_plainly=False, query_norm="self_attn.q_norm"),
        _like_llama("stablelm", query_norm="self_attn.q_layernorm", is_norm_by_head=True),
        _like_llama("granite", adds_plainly=False, logits=("over", "logits_scaling")),
        _like_llama("cohere", query_norm="self_attn.q_norm", logits=("times", "logit_scale")),
        Family(
            "phi",
            "model.layers",
            "model.final_layernorm",
            *_separate("self_attn", "dense"),
            ("mlp.fc1", "mlp.fc2"),
            query_norm="self_attn.q_layernorm",
            is_norm_by_head=True,
        ),
        Family(
            "phi3",
            "model.layers",
            "model.norm",
            *_fused("self_attn", "qkv_proj", "o_proj"),
            ("mlp.gate_up_proj", "mlp.down_proj"),
            is_gated=True,
            fused="blocks",
        ),
        Family(
            "gpt2", "transformer.h", "transformer.ln_f", *_fused("attn", "c_attn", "c_proj"), ("mlp.c_fc", "mlp.c_proj"), fused="blocks", position="learned"
        ),
        Family(
            "gpt_neo",
            "transformer.h",
            "transformer.ln_f",
            *_separate("attn.attention", "out_proj"),
            ("mlp.c_fc", "mlp.c_proj"),
            scores="product",
            returns_tuple=True,
            scaling=1.0,
            implementation="eager",
            position="learned",
        ),
        Family("gpt_neox", "gpt_neox.layers", "gpt_neox.final_layer_norm", *_fused("attention", "query_key_value", "dense"), _FALCON_MLP, fused="groups"),
        Family(
            "gptj",
            "transformer.h",
            "transformer.ln_f",
            *_separate("attn", "out_proj"),
            ("mlp.fc_in", "mlp.fc_out"),
            scores="product",
            returns_tuple=True,
            implementation="eager",
        ),
        Family(
            "opt",
            "model.decoder.layers",
            "model.decoder.final_layer_norm",
            *_separate("self_attn", "out_proj"),
            ("fc1", "fc2"),
            project_out="model.decoder.project_out",
            position="learned",
        ),
        Family(
            "xglm",
            "model.layers",
            "model.layer_norm",
            *_separate("self_attn", "out_proj"),
            ("fc1", "fc2"),
            scores="product",
            scaling=1.0,  # its queries are scaled before the product
            implementation="eager",
            position="sinusoidal",
        ),
        Family(
            "bloom",
            "transformer.h",
            "transformer.ln_f",
            *_fused("self_attention", "query_key_value", "dense"),
            _FALCON_MLP,
            fused="groups",
            scores="product",
            returns_tuple=True,
            implementation="eager",
            position="alibi",
        ),
        Family(
            "falcon",
            "transformer.h",
            "transformer.ln_f",
            *_fused("self_attention", "query_key_value", "dense"),
            _FALCON_MLP,
            fused="groups",
            scores="product",
            returns_tuple=True,
            implementation="sdpa",  # its eager attention adds ALiBi twice
            position="rotary",  # or ALiBi
        ),
        Family(
            "mpt",
            "transformer.blocks",
            "transformer.norm_f",
            *_fused("attn", "Wqkv", "out_proj"),
            ("ffn.up_proj", "ffn.down_proj"),
            fused="blocks",
            scores="product",
            returns_tuple=True,
            scaling="softmax_scale",
            implementation="eager",
            position="alibi",
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


def num_key_heads(config: Mapping[str, Any], num_heads: int) -> int:
    """Return how many key heads a configuration has; groups of query heads share them."""
    if config.get("model_type") == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else num_heads
    return size(config, "num_key_value_heads", "num_kv_heads", default=num_heads)


def size(config: Mapping[str, Any], *names: str, default: int = 0, most: int = 2**24) -> int:
    """Return the size that a configuration has under the first of these names that it sets. Errors: SweepError for what is no size."""
    for name in names:
        if value := config.get(name):
            is_whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
            if isinstance(value, bool) or not is_whole or not 1 <= value <= most:
                raise SweepError(f"{name} in config.json must be a whole number from 1 to {most:,}, got {value!r:.80}")
            return int(value)
    return default
