"""Fixtures that many tests share: a tiny model on disk with a real tokenizer, and a labelled file of one's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.buckets import bucket, s3_server  # noqa: F401  fixtures

if TYPE_CHECKING:
    from tests.plans import Models

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray reads it when it is first imported

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
    from tests.tiny import save_tiny, save_tokenizer

    directory = tmp_path_factory.mktemp("tiny") / "model"
    save_tiny(directory, save_tokenizer(directory))
    return directory


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of good inputs, which each bad one is made from; the cache of models lies beside it."""
    from tests.bad_inputs import save_good

    folder = tmp_path_factory.mktemp("inputs") / "good"
    folder.mkdir()
    save_good(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return where this test's cache of models lies."""
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of the model of `tests.model_dirs`, which stays as it is."""
    from tests.model_dirs import save_directory

    directory = tmp_path_factory.mktemp("original") / "tiny"
    save_directory(directory)
    return directory


@pytest.fixture
def directory(original: Path, tmp_path: Path) -> Path:
    """Return a copy of it, to be changed."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    """Return the made-up models of `tests.plans`, which answer for all others."""
    from tests.plans import Models

    return Models().stand_in(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path, models: Models) -> Path:
    """Return a folder with the labelled files that the sweep of `tests.plans` names."""
    from tests.plans import data_in

    return data_in(tmp_path)


@pytest.fixture
def sweep_file(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a sweep file on the tiny model and a file of fruit, in a folder of its own; the model cache lies there too."""
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))
    return save_sweep(tmp_path, tiny_model)


@pytest.fixture(scope="module")
def shared_sweep_file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """Yield such a sweep file for all tests of a module."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICLGD_CACHE", str(folder / "cache"))
        yield save_sweep(folder, tiny_model)


def save_sweep(folder: Path, model: Path) -> Path:
    from tests.tiny import save_fruit

    (folder / "model").symlink_to(model)
    save_fruit(folder / "fruit.csv")
    path = folder / "tiny.toml"
    path.write_text(SWEEP.format(more=""))
    return path
