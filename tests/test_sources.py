"""Directories as sources: the same files have the same hash wherever they lie, bad files are refused before they are opened, and nothing is done twice."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from iclgd_dist import model_files, sources
from iclgd_dist.config import ModelSpec, SweepError
from tests.model_dirs import (
    INDEX,
    TEXT,
    WEIGHTS,
    a_pickle_for_a_shard,
    a_pipe_for_a_shard,
    a_pipe_for_an_index,
    an_empty_index,
    cut,
    dangling,
    edit_index,
    edit_json,
    fifo,
    identify,
    in_shards,
    message,
    one_byte_more,
    only_pickles,
)

pytestmark = pytest.mark.usefixtures("cache")


def test_importing_the_module_imports_neither_torch_nor_transformers_nor_the_hub() -> None:
    check = "import sys, iclgd_dist.sources; sys.exit(bool({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


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
