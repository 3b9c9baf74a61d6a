"""Weights that have to be converted are converted once, are the same numbers, and are mapped by every process instead of copied."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iclgd_dist.config import ModelSpec, Resources, SweepError
from iclgd_dist.families import FAMILIES
from iclgd_dist.model import load
from iclgd_dist.prepared import prepared
from tests.tiny import tiny

HASH = "ab" * 32


pytestmark = pytest.mark.usefixtures("cache")


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    tiny(family, dtype).model.save_pretrained(folder / "model")
    return folder / "model"


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_prepared_model_has_the_numbers_of_one_that_is_rounded_and_raised_on_loading(family: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, family)
    folder = prepared(directory, HASH, storage_dtype="bfloat16", compute_dtype="float32")
    spec, resources = ModelSpec(source="model"), Resources(device_map="cpu")
    ours, plain = load(folder, spec, resources, storage_dtype="float32"), load(directory, spec, resources, storage_dtype="bfloat16")
    expected = plain.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.model.state_dict().items())
    assert not all(
        torch.equal(tensor, parameter) for tensor, parameter in zip(expected.values(), tiny(family, torch.float32).model.state_dict().values(), strict=True)
    )


def test_files_that_are_in_the_right_dtype_are_used_as_they_are(tmp_path: Path, cache: Path) -> None:
    directory = saved(tmp_path)
    assert prepared(directory, HASH, storage_dtype="float32", compute_dtype="float32") == directory
    assert not (cache / "prepared").exists()


def test_a_prepared_model_is_made_once_and_checked(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    folder = prepared(directory, HASH, storage_dtype="bfloat16", compute_dtype="float32")
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert prepared(directory, HASH, storage_dtype="bfloat16", compute_dtype="float32") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    assert prepared(directory, HASH, storage_dtype="float16", compute_dtype="float32") != folder
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(SweepError, match=r"model.safetensors is not what was written there; delete .*, and it is made anew"):
        prepared(directory, HASH, storage_dtype="bfloat16", compute_dtype="float32")


MEMORY = """
import re, sys
from pathlib import Path
import torch
from iclgd_dist.config import ModelSpec, Resources
from iclgd_dist.model import load

def anonymous() -> int:
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = anonymous()
lm = load(Path(sys.argv[1]), ModelSpec(source="model"), Resources(device_map="cpu"), storage_dtype=sys.argv[2])
sum(float(parameter.sum()) for parameter in lm.model.parameters())  # every page is read
print(anonymous() - before)
"""


@pytest.mark.slow
def test_a_prepared_model_takes_no_memory_of_its_own(tmp_path: Path) -> None:
    """40 MB of weights: mapped they are the page cache's, converted they are the process's."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 8000}
    AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    folder = prepared(tmp_path / "model", HASH, storage_dtype="bfloat16", compute_dtype="float32")
    num_kib = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1024
    grown = {
        place: int(re.findall(r"\d+", subprocess.run([sys.executable, "-c", MEMORY, place, dtype], capture_output=True, text=True, check=True).stdout)[-1])
        for place, dtype in ((tmp_path / "model", "bfloat16"), (folder, "float32"))
    }
    assert grown[tmp_path / "model"] > 0.9 * num_kib
    assert grown[folder] < 0.3 * num_kib
