"""What `tests/fuzz.py` tries: for each kind of file a good example, how it is damaged, and how the project reads it."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from xxhash import xxh3_64

from iclgd_dist.config import SweepError, load_sweep
from iclgd_dist.store_errors import StoreError, Vanished
from tests import mutations

Files = dict[str, bytes | None]  # name -> content, None where it is gone
OURS = (SweepError, StoreError, Vanished)  # what the command line says in one message
MEMORY_BYTES = 2 << 30  # above what a worker has when it begins
ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Target:
    """One kind of input. `read` raises one of our errors or returns; what it returns is a finding, in words."""

    good: Callable[[], dict[str, bytes]]
    damage: Callable[[dict[str, bytes], random.Random], Files]
    read: Callable[[Path], str | None]
    share: int = 2  # of the time

    def case(self, seed: int, number: int) -> Files:
        """Return the files that differ from the good ones."""
        return self.damage(dict(good(self)), random.Random(f"{seed} {number}"))

    def attempt(self, files: Files, folder: Path) -> str | None:
        """Return what is wrong with how damaged files are read; None where all is well."""
        for name, content in (good(self) | files).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        try:
            return self.read(folder)
        except OURS as error:
            return "memory ran out, and that was taken for damage" if has_memory_error(error) else None
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            ours = next((frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if "iclgd_dist" in frame.filename), place)
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return f"{said} at {Path(ours.filename).name}:{ours.lineno} from {Path(place.filename).name}:{place.lineno}"


def has_memory_error(error: BaseException | None) -> bool:
    return error is not None and (isinstance(error, MemoryError) or has_memory_error(error.__cause__ or error.__context__))


@functools.cache
def good(target: Target) -> dict[str, bytes]:
    return target.good()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one(names: str, how: mutations.Mutation = mutations.some_of) -> Callable[[dict[str, bytes], random.Random], Files]:
    """Return what damages one of some files."""

    def damage(files: dict[str, bytes], choose: random.Random) -> Files:
        name = choose.choice(names.split())
        return {name: how(files[name], choose)}

    return damage


# --- Sweep files


def _sweeps() -> dict[str, bytes]:
    from tests.test_config import GOOD

    more = '[search]\nsamples = 8\nconstraints = ["balanced_accuracy >= zero_shot"]\n[search.learning_rates]\nvanilla = [1e-4, 1e-1]\n'
    return {path.name: path.read_bytes() for path in (ROOT / "sweeps").glob("*.toml")} | {"x.toml": GOOD.encode(), "search.toml": (GOOD + more).encode()}


def _damage_sweep(files: dict[str, bytes], choose: random.Random) -> Files:
    data = files[choose.choice(sorted(files))]
    if choose.random() < 0.5:
        lines = data.split(b"\n")
        for _ in range(choose.choice([1, 2, 4])):
            place = choose.randrange(len(lines))
            name = lines[place].partition(b"=")[0]
            value = choose.choice([json.dumps(mutations.strange(choose)), choose.choice(mutations.NUMBERS), "2026-01-01", "[1, [2], {a=3}]", "[1, 1, 1]"])
            lines[place] = name + b"= " + value.encode()
        return {"x.toml": b"\n".join(lines)}
    return {"x.toml": mutations.some_of(data, choose)}


def _read_sweep(folder: Path) -> None:
    from iclgd_dist.plan import count_cells

    sweep = load_sweep(folder / "x.toml")
    if count_cells(sweep)[0] < 10_000:
        assert sweep.digest() == load_sweep(folder / "x.toml").digest()
    json.dumps(sweep.resolved(), allow_nan=False)


# --- Task files


def _tasks() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": f"a text \u00e9 {number}", "label": str(number % 2), "n": number} for number in range(40)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, separator in (("x.csv", ","), ("x.tsv", "\t")):
            with (folder / name).open("w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
                writer.writeheader()
                writer.writerows(rows)
        (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
        pq.write_table(pa.Table.from_pylist(rows), folder / "x.parquet")
        pq.write_table(pa.Table.from_pylist(rows), folder / "plain.parquet", compression="none", use_dictionary=False)
        return contents(folder)


def _damage_jsonl(data: bytes, choose: random.Random) -> bytes:
    lines = data.split(b"\n")
    place = choose.randrange(len(lines))
    lines[place] = mutations.as_json(lines[place], choose)
    return b"\n".join(lines) if choose.random() < 0.6 else mutations.some_of(data, choose)


def _read_task(folder: Path) -> None:
    from iclgd_dist.task_spec import OwnTask
    from iclgd_dist.tasks import draw, load_task

    for path in folder.iterdir():
        own = OwnTask(name="x", file=path.name, template="{text} {n}", labels={"0": "No", "1": "Yes"})
        task = load_task("x", own=own, folder=folder)
        if min(len(task.train), len(task.queries)) > 2:
            draw(task, num_demonstrations=2, seed=1, order=1, num_queries=2, query_seed=1)


# --- Models


@functools.cache
def _model() -> dict[str, bytes]:
    from tests.tiny import save_tiny, save_tokenizer

    with tempfile.TemporaryDirectory() as place:
        save_tiny(Path(place), save_tokenizer(Path(place)))
        return contents(Path(place))


@functools.cache
def _shards() -> dict[str, bytes]:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as place:
        for name, content in _model().items():
            (Path(place) / name).write_bytes(content)
        AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False).save_pretrained(place, max_shard_size="40KB")
        (Path(place) / "model.safetensors").unlink()
        return contents(Path(place))


def _gguf() -> dict[str, bytes]:
    from tests.test_sources import write_gguf

    with tempfile.TemporaryDirectory() as place:
        write_gguf(Path(place) / "x.gguf")
        return contents(Path(place))


PLANNED = """
name = "x"
tasks = ["fruit"]
seeds = [1]
num_demonstrations = 2
num_queries = 4
steps = [2]
learning_rates = [0.01]
models = [{{ source = "{model}" }}]
[[task]]
name = "fruit"
file = "fruit.csv"
template = "Is {{text}} sweet?"
labels = {{ sweet = "Yes", sour = "No" }}
"""


def _plan(folder: Path, model: str) -> Any:
    from iclgd_dist.plan import make_plan
    from tests.tiny import save_fruit

    os.environ["ICLGD_CACHE"] = str(folder / "cache")
    save_fruit(folder / "fruit.csv")
    (folder / "x.toml").write_text(PLANNED.format(model=model))
    return make_plan(load_sweep(folder / "x.toml"))


def _read_model(folder: Path) -> str | None:
    import torch
    from safetensors.torch import load_file

    from iclgd_dist.loading import load_model

    plan = _plan(folder, ".")
    if not plan.blocks:
        return None
    lm = load_model(plan.blocks[0])
    held = {name: weight for path in folder.glob("*.safetensors") for name, weight in load_file(path).items()}
    other = [name for name, weight in lm.model.named_parameters() if name not in held or not torch.equal(weight, held[name].to(weight.dtype))]
    return f"weights that are not in the files: {other[:3]}" if other else None


def _pickles() -> dict[str, bytes]:
    import torch

    with tempfile.TemporaryDirectory() as place:
        tensors = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}
        torch.save(tensors, Path(place) / "pytorch_model.bin")
        torch.save(tensors, Path(place) / "old.bin", _use_new_zipfile_serialization=False)
        return contents(Path(place))


def _damage_pickle(files: dict[str, bytes], choose: random.Random) -> Files:
    return {"pytorch_model.bin": mutations.some_of(files[choose.choice(sorted(files))], choose), "old.bin": None}


def _read_pickle(folder: Path) -> None:
    from iclgd_dist.pickles import convert_pickles

    convert_pickles(folder)


def _read_gguf(folder: Path) -> None:
    from iclgd_dist.sources import fetch

    plan = _plan(folder, "x.gguf")
    fetch(plan.blocks[0].model)


# --- Stores


def _store() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from iclgd_dist import captures, measured
    from iclgd_dist.metrics import Capture
    from iclgd_dist.schema import CELL
    from tests.stores import key, measure, prepared, row

    with tempfile.TemporaryDirectory() as place:
        made = prepared(Path(place), row(1), row(2), row(3))
        made.compact()
        file, sha256 = captures.keep(made, key(4), Capture(torch.ones(2, 3, 4), torch.ones(2, 3, 2, 5), torch.ones(3, 2)))
        made.commit(row(4, capture_file=file, capture_sha256=sha256))
        made.commit(row(5))
        old = pa.Table.from_pylist([row(6)], schema=CELL)
        pq.write_table(old, made.root / "cells" / f"{key(6)}.parquet", write_page_checksum=True)
        rows = [{"key": key(number)} | measure(kind, 90 + number, layer) for number in range(1, 6) for kind in ("metric", "pair") for layer in (None, 1)]
        measured.commit(made.root, rows, reach=lambda point: None)
        made.record_attempt({"block": "a", "outcome": "done"} | {"created_at": "2026-01-01T00:00:00+00:00"})
        made.save_sweep(digest="0123456789abcdef", resolved={"name": "x", "seeds": [1]}, keys=[key(number) for number in range(1, 7)])
        (made.root / "claims").mkdir(exist_ok=True)
        (made.root / "claims" / ("a" * 32)).write_text(json.dumps({"host": "h", "space": 1, "pid": 1, "time": 1.0, "owner": "r", "lock": "x"}))
        return contents(made.root)


def reseal(name: str, data: bytes) -> bytes:
    """Give a file of a store the checksum of what it holds now: what somebody makes who means harm."""
    if name.endswith(".arrows"):
        return data[:-8] + xxh3_64(data[:-8]).digest()
    if "manifest" in name:
        try:
            content = json.loads(data)
            content.pop("sha256")
            return json.dumps(content | {"sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}).encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
    return data


def _damage_store(files: dict[str, bytes], choose: random.Random) -> Files:
    name = choose.choice(sorted(name for name in files if name != "README.txt"))
    beside = [other for other in files if Path(other).parent == Path(name).parent]
    if choose.random() < 0.1:
        return {name: files[choose.choice(beside)]}
    return {name: (mutations.as_json if name.endswith(".json") or "claims" in name else mutations.some_of)(files[name], choose)}


def _damage_hostile(files: dict[str, bytes], choose: random.Random) -> Files:
    found = _damage_store(files, choose)
    return {name: reseal(name, data or b"") for name, data in found.items()}


def rows_of(root: Path) -> dict[str, list[dict[str, Any]]]:
    from iclgd_dist.store import read_results

    found = read_results(root)
    tables = {name: getattr(found, name).to_pylist() for name in ("cells", "folds", "layers", "examples", "controls", "pairs", "metrics", "attempts")}
    return {name: sorted(rows, key=repr) for name, rows in tables.items()}


@functools.cache
def _undamaged() -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as place:
        for name, content in good(TARGETS["store"]).items():
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(place) / name).write_bytes(content)
        return rows_of(Path(place))


def _answered(call: Callable[[], Any]) -> Any:
    """Return what a call returns, or the error of ours that it raises."""
    try:
        return call()
    except OURS as error:
        return error


def _read_store(folder: Path, *, is_hostile: bool = False) -> str | None:
    from iclgd_dist import captures, files, locks, upkeep
    from iclgd_dist.metrics import Capture
    from iclgd_dist.store import Store, read_results
    from iclgd_dist.upkeep import forget, verify
    from tests.stores import key

    expected, known = _undamaged(), {key(number) for number in range(1, 7)}
    for claim in (folder / "claims").iterdir():
        locks.is_held(claim, owner="other", stale_seconds=1e9)
    read, keys = _answered(lambda: rows_of(folder)), _answered(lambda: Store(folder).keys())
    looked, sweeps = _answered(lambda: verify(Store(folder))), _answered(lambda: Store(folder).sweeps())
    row = next((row for row in read["cells"] if row["capture_sha256"]), None) if isinstance(read, dict) else None
    kept = row and _answered(lambda: captures.recall(Store(folder), row["key"], row["capture_sha256"]))
    compacted = Path(shutil.copytree(folder, folder.with_name(folder.name + "-compacted")))
    aside = Path(shutil.copytree(folder, folder.with_name(folder.name + "-aside")))
    try:
        _answered(lambda: Store(compacted).compact())
        with mock.patch.object(upkeep, "DEBRIS_STALE_SECONDS", -1):
            _answered(lambda: [files.remove(path) for path, _ in upkeep.debris(Store(compacted))])
        later = _answered(lambda: rows_of(compacted))
        quarantined = _answered(lambda: verify(Store(aside), quarantine=True))
        left = _answered(lambda: rows_of(aside))
        _answered(lambda: forget(Store(aside), [key(4)]))
        _answered(lambda: read_results(aside))
        if is_hostile:
            return None
        if isinstance(read, dict) and read != expected:
            return f"rows differ and nothing says so: {[name for name in expected if read[name] != expected[name]]}"
        if isinstance(later, dict) and later != expected:
            return f"rows differ after a compaction and nothing says so: {[name for name in expected if later[name] != expected[name]]}"
        if isinstance(kept, Capture) and not all(bool((getattr(kept, name) == 1).all()) for name in ("attention_LQD", "scores_LQHT", "label_scores_QC")):
            return "a capture holds other numbers and nothing says so"
        if isinstance(keys, set) and not keys <= known:
            return "the plan would subtract cells that are not there"
        if isinstance(read, StoreError) and not isinstance(looked, StoreError) and looked.is_whole:
            return f"readers say {read}, verify says that all is well"
        if not isinstance(quarantined, StoreError) and all(error.is_damage for error in quarantined.damaged):
            if not isinstance(left, dict):
                return f"what is left after --quarantine cannot be read: {left}"
            if any(row not in expected[name] for name, rows in left.items() for row in rows):
                return "rows after --quarantine are not those from before"
        del sweeps
    finally:
        shutil.rmtree(compacted)
        shutil.rmtree(aside)
    return None


TARGETS: dict[str, Target] = {
    "sweep": Target(_sweeps, _damage_sweep, _read_sweep),
    "delimited": Target(lambda: _only(_tasks(), "x.csv", "x.tsv"), one("x.csv x.tsv"), _read_task, 1),
    "jsonl": Target(lambda: _only(_tasks(), "x.jsonl"), one("x.jsonl", _damage_jsonl), _read_task, 1),
    "parquet": Target(lambda: _only(_tasks(), "x.parquet", "plain.parquet"), one("x.parquet plain.parquet"), _read_task),
    "safetensors": Target(lambda: _model(), one("model.safetensors", mutations.of_safetensors), _read_model),
    "index": Target(_shards, one("model.safetensors.index.json", mutations.as_json), _read_model, 1),
    "config": Target(lambda: _model(), one("config.json", mutations.as_json), _read_model, 3),
    "tokenizer": Target(lambda: _model(), one("tokenizer.json tokenizer_config.json", mutations.as_json), _read_model, 3),
    "pickle": Target(_pickles, _damage_pickle, _read_pickle, 1),
    "gguf": Target(_gguf, one("x.gguf", mutations.of_gguf), _read_gguf, 4),
    "store": Target(_store, _damage_store, _read_store, 4),
    "hostile_store": Target(lambda: good(TARGETS["store"]), _damage_hostile, functools.partial(_read_store, is_hostile=True)),
}


def _only(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: files[name] for name in names}


def work(targets: dict[str, Target], target: str, seed: int, first: int) -> None:
    """Make one try after the other, for ever, and tell of each."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen, number = targets[target], first
    with tempfile.TemporaryDirectory() as place:
        said = chosen.attempt({}, Path(place) / "whole")  # imports what is needed
        assert said is None, said
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while True:
            print(f"try {number}", flush=True)
            folder = Path(place) / str(number)
            finding = chosen.attempt(chosen.case(seed, number), folder)
            if finding:
                print("found", finding.replace("\n", " "), flush=True)
            print("done", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            number += 1


if __name__ == "__main__":
    work(TARGETS, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
