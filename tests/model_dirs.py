"""A tiny model as a directory and as a GGUF file, how either can be damaged, and what is said of it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iclgd_dist import sources
from iclgd_dist.config import ModelSpec, SweepError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<s>", "</s>", *ALPHABET, "he", "ll", "hell", "Ġb"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "b")]
TEXT = "hello bell, Ünicode 123\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads))


def save_directory(directory: Path) -> None:
    """Save the model, and a tokenizer that a GGUF file can hold too."""
    tiny_model().save_pretrained(directory)
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(TOKENS)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(directory)


def identify(source: str | Path, **options: Any) -> sources.ModelIdentity:
    return sources.identify(ModelSpec(source=str(source)), **options)


def message(source: str | Path, **options: Any) -> str:
    with pytest.raises(SweepError) as raised:
        identify(source, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def in_shards(directory: Path) -> None:
    LlamaForCausalLM.from_pretrained(directory).save_pretrained(directory, max_shard_size="40KB")
    (directory / WEIGHTS).unlink()


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_index(shard: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        in_shards(directory)
        edit_json(directory / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": shard}))

    return damage


def fifo(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / name).unlink(missing_ok=True)
        os.mkfifo(directory / name)

    return damage


def cut(directory: Path) -> None:
    os.truncate(directory / WEIGHTS, (directory / WEIGHTS).stat().st_size - 1)


def one_byte_more(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes() + b"\0")


def only_pickles(directory: Path) -> None:
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def dangling(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to("nowhere")


def a_pipe_for_an_index(directory: Path) -> None:
    only_pickles(directory)
    fifo(INDEX)(directory)


def an_empty_index(directory: Path) -> None:
    only_pickles(directory)
    (directory / INDEX).write_text("{}")


def a_pickle_for_a_shard(directory: Path) -> None:
    edit_index("pytorch_model.bin")(directory)
    (directory / "pytorch_model.bin").write_text("a pickle")


def a_pipe_for_a_shard(directory: Path) -> None:
    edit_index("pipe.safetensors")(directory)
    fifo("pipe.safetensors")(directory)


def rotate(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The order of rows llama.cpp wants in queries and keys: pairs of the two halves of each head."""
    rows, columns = weight.shape
    half = rows // heads // 2
    return torch.stack([weight[head * 2 * half + part * half + row] for head in range(heads) for row in range(half) for part in range(2)]).reshape(
        rows, columns
    )


def write_gguf(path: Path) -> LlamaForCausalLM:
    """Write a two-layer llama: float32, but its down projections in 4 bits."""
    model, writer = tiny_model(), gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3] + [1] * (len(TOKENS) - 2))
    writer.add_token_merges([f"{left} {right}" for left, right in MERGES])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    names |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    names |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    for name, weight in model.state_dict().items():
        if name in whole:
            writer.add_tensor(whole[name], weight.numpy())
            continue
        _, _, layer, rest = name.split(".", 3)
        target = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        if "q_proj" in name or "k_proj" in name:
            weight = rotate(weight, 4 if "q_proj" in name else 2)
        if "down_proj" in name:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(target, gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def nested(path: Path) -> None:
    """Write a GGUF file whose metadata are an array of an array of an array ..."""
    deep = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
    key = b"general.architecture"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + deep)
