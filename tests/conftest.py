"""Fixtures that many tests share: a tiny model on disk with a real tokenizer, and a labelled file of one's own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SWEEP = """
name = "tiny"
tasks = ["fruit"]
seeds = [1, 2]
num_demonstrations = 4
num_queries = 8
steps = [2, 4]
{more}
[learning_rates]
vanilla = [0.003, 0.05]
layer_causal = [0.003, 0.05]

[[models]]
source = "model"

[[task]]
name = "fruit"
file = "fruit.csv"
template = "Is {{text}} sweet?"
labels = {{ sweet = "Yes", sour = "No" }}
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a random two-layer llama with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import save_tiny

    directory = tmp_path_factory.mktemp("tiny") / "model"
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1} | {c: n + 2 for n, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    save_tiny(directory, len(alphabet) + 2)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
    return directory


@pytest.fixture
def sweep_file(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a sweep file on the tiny model and a file of fruit, in a folder of its own; the model cache lies there too."""
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").symlink_to(tiny_model)
    fruit = ["apple", "pear", "plum", "fig", "date", "mango", "peach", "grape", "lemon", "lime", "sloe", "quince", "tamarind", "cherry", "melon", "papaya"]
    rows = [f"a {size} {name},{'sour' if number % 2 else 'sweet'}" for number, name in enumerate(fruit) for size in ("small", "large", "ripe")]
    (tmp_path / "fruit.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    path = tmp_path / "tiny.toml"
    path.write_text(SWEEP.format(more=""))
    return path
