"""Damaged and hostile files: a few tries of each kind, the least that shows each fault which was found, and the fuzzer itself. `make fuzz` tries for 10 minutes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from fnmatch import filter as matching
from pathlib import Path
from typing import Any

import pytest

from iclgd_dist import cells, manifests
from iclgd_dist.files import Location
from iclgd_dist.schema import CELL
from iclgd_dist.store import Store
from tests import broken_targets, fuzz
from tests.fuzz_stores import STORE, reseal, rows_of
from tests.fuzz_targets import TARGETS
from tests.fuzzing import OURS, good

SEED = 7
TRIES = {"sweep": 30, "delimited": 30, "jsonl": 30, "parquet": 30, "pickle": 20, "page": 2}
Change = Callable[[bytes], bytes]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))  # targets set it too, and it is put back


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_refused_in_our_words_or_read_as_they_were(name: str, tmp_path: Path) -> None:
    for number in range(TRIES.get(name, 6)):
        assert TARGETS[name].attempt(TARGETS[name].case(SEED, number), tmp_path / str(number)) is None, number


# --- What was found: a file of a target, the least that is wrong with it, and the message


def with_values(**new: Any) -> Change:
    return lambda data: json.dumps(json.loads(data) | new).encode()


def line(text: str) -> Change:
    return lambda data: text.encode() + b"\n" + data


def swapped(old: bytes, new: bytes) -> Change:
    def change(data: bytes) -> bytes:
        assert data.count(old) == 1
        return data.replace(old, new)

    return change


def nested(times: int) -> Any:
    return json.loads("[" * times + "]" * times)


def token(number: int) -> Change:
    def change(data: bytes) -> bytes:
        content = json.loads(data)
        content["model"]["vocab"]["!"] = number
        return json.dumps(content).encode()

    return change


def without(tensor: str) -> Change:
    def change(data: bytes) -> bytes:
        from safetensors.torch import load, save

        tensors = load(data)
        del tensors[tensor]
        return save(tensors, metadata={"format": "pt"})

    return change


def with_cell(**new: Any) -> Change:
    def change(data: bytes) -> bytes:
        (table,) = cells.decode(data, Path("x.arrows"))
        (row,) = table.to_pylist()
        return cells.encode({name: value for name, value in row.items() if name in CELL.names} | new)

    return change


def with_resolved(**new: Any) -> Change:
    def change(data: bytes) -> bytes:
        content = json.loads(data)
        del content["sha256"]
        content["resolved"] |= new
        return json.dumps(content | {"sha256": manifests.checksum(content)}).encode()

    return change


def unnamed(data: bytes) -> bytes:
    content = json.loads(data)
    content["parts"][0]["commits"] = dict.fromkeys(content["parts"][0]["commits"], 1)
    return reseal("manifest", json.dumps(content).encode())


FOUND: dict[str, tuple[str, str, Change, str]] = {
    "a key of 200 parts": ("sweep", "x.toml", line("a" + ".a" * 200 + " = 1"), "a key has more than 100 parts"),
    "100,000 brackets": ("sweep", "x.toml", line("a = " + "[" * 100_000), "is nested too deeply"),
    "a number of 5,000 digits": ("sweep", "x.toml", line("a = " + "9" * 5000), "is not TOML"),
    "a configuration of 60 levels": ("config", "config.json", with_values(use_cache=nested(60)), "config.json: is nested too deeply: more than 50 levels"),
    "heads that are a list": (
        "config",
        "config.json",
        with_values(num_key_value_heads=[[]]),
        "num_key_value_heads in config.json must be a whole number from 1",
    ),
    "a width without an end": ("config", "config.json", with_values(head_dim=float("inf")), "head_dim in config.json must be a whole number from 1"),
    "a width beyond all": ("config", "config.json", with_values(hidden_size=2**60), "hidden_size in config.json must be a whole number from 1 to 16,777,216"),
    "a million layers": (
        "config",
        "config.json",
        with_values(num_hidden_layers=10**6),
        "num_hidden_layers in config.json must be a whole number from 1 to 1,000",
    ),
    "positions that are text": ("config", "config.json", with_values(max_position_embeddings="x"), "max_position_embeddings in config.json must be a whole"),
    "an activation that is none": (
        "config",
        "config.json",
        with_values(hidden_act="x"),
        "cannot be loaded (KeyError: 'x'); config.json must be that of its weights",
    ),
    "another width than the weights'": ("config", "config.json", with_values(intermediate_size=47), "config.json must be that of its weights"),
    "more layers than the weights'": ("config", "config.json", with_values(num_hidden_layers=3), "its files hold no weights for model.layers.2."),
    "a weight that is missing": ("safetensors", "model.safetensors", without("lm_head.weight"), "its files hold no weights for lm_head.weight"),
    "a length that is text": ("tokenizer", "tokenizer_config.json", with_values(model_max_length="x"), "its tokenizer cannot be loaded"),
    "token 2**31": ("tokenizer", "tokenizer.json", token(2**31), "the id of a token must be below 16,777,216, got 2,147,483,648"),
    "a GGUF that does not say how many layers": ("gguf", "x.gguf", swapped(b"block_count", b"block_count".upper()), "gives it 32 layers, its tensors are of 2"),
    "a GGUF that does not say its width": (
        "gguf",
        "x.gguf",
        swapped(b"llama.embedding_length", b"llama.embedding_LENGTH"),
        "its header describes 104,402,944 weights, more than it has bits",
    ),
    "a GGUF with no key heads": ("gguf", "x.gguf", swapped(b"head_count_kv\4\0\0\0\2", b"head_count_kv\4\0\0\0\0"), "cannot be converted: ZeroDivisionError"),
    "a protocol that is a list": ("page", "cells/*", with_cell(protocol="[]"), "protocol of a cell"),
    "an option that is no JSON": ("page", "cells/*", with_cell(method_options="{text}"), "method_options of a cell"),
    "a cell of the year 20,237": ("page", "cells/*", with_cell(created_at=2**59), "cells of a year beyond 9999"),
    "a cell without a task": ("page", "cells/*", with_cell(task=None), "cells without task"),
    "a sweep without a ratio": ("page", "sweeps/0123456789abcdef-*", with_resolved(analysis={}), ""),
    "a sweep of no orders": ("page", "sweeps/0123456789abcdef-*", with_resolved(orders=None), "a sweep.orders"),
    "a sweep of protocols that are numbers": ("page", "sweeps/0123456789abcdef-*", with_resolved(protocols=[1]), "a sweep.protocols.0"),
    "a claim of 100,000 brackets": ("store", "claims/*", lambda data: b"[" * 100_000, ""),
    "a manifest of 100,000 brackets": ("store", "compacted/manifest-*", lambda data: b"[" * 100_000, "is damaged"),
    "a manifest of version -1.5": ("store", "compacted/manifest-*", with_values(version=-1.5), "its version must be one of 1 to 3, got -1.5"),
    "a manifest of version 2 with the checksum of 3": ("store", "compacted/manifest-*", with_values(version=2), "its checksum is not that of its content"),
    "a manifest with a hash that is a number": ("store", "compacted/manifest-*", unnamed, "names and hashes must be text"),
    "an attempt with another outcome": ("store", "attempts/*", with_values(outcome="oom"), "its content is not that of its name"),
    "a sweep without the name of its checksum": ("store", "sweeps/*", swapped(b"sha256", b"sha257"), "holds columns this version does not know: 'sha257'"),
    "a sweep with another name": ("store", "sweeps/*", with_values(kind="search"), "its content is not that of its name"),
}


@pytest.mark.parametrize("case", FOUND)
def test_what_was_found_stays_mended(case: str, tmp_path: Path) -> None:
    target, pattern, change, message = FOUND[case]
    files = good(TARGETS[target])
    name = matching(files, pattern)[0]
    assert TARGETS[target].attempt({name: change(files[name])}, tmp_path / "x") is None
    try:
        if target == "store":
            rows_of(tmp_path / "x")
            Store(tmp_path / "x").sweeps()
        else:
            TARGETS[target].read(tmp_path / "x")
        said = ""
    except OURS as error:
        said = str(error)
    assert message in said
    assert bool(message) == bool(said)


# --- The fuzzer


def test_readers_that_raise_hang_die_or_take_all_memory_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "SAVED", tmp_path)
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "WAIT_SECONDS", 1.0)
    inputs, findings = fuzz.fuzz("tests.broken_targets", list(broken_targets.TARGETS), minutes=5, seed=1, tries=1)
    assert set(inputs) == set(broken_targets.TARGETS)
    said = {finding.target: finding.what for finding in findings}
    assert said.pop("raises").startswith("KeyError: 'x' at broken_targets.py")
    assert said.pop("spins").startswith("no answer")
    assert said.pop("sleeps").startswith("no answer")
    assert said.pop("dies").startswith("the process died with code -6")
    assert said.pop("swells").startswith("memory ran out")
    assert said == {}
    for finding in findings:
        (saved,) = finding.files.iterdir()
        assert saved.read_bytes() == broken_targets.TARGETS[finding.target].case(1, 0)["x"]


def test_a_reader_that_gives_other_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def believes(data: Any, path: Location) -> Any:
        return decode(reseal(path.name, bytes(data)) if path.suffix == ".arrows" else data, path)

    decode, store = cells.decode, TARGETS["store"]
    figure = struct.pack("<d", 5 / 7)
    (name,) = (name for name, data in good(store).items() if data.count(figure) == 1)
    files = {name: good(store)[name].replace(figure, struct.pack("<d", 6 / 7))}
    assert store.attempt(dict(files), tmp_path / "sound") is None
    monkeypatch.setattr(cells, "decode", believes)
    assert store.attempt(dict(files), tmp_path / "broken") == "rows differ and nothing says so: ['cells']"


def test_a_reader_that_gives_other_weights_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from iclgd_dist import model as models

    def drawn(*arguments: Any, **options: Any) -> Any:
        lm = load(*arguments, **options)
        lm.model.lm_head.weight.data.zero_()
        return lm

    load, config = models.load, TARGETS["config"]
    monkeypatch.setattr(models, "load", drawn)
    assert config.attempt({}, tmp_path / "x") == "weights that are not in the files: ['lm_head.weight']"


def test_the_same_seed_makes_the_same_tries() -> None:
    cases = [TARGETS["delimited"].case(seed, 3) for seed in (1, 1, 2)]
    assert cases[0] == cases[1] != cases[2]
    assert set(STORE.good()) == set(STORE.good())
