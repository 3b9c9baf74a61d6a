"""Made-up cells in a real store, for the tests of the analysis: accuracy figures follow from the examples, similarities are made up."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
from iclgd_analysis.load import Frames
from iclgd_analysis.setting import Setting

from iclgd_dist.schema import CELL, EXAMPLE, FOLD, LAYER, POOLED, SIMILARITIES
from iclgd_dist.store import Store

RATES = {"vanilla": (1e-3, 1e-2, 1e-1), "layer_causal": (1e-4, 1e-3, 1e-2)}
STEPS = (2, 4)
NUM_QUERIES = 24
NUM_LAYERS = 4
Row = dict[str, Any]
LAST = STEPS[-1]


def empty(columns: Any) -> Row:
    return dict.fromkeys((name for name, _, _ in columns), None)


def make_cell(kind: str, *, task: str, seed: int | None, skill: float, **named: Any) -> Row:
    """A finished cell whose accuracy figures follow from its examples; similarities are made up, one value per layer, fold and query."""
    words = named.pop("words", ["Red", "Blue"])
    model, size = named.pop("model", "Tiny-135M-Instruct.Q4_1"), named.pop("size", 0.0)
    identity = {"kind": kind, "task": task, "seed": seed, "order": None if seed is None else 0, "method": None, "learning_rate": None, "step": None} | named
    key = hashlib.sha256(json.dumps([model, identity], sort_keys=True).encode()).hexdigest()
    draw = random.Random(key)
    queries = []
    for index in range(NUM_QUERIES):
        gold = index % len(words)
        guess = gold if draw.random() < skill else draw.randrange(len(words))
        query = empty(EXAMPLE) | {"query": f"q{index:03}", "fold": "AB"[index // len(words) % 2], "gold": gold, "prediction": guess}
        query |= {"label_scores": [-1.0] * len(words), "nll_label": 0.2 if guess == gold else 1.5 + draw.random()}
        if kind == "finetuned":
            query |= {name: draw.gauss(0.1, 0.02) for name in SIMILARITIES}
        queries.append(query)

    def figures(part: list[Row]) -> Row:
        shares = [[q["prediction"] == q["gold"] for q in part if q["gold"] == label] for label in range(len(words))]
        counts = [sum(q["prediction"] == label for q in part) for label in range(len(words))]
        found = {
            "n": len(part),
            "accuracy": sum(q["prediction"] == q["gold"] for q in part) / len(part),
            "nll_label": sum(q["nll_label"] for q in part) / len(part),
        }
        found |= {"balanced_accuracy": sum(sum(share) / len(share) for share in shares) / len(words), "collapsed": max(counts) >= 0.95 * len(part)}
        return found

    row: Row = dict.fromkeys(CELL.names) | identity | figures(queries)
    protocol = json.dumps({"preset": "clean", "sink": "auto", "sink_token": "</s>", "separator": "newline", "record_position": "last_prompt"})
    row |= {"key": key, "model": model, "model_source": f"pkg://tiny/{model}.gguf", "model_hash": hashlib.sha256(model.encode()).hexdigest(), "family": "llama"}
    row |= {"model_notes": ["instruction-tuned", "dequantised from 4-bit"]}
    row |= {"storage_dtype": "float32", "compute_dtype": "float32", "num_queries": NUM_QUERIES, "query_seed": 1, "protocol": protocol, "origin": "grid"}
    row |= {
        "sweep": "made_up",
        "status": "done",
        "num_demonstrations": None if seed is None else 4,
        "label_words": words,
        "device": "cpu, 2 threads",
        "host": "here",
    }
    row |= {
        "versions": json.dumps({"torch": "2.13.0"}),
        "tf32": False,
        "lanes": 3,
        "wall_seconds": 1.5,
        "peak_gib": 0.7,
        "created_at": datetime(2025, 1, 1, tzinfo=UTC),
    }
    row |= {"folds": [empty(FOLD) | {"fold": fold} | figures([q for q in queries if q["fold"] == fold]) for fold in "AB"], "examples": queries, "layers": []}
    if kind == "finetuned":
        similarity = 0.25 * math.tanh(size) + draw.gauss(0, 0.01)
        made = {name: similarity * (index + 1) / 3 for index, name in enumerate(SIMILARITIES)} | dict.fromkeys(POOLED, similarity)
        made |= {
            "sim_aou_gaussian_state": draw.gauss(0, 0.003),
            "sim_aou_norm_gaussian_state": 0.4 * math.tanh(size),
            "recovered_aou": similarity - size**2 / 4,
        }
        row |= {"train_on": "true", "update_ratio": size} | made
        for layer in range(NUM_LAYERS):
            for fold in ("A", "B", "all"):
                wave: Row = {name: value * (1 + 0.6 * math.sin(layer)) for name, value in made.items()}
                wave["sim_am_delta"] = None if layer == 0 else wave["sim_am_delta"]
                row["layers"].append(empty(LAYER) | {"layer": layer, "fold": fold, "update_ratio": size} | wave)
    return row


def diverged(row: Row) -> Row:
    none = dict.fromkeys(("accuracy", "balanced_accuracy", "nll_label", "collapsed", "update_ratio", *SIMILARITIES, *POOLED))
    return row | none | {"status": "diverged", "diverged_step": 3, "folds": [], "layers": [], "examples": []}


def make_rows(*, tasks: tuple[str, ...] = ("trec",), seeds: tuple[int, ...] = (1,), rates: Mapping[str, tuple[float, ...]] = RATES, **named: Any) -> list[Row]:
    """A grid: skill peaks in the middle of it, the largest vanilla rate diverges at the last step, the largest layer-causal one collapses."""
    rows = []
    for task in tasks:
        rows.append(make_cell("zero_shot", task=task, seed=None, skill=0.3, **named))
        for seed in seeds:
            rows.append(make_cell("icl", task=task, seed=seed, skill=0.6, **named))
            for method in rates:
                for rank, learning_rate in enumerate(rates[method]):
                    for step in STEPS:
                        skill = 0.9 - 0.35 * abs(rank - (len(rates[method]) - 1) / 2)
                        size = 0.15 * 2**rank * math.sqrt(step)
                        row = make_cell(
                            "finetuned", task=task, seed=seed, skill=skill, size=size, method=method, learning_rate=learning_rate, step=step, **named
                        )
                        is_last = rank == len(rates[method]) - 1
                        if is_last and method == "layer_causal":
                            row["collapsed"] = True
                        rows.append(diverged(row) if is_last and method == "vanilla" and step == STEPS[-1] else row)
    return rows


def make_store(root: Path, rows: list[Row], *, missing: int = 0) -> Path:
    store = Store(root)
    store.prepare()
    with mock.patch("os.fsync"):  # no test of the analysis turns the machine off
        for row in rows:
            assert store.commit(row)
    planned = [row["key"] for row in rows if row["origin"] == "grid"]
    store.save_sweep(digest="0123abcd", resolved={"name": "made_up"}, keys=planned + [f"{index:064x}" for index in range(missing)])
    return root


def undiverged(row: Row, size: float = 0.6) -> Row:
    """A cell that is done, in place of one that diverged."""
    named = {name: row[name] for name in ("task", "seed", "method", "learning_rate", "step")}
    return make_cell("finetuned", skill=0.5, size=size, **named) if row["status"] == "diverged" else row


def untrained(rows: list[Row], *, init_seed: int, init: str = "embeddings_norms") -> list[Row]:
    """The same cells on random weights, with figures of their own."""
    found = []
    for row in rows:
        other = changed(row, init=init, init_scheme="fairseq", init_seed=init_seed, model_notes=[f"random weights ({init}, fairseq, seed {init_seed})"])
        if row["kind"] == "finetuned" and row["sim_aou"] is not None:
            other["sim_aou"] = row["sim_aou"] + (0.01 * init_seed if row["method"] == "vanilla" else 0.02 * init_seed**2)
        found.append(other)
    return found


def protocol(**switches: Any) -> str:
    return json.dumps({"preset": "clean", "sink": "auto", "separator": "newline", "record_position": "last_prompt", "sink_token": "<s>"} | switches)


T2 = 4.302652730  # 97.5 % point of t with 2 degrees of freedom


def changed(row: Row, **columns: Any) -> Row:
    """Another cell that differs in these columns."""
    return row | columns | {"key": hashlib.sha256(json.dumps([row["key"], columns], sort_keys=True, default=str).encode()).hexdigest()}


def measure(kind: str, name: str, metric: str, mean: float | None, *, layer: int | None = None, fold: str = "all") -> Row:
    return {"kind": kind, "name": name, "metric": metric, "layer": layer, "fold": fold, "n": 24, "mean": mean, "sd": 0.1}


def t_interval(values: list[float], query_variance: float = 0.0) -> tuple[float, float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = {2: 12.706204736, 3: T2}[len(values)] * math.sqrt(variance / len(values) + query_variance)
    return mean, mean - half, mean + half


def estimate_of(line: pd.Series) -> tuple[float, float, float]:
    return line["mean"], line["lower"], line["upper"]


def only(table: pd.DataFrame, **named: Any) -> pd.Series:
    for name, value in named.items():
        table = table[table[name] == value]
    assert len(table) == 1, f"{len(table)} rows of {named}"
    return table.iloc[0]


def setting_of(frames: Frames, **named: Any) -> Setting:
    (found,) = [setting for setting in frames.settings() if all(setting.named[name] == value for name, value in named.items())]
    return found


def of_fold(row: Row, fold: str, metric: str) -> float:
    return next(each[metric] for each in row["folds"] if each["fold"] == fold)


def json_of(panel: Any) -> Row:
    """Return what a panel draws, as the page gets it."""
    return json.loads(panel.figure.to_json())


def figure(page: str, name: str) -> list[Row]:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    return json.loads(found[1])["data"]
