"""Tiny random models of every supported family, and prompts of token ids for them. Not a test."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from iclgd_dist import sources
from iclgd_dist.blocks import Block
from iclgd_dist.extensions import BUILTIN
from iclgd_dist.families import FAMILIES
from iclgd_dist.model import LanguageModel, attention_of, load
from iclgd_dist.updates import Method, make_method

VOCABULARY, WIDTH, HEADS, LAYERS = 97, 32, 4, 3
WINDOW = 6  # shorter than every context
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DROP = {"attention_dropout": 0.1}  # must not act: models are in evaluation mode
_SHAPE = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": 48}
_GROUPED = _SHAPE | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 5, "sliding_window": WINDOW}
_LEARNED = {"max_position_embeddings": 256}
_OPT = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "ffn_dim": 48, "word_embed_proj_dim": WIDTH} | _LEARNED | _DROP
_FALCON = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "bias": True}
_MPT = {"d_model": WIDTH, "n_heads": HEADS, "max_seq_len": 128}

METHODS: dict[str, Method] = {name: make_method(spec) for name, spec in BUILTIN.items()}


@dataclass(frozen=True)
class Variant:
    """One row of the table of families: a configuration, in words and in options."""

    config: str  # class of transformers
    special: str  # what a reader of the table should know
    options: dict[str, Any] = field(default_factory=dict)
    layers: str = "num_hidden_layers"  # what the configuration calls its number of layers


VARIANTS: dict[str, Variant] = {
    "llama": Variant("LlamaConfig", "grouped keys, tied head", _GROUPED | {"tie_word_embeddings": True}),
    "mistral": Variant("MistralConfig", "sliding window in every layer", _GROUPED | {"sliding_window": WINDOW}),
    "qwen2": Variant(
        "Qwen2Config", "biases, sliding window in some layers", _GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    "qwen3": Variant("Qwen3Config", "q and k norms by head", _GROUPED | {"head_dim": 16}),
    "gemma2": Variant(
        "Gemma2Config",
        "soft caps on scores and logits, sliding window, post-norms",
        _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3_text": Variant("Gemma3TextConfig", "q and k norms, sliding window, two rotary tables, post-norms", _GEMMA),
    "phi": Variant(
        "PhiConfig", "parallel MLP, partly rotary", _GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    ),
    "phi_normed": Variant("PhiConfig", "q and k norms", _SHAPE | {"qk_layernorm": True}),
    "phi3": Variant("Phi3Config", "fused q, k, v with grouped keys, fused gate, sliding window", _GROUPED | {"sliding_window": WINDOW}),
    "gpt2": Variant("GPT2Config", "fused q, k, v; learned positions", {"n_embd": WIDTH, "n_head": HEADS, "n_positions": 256}, "n_layer"),
    "gpt_neo": Variant(
        "GPTNeoConfig",
        "scores not scaled, sliding window in every other layer",
        {"hidden_size": WIDTH, "num_heads": HEADS, "intermediate_size": 48, "window_size": WINDOW} | _LEARNED | _DROP,
        "num_layers",
    ),
    "gpt_neox": Variant("GPTNeoXConfig", "q, k, v interleaved by head, partly rotary, parallel MLP", _SHAPE | {"rotary_pct": 0.5} | _DROP),
    "gptj": Variant("GPTJConfig", "rotary by pairs inside the attention", {"n_embd": WIDTH, "n_head": HEADS, "n_positions": 128, "rotary_dim": 4}, "n_layer"),
    "opt": Variant("OPTConfig", "learned positions", _OPT),
    "opt_projected": Variant("OPTConfig", "projections in and out", _OPT | {"word_embed_proj_dim": 16}),
    "opt_post_norm": Variant(
        "OPTConfig", "post-norms, no final norm, projections in and out", _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    ),
    "xglm": Variant("XGLMConfig", "sinusoidal positions", {"d_model": WIDTH, "ffn_dim": 48, "attention_heads": HEADS} | _LEARNED | _DROP, "num_layers"),
    "bloom": Variant("BloomConfig", "ALiBi; q, k, v interleaved by head", {"hidden_size": WIDTH, "n_head": HEADS}, "n_layer"),
    "falcon": Variant("FalconConfig", "rotary, one key head, parallel MLP", _FALCON | {"multi_query": True}),
    "falcon_grouped": Variant("FalconConfig", "rotary, grouped keys interleaved", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Variant("FalconConfig", "ALiBi, q, k, v interleaved by head", _FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "mpt": Variant("MptConfig", "ALiBi; fused q, k, v", _MPT, "n_layers"),
    "mpt_clipped": Variant("MptConfig", "clipped q, k, v; own scaling", _MPT | {"attn_config": {"clip_qkv": 0.8, "softmax_scale": 0.2}}, "n_layers"),
    "olmo2": Variant("Olmo2Config", "q and k norms over all heads, post-norms", _GROUPED),
    "stablelm": Variant("StableLmConfig", "a quarter rotary, biases", _GROUPED | {"use_qkv_bias": True}),
    "stablelm_normed": Variant("StableLmConfig", "a norm per q and k head, parallel MLP", _GROUPED | {"qk_layernorm": True, "use_parallel_residual": True}),
    "granite": Variant(
        "GraniteConfig",
        "multipliers of embeddings, scores, residuals and logits",
        _GROUPED | {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "cohere": Variant("CohereConfig", "scaled logits, parallel MLP, rotary by pairs", _GROUPED | {"logit_scale": 0.5}),
    "cohere_normed": Variant("CohereConfig", "q and k norms", _GROUPED | {"use_qk_norm": True}),
}


def config(variant: str, layers: int = LAYERS) -> PretrainedConfig:
    row = VARIANTS[variant]
    more: dict[str, Any] = {row.layers: layers}
    if variant.startswith("gemma"):
        more["layer_types"] = ["sliding_attention" if n % 2 == 0 else "full_attention" for n in range(layers)]
    if variant == "gpt_neo":
        more["attention_types"] = [[["local" if n % 2 else "global"], 1] for n in range(layers)]
    return getattr(transformers, row.config)(**_IDS, **row.options, **more)


def tiny(variant: str, dtype: torch.dtype = torch.float64, *, layers: int = LAYERS) -> LanguageModel:
    """Return a random model of a family."""
    torch.manual_seed(0)
    made = config(variant, layers)
    family = FAMILIES[made.model_type]
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(made, dtype=dtype, attn_implementation=attention_of(family))
    finally:
        torch.set_default_dtype(previous)
    fill(model, variant)
    model.eval().requires_grad_(False)
    return LanguageModel(model, family, variant, None, dtype)


@torch.no_grad()
def fill(model: Any, variant: str) -> None:
    """Draw weights that are large enough for attention to matter, and biases that are not zero."""
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or ".ln_" in name
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).to(parameter.dtype)
        offset = 1.0 if is_norm and name.endswith("weight") and not variant.startswith("gemma") else 0.0  # Gemma's own norms add the 1
        parameter.copy_(values * (0.1 if is_norm or parameter.dim() == 1 else 0.25) + offset)


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


FRUIT = ["apple", "pear", "plum", "fig", "date", "mango", "peach", "grape", "lemon", "lime", "sloe", "quince", "tamarind", "cherry", "melon", "papaya"]


def save_fruit(path: Path) -> None:
    """Write a labelled file of one's own."""
    rows = [f"a {size} {name},{'sour' if number % 2 else 'sweet'}" for number, name in enumerate(FRUIT) for size in ("small", "large", "ripe")]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")


def save_tokenizer(directory: Path, letters: str = "") -> int:
    """Write a byte-level tokenizer, in which a space and one of these letters are one token; return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "Ġ"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) + [space + letter for letter in letters]
    vocabulary = {"<s>": 0, "</s>": 1} | {token: n + 2 for n, token in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(space, letter) for letter in letters]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return len(vocabulary)


def save_tiny(directory: Path, vocabulary: int) -> None:
    """Write a random two-layer llama as transformers would."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, max_position_embeddings=512, initializer_range=0.2, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)


def lm_for(block: Block) -> LanguageModel:
    """Load the model of a block, as an actor does."""
    torch.set_num_threads(2)
    directory = sources.fetch(block.model)
    return load(directory, block.spec, block.resources, storage_dtype=block.storage_dtype, tokenizer=sources.load_tokenizer(block.model))
