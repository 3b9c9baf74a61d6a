"""Tiny random models of every supported family, and prompts of token ids for them. Not a test."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig, PretrainedConfig, Qwen3Config, XGLMConfig

from iclgd_dist.families import FAMILIES
from iclgd_dist.model import LanguageModel, attention_of

VOCABULARY, WIDTH, HEADS, LAYERS = 97, 32, 4, 3
_IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DROP = {"attention_dropout": 0.1}  # must not act: models are in evaluation mode


def config(family: str, layers: int = LAYERS) -> PretrainedConfig:
    if family == "llama":
        return LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            **_IDS,
        )
    if family == "qwen3":
        return Qwen3Config(
            hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=16, **_IDS
        )
    if family == "gpt2":
        return GPT2Config(n_embd=WIDTH, n_layer=layers, n_head=HEADS, n_positions=256, **_IDS)
    if family == "gpt_neox":
        return GPTNeoXConfig(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=HEADS, rotary_pct=0.5, **_IDS, **_DROP)
    if family == "opt":
        return OPTConfig(
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            ffn_dim=48,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            max_position_embeddings=256,
            **_IDS,
            **_DROP,
        )
    if family == "xglm":
        return XGLMConfig(d_model=WIDTH, ffn_dim=48, num_layers=layers, attention_heads=HEADS, max_position_embeddings=256, **_IDS, **_DROP)
    raise KeyError(family)


def tiny(family: str, dtype: torch.dtype = torch.float64, *, layers: int = LAYERS, attention: str | None = None) -> LanguageModel:
    """Return a random model with weights large enough for attention to matter and biases that are not zero."""
    torch.manual_seed(0)
    if attention is None:
        attention = attention_of(FAMILIES[family])
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = AutoModelForCausalLM.from_config(config(family, layers), dtype=dtype, attn_implementation=attention)
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name or ".ln_" in name
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name) + parameter.numel())).to(dtype)
            parameter.copy_(values * (0.1 if is_norm or parameter.dim() == 1 else 0.25) + (1.0 if is_norm and name.endswith("weight") else 0.0))
    model.eval().requires_grad_(False)
    return LanguageModel(model, FAMILIES[family], family, None, dtype)


def ids(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def save_tiny(directory: Path, vocabulary: int) -> None:
    """Write a random two-layer llama as transformers would."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=vocabulary, bos_token_id=0, eos_token_id=1, max_position_embeddings=512, initializer_range=0.2, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
