"""Pickled weights become the same numbers in safetensors; what a pickle names is never run. What is refused: tests/bad_inputs.py."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from iclgd_dist.config import ModelSpec, SweepError
from iclgd_dist.model_files import INDEX, SINGLE
from iclgd_dist.pickles import convert_pickles
from iclgd_dist.sources import identify

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def pickled(tmp_path: Path, tiny_model: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a model directory without weights, and the weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix == ".json":
            (directory / path.name).write_bytes(path.read_bytes())
    return directory, load_file(tiny_model / SINGLE)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_one_pickle_becomes_one_file_of_the_same_numbers(pickled: tuple[Path, dict[str, torch.Tensor]], name: str, is_zip: bool) -> None:
    directory, weights = pickled
    weights["also"] = weights["model.norm.weight"]  # one tensor under two names
    weights["turned"] = weights["model.embed_tokens.weight"].T.bfloat16()
    torch.save(weights, directory / name, _use_new_zipfile_serialization=is_zip)
    if name == "pytorch_model.bin":
        (directory / "optimizer.pt").write_bytes(b"of the training, and never read")
    with pytest.raises(SweepError, match=r"got only pickles .* `iclgd convert-weights DIR`"):
        identify(ModelSpec(source=str(directory)))
    assert convert_pickles(directory) == [directory / SINGLE]
    found = load_file(directory / SINGLE)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert (directory / name).exists() and not list(directory.glob("*.new"))


def test_shards_become_shards_with_an_index_and_the_model_can_be_used(pickled: tuple[Path, dict[str, torch.Tensor]]) -> None:
    directory, weights = pickled
    names = sorted(weights)
    places = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, directory / file)
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    made = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert [path.name for path in convert_pickles(directory)] == made
    assert set(identify(ModelSpec(source=str(directory))).files) >= {INDEX, *made}
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if name in weights)


class Runs:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_code_in_a_pickle_is_never_run_though_pickle_itself_would(pickled: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    directory, weights = pickled
    torch.save(weights | {"more": Runs(tmp_path / "marker")}, directory / "pytorch_model.bin")
    with pytest.raises(SweepError, match=r"must hold tensors and nothing else, it names posix\.mkdir; nothing of it was run"):
        convert_pickles(directory)
    assert not (tmp_path / "marker").exists() and not (directory / SINGLE).exists()
    torch.load(directory / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "marker").exists()


def test_what_cannot_be_written_leaves_nothing_half_done(pickled: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    directory, weights = pickled
    torch.save(weights, directory / "pytorch_model.bin")

    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if self.suffix == ".new":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(SweepError, match=r"cannot be written \(OSError: .*No space left on device\); copy it to where you may write"):
        convert_pickles(directory)
    assert not list(directory.glob("*safetensors*"))
