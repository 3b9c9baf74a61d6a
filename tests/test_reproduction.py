"""The published figures agree with each other, and a store is held against them: one that equals them passes, any other says where it differs."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from iclgd_analysis import load, reproduction
from iclgd_analysis.reproduction import compare, main, profile, published, verdict

from iclgd_dist.schema import LAYER
from tests.made import diverged, empty, make_cell, make_store

ROOT = Path(__file__).parent.parent
REFERENCE = json.dumps({"preset": "reference", "sink": "bos", "sink_token": "</s>", "separator": "eos", "record_position": "label", "first_layer": "count"})
METRICS = ("sim_aou_norm", "sim_am_delta")
Row = dict[str, Any]
Run = tuple[str, str, int, int, float]


def read_published() -> list[dict[str, str]]:
    with open(ROOT / "analysis" / "published.csv") as file:
        return list(csv.DictReader(file))


def published_runs() -> dict[Run, dict[str, float]]:
    runs: dict[Run, dict[str, float]] = {}
    for row in read_published():
        if row["kind"] == "per_seed":
            run = (row["task"], row["method"], int(row["seed"]), int(row["order"]), float(row["learning_rate"]))
            runs.setdefault(run, {})[row["metric"]] = float(row["value"])
    return runs


def make_run(run: Run, figures: dict[str, float], *, num_layers: int = 24, **other: Any) -> Row:
    """A cell whose mean over layers, on all queries, is what is given; its folds say something else."""
    task, method, seed, order, learning_rate = run
    named = {"task": task, "method": method, "learning_rate": learning_rate, "order": order, "step": 32} | other.pop("named", {})
    row = make_cell("finetuned", seed=seed, skill=0.5, **named)
    row |= {"num_demonstrations": 32, "protocol": REFERENCE, "layers": [], "examples": [], "folds": []} | other
    for layer in range(num_layers):
        for fold, shift in (("A", 0.3), ("B", -0.2), ("all", 0.0)):
            wave = 0.4 * math.cos(2 * math.pi * (layer + 0.5) / num_layers)  # its mean over layers is 0
            row["layers"].append(empty(LAYER) | {"layer": layer, "fold": fold} | {name: value + wave + shift for name, value in figures.items()})
    return row


def states(rows: list[Row], root: Path) -> dict[str, int]:
    return compare(load(make_store(root, rows)))["state"].value_counts().to_dict()


def test_the_published_figures_agree_with_each_other() -> None:
    rows = read_published()
    kinds = [row["kind"] for row in rows]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"per_seed": 72, "table_2": 56, "per_layer": 96, "table_1": 31, "accuracy": 18}

    def mean(**named: str) -> float:
        values = [float(row["value"]) for row in rows if all(row[name] == value for name, value in named.items())]
        return sum(values) / len(values)

    for method in ("vanilla", "layer_causal"):
        for metric in METRICS:
            of_seeds = mean(kind="per_seed", method=method, metric=metric)
            assert mean(kind="per_layer", method=method, metric=metric) == pytest.approx(of_seeds, abs=3e-4)  # profiles are rounded to three digits
            assert mean(kind="table_2", task="", method=method, metric=metric) == pytest.approx(of_seeds, abs=3e-3)
            for task in {row["task"] for row in rows if row["kind"] == "per_seed"}:
                table_2 = mean(kind="table_2", task=task, method=method, metric=metric)
                assert table_2 == pytest.approx(mean(kind="per_seed", task=task, method=method, metric=metric), abs=5.01e-3)  # rounded to two


def test_the_sweep_that_reproduces_plans_exactly_the_published_runs() -> None:
    sweep = tomllib.loads((ROOT / "sweeps" / "reproduce_1_3b.toml").read_text())
    planned = {
        (task, method, seed, order, own.get("learning_rates", sweep["learning_rates"]))
        for task in sweep["tasks"]
        for own in [sweep.get("per_task", {}).get(task, {})]
        for method in sweep["methods"]
        for seed, order in own.get("runs", sweep["runs"])
    }
    assert planned == set(published_runs())
    assert len(planned) == 36
    assert (sweep["steps"], sweep["num_demonstrations"], sweep["protocol"]) == ([32], 32, {"preset": "reference"})


def test_a_store_of_the_published_figures_passes(tmp_path: Path) -> None:
    make_store(tmp_path, [make_run(run, figures) for run, figures in published_runs().items()])
    code = f"import sys, runpy; sys.argv[1:] = [{str(tmp_path)!r}]; runpy.run_module('iclgd_analysis.reproduction', run_name='__main__')"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "72 of 72 within .02"
    said = f"the published figures are of fairseq-dense-1.3B, these of {make_run(next(iter(published_runs())), {})['model']}"
    assert said in done.stdout
    make_store(tmp_path / "theirs", [make_run(run, figures, model="fairseq-dense-1.3B") for run, figures in published_runs().items()])
    done = subprocess.run([sys.executable, "-c", code.replace(str(tmp_path), str(tmp_path / "theirs"))], capture_output=True, text=True, check=True)
    assert "the published figures are of" not in done.stdout


def test_what_is_off_and_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runs = published_runs()
    off, near, gone, lost, partial = list(runs)[:5]
    rows = [make_run(run, figures) for run, figures in runs.items() if run not in (off, near, gone, lost, partial)]
    rows.append(make_run(off, {"sim_aou_norm": runs[off]["sim_aou_norm"] + 0.0201, "sim_am_delta": runs[off]["sim_am_delta"]}))
    rows.append(make_run(near, {name: value - 0.02 for name, value in runs[near].items()}))
    rows.append(diverged(make_run(gone, runs[gone])))
    rows.append(make_run(partial, runs[partial], num_layers=23))
    monkeypatch.setattr(sys, "argv", ["reproduction", str(make_store(tmp_path, rows))])
    assert main() == 1
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "65 of 72 within .02",
        "1 off: sst2 vanilla (2, 0) sim_aou_norm",
        "2 diverged: sst2 vanilla (4, 2) sim_aou_norm, sst2 vanilla (4, 2) sim_am_delta",
        "2 missing: sst2 layer_causal (2, 0) sim_aou_norm, sst2 layer_causal (2, 0) sim_am_delta",
        "2 undefined: sst2 layer_causal (3, 1) sim_aou_norm, sst2 layer_causal (3, 1) sim_am_delta",
    ]
    table = compare(load(tmp_path))
    assert table[["ours", "difference"]].notna().all(axis=1).sum() == 66
    assert table.loc[table["state"] == "off", "difference"].tolist() == [pytest.approx(0.0201)]
    assert verdict(table).startswith("65 of 72")


CLEAN = json.dumps({"preset": "clean", "sink": "auto", "separator": "newline", "record_position": "last_prompt"})


@pytest.mark.parametrize(
    "other",
    [
        {"protocol": CLEAN},
        {"named": {"step": 16}},
        {"named": {"learning_rate": 7e-4}},
        {"named": {"order": 1}},
        {"num_demonstrations": 16},
        {"init": "norms", "init_scheme": "model", "init_seed": 0},
        {"train_on": "random_labels"},
        {"method_options": '{"base": "vanilla", "weights": "mlp"}'},
        {"origin": "search"},
    ],
)
def test_a_cell_of_another_kind_is_not_taken(tmp_path: Path, other: Row) -> None:
    run, figures = next(iter(published_runs().items()))
    assert states([make_run(run, figures, **other)], tmp_path / "alone") == {"missing": 72}
    both = [make_run(run, figures), make_run(run, {name: value + 1 for name, value in figures.items()}, **other) | {"key": "f" * 64}]
    assert states(both, tmp_path / "beside") == {"missing": 70, "within": 2}


def test_two_models_in_one_store_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run, figures = next(iter(published_runs().items()))
    rows = [make_run(run, figures, named={"model": name}) for name in ("one", "two")]
    monkeypatch.setattr(sys, "argv", ["reproduction", str(make_store(tmp_path, rows))])
    assert main() == 2
    assert "one cell for each run is required, got 2 for 1 runs (one in float32" in capsys.readouterr().err


def test_the_profile_is_the_mean_over_tasks_and_seeds_of_each_layer(tmp_path: Path) -> None:
    runs = published_runs()
    table = profile(load(make_store(tmp_path, [make_run(run, figures) for run, figures in list(runs.items())[:4]])))
    assert len(table) == len(published("per_layer")) == 96
    line = table[(table["method"] == "vanilla") & (table["metric"] == "sim_am_delta") & (table["layer"] == 3)].iloc[0]
    values = [figures["sim_am_delta"] + 0.4 * math.cos(2 * math.pi * 3.5 / 24) for run, figures in list(runs.items())[:4] if run[1] == "vanilla"]
    assert (line["ours"], line["num_cells"], line["theirs"]) == (pytest.approx(sum(values) / 3), 3, 0.048)
    assert line["difference"] == pytest.approx(line["ours"] - 0.048)


def test_the_reproduction_imports_neither_torch_nor_ray() -> None:
    code = f"import {reproduction.__name__}, sys; print({{'torch', 'ray'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"
