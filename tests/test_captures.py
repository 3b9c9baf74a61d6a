"""Kept captures: whole or not there, the bits that were captured, and told from anything else by their hash."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from iclgd_dist import captures, sources
from iclgd_dist import plan as planning
from iclgd_dist.captures import keep, recall, verify
from iclgd_dist.config import load_sweep
from iclgd_dist.cost import capture_bytes
from iclgd_dist.encoding import encode
from iclgd_dist.files import StoreError
from iclgd_dist.layerwise import Prefix
from iclgd_dist.metrics import Capture
from iclgd_dist.model import load
from iclgd_dist.probes import Context, QueryPass
from iclgd_dist.store import Store
from iclgd_dist.upkeep import set_aside

KEY = "ab" * 32
FIELDS = [field.name for field in dataclasses.fields(Capture)]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    return store


def capture(seed: int = 0, dtype: torch.dtype = torch.float32) -> Capture:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(3, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype)[1]

    # One lane of three, as a block captures them: views of larger tensors.
    return Capture(attention_LQD=draw(2, 5, 8), scores_LQHT=draw(2, 5, 4, 7), label_scores_QC=draw(5, 2).double())


def same(a: Capture | None, b: Capture) -> bool:
    assert a is not None
    pairs = [(getattr(a, name), getattr(b, name)) for name in FIELDS]
    return all(x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_recalled_is_what_was_captured_bit_for_bit(store: Store, dtype: torch.dtype) -> None:
    original = capture(dtype=dtype)
    file, sha256 = keep(store, KEY, original)
    assert file == f"captures/{KEY}.safetensors"
    assert hashlib.sha256((store.root / file).read_bytes()).hexdigest() == sha256
    assert same(recall(store, KEY, sha256), original)
    assert load_file(store.root / file).keys() >= {"attention_LQD", "scores_LQHT", "label_scores_QC"}


def test_a_capture_that_is_kept_twice_stays_the_first_and_both_are_told_its_hash(store: Store) -> None:
    first = keep(store, KEY, capture(0))
    assert keep(store, KEY, capture(0)) == first
    assert keep(store, KEY, capture(1)) == first
    assert same(recall(store, KEY, first[1]), capture(0))
    assert keep(store, "cd" * 32, capture(0)) == (f"captures/{'cd' * 32}.safetensors", first[1])


def test_a_capture_that_was_deleted_is_none(store: Store) -> None:
    file, sha256 = keep(store, KEY, capture())
    (store.root / file).unlink()
    assert recall(store, KEY, sha256) is None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "another"])
def test_a_damaged_capture_is_an_error_that_names_it(store: Store, damage: str) -> None:
    file, sha256 = keep(store, KEY, capture())
    path = store.root / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    other = (store.root / keep(store, "cd" * 32, capture(1))[0]).read_bytes()
    path.write_bytes({"cut": data[:-1], "flip": data, "empty": b"", "another": other}[damage])
    with pytest.raises(StoreError, match=r"captures/abab.*is damaged: its sha256 is not that of the cell's row"):
        recall(store, KEY, sha256)
    store.commit({"key": KEY, "kind": "icl", "capture_file": file, "capture_sha256": sha256})
    (found,) = verify(store)
    assert found.filename == str(path)
    assert len(verify(store, aside=lambda path: set_aside(store, path))) == 1
    assert verify(store) == []
    assert recall(store, KEY, sha256) is None
    assert len(list((store.root / "set_aside").iterdir())) == 1


def test_a_capture_of_a_newer_version_is_refused_with_the_advice_to_update(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = dataclasses.make_dataclass("Capture", [*FIELDS, "gradients_LQD"])
    with monkeypatch.context() as patch:
        patch.setattr(captures, "Capture", newer)
        _, sha256 = keep(store, KEY, newer(*(torch.ones(n + 1) for n in range(len(FIELDS) + 1))))
    with pytest.raises(StoreError, match="tensors this version does not know: gradients_LQD; update iclgd"):
        recall(store, KEY, sha256)


@pytest.mark.parametrize("point", ["mid_write", "before_link", "after_link"])
def test_a_process_killed_while_it_keeps_a_capture_leaves_a_whole_one_or_none(store: Store, point: str) -> None:
    program = """
import os, sys
from iclgd_dist import store
from tests.test_captures import KEY, capture, keep
store.fault_point = lambda point: os._exit(9) if point == sys.argv[2] else None
keep(store.Store(sys.argv[1]), KEY, capture())
"""
    done = subprocess.run([sys.executable, "-c", program, str(store.root), point], cwd=Path(__file__).parent.parent, env=os.environ, check=False)
    assert done.returncode == 9
    names = [name for name in os.listdir(store.root / "captures") if not name.startswith(".")]
    assert names == ([f"{KEY}.safetensors"] if point == "after_link" else [])
    assert same(recall(store, KEY, keep(store, KEY, capture())[1]), capture())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_plan_says_the_bytes_that_a_kept_capture_takes(sweep_file: Path, tmp_path: Path, dtype: str) -> None:
    sweep_file.write_text(sweep_file.read_text().replace('source = "model"', f'source = "model"\ncompute_dtype = "{dtype}"'))
    block = planning.make_plan(load_sweep(sweep_file)).blocks[0]
    tokenizer = sources.load_tokenizer(block.model)
    lm = load(sources.fetch(block.model), block.spec, block.resources, storage_dtype=block.storage_dtype)
    encoded = encode(block.draw, tokenizer, protocol=block.protocol, max_positions=512)
    columns = torch.cat([torch.arange(*item) for item in encoded.context_items])
    prefix = Prefix(lm, torch.tensor(encoded.context_ids))
    query_pass = QueryPass(lm, encoded.queries, encoded.label_ids, context=Context(prefix, len(encoded.context_ids), columns))
    with torch.no_grad():
        for index, layer in enumerate(lm.layers):
            prefix.replay.climb(layer, index)
            query_pass.climb(layer, index)
    store = Store(tmp_path / "store")
    store.prepare()
    size = (store.root / keep(store, KEY, query_pass.captures()[0])[0]).stat().st_size
    assert block.cost.capture_bytes == capture_bytes(encoded, config=block.model.config, compute_dtype=dtype)
    assert 0 < size - block.cost.capture_bytes < 1000
