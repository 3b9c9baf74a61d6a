"""What `tests/fuzz.py` tries: for each kind of file a good example, how it is damaged, and how the project reads it."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from iclgd_dist.config import load_sweep
from tests import mutations
from tests.fuzz_stores import HOSTILE, PAGE, STORE
from tests.fuzzing import Files, Target, contents, one, work

ROOT = Path(__file__).parent.parent


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
    from tests.model_dirs import write_gguf

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
    "store": STORE,
    "hostile_store": HOSTILE,
    "page": PAGE,
}


def _only(files: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: files[name] for name in names}


if __name__ == "__main__":
    work(TARGETS, sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
