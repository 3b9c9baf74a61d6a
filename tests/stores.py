"""Rows, stores and interruptions for the tests of the store."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iclgd_dist import store
from iclgd_dist.schema import CELL
from iclgd_dist.store import Results, Store


def key(number: int) -> str:
    return f"{number:064x}"


def row(number: int, **values: Any) -> dict[str, Any]:
    """Return a small cell whose every figure depends on its number; what is not named is NULL."""
    return {
        "key": key(number),
        "kind": "finetuned",
        "status": "done",
        "step": number,
        "accuracy": number / 7,
        "prediction_counts": [number, 2],
        "folds": [{"fold": fold, "n": number, "accuracy": None} for fold in ("A", "B")],
        "layers": [{"layer": layer, "fold": fold, "sim_aou": layer / (number + 1), "sim_aou_n": number} for layer in range(3) for fold in ("A", "B", "all")],
        "examples": [{"query": f"q{query}", "fold": "A", "gold": query, "label_scores": [-float(number), None]} for query in range(number % 4)],
        "measures": [measure(kind, number + n, layer) for layer in (None, 0) for n, kind in enumerate(("metric", "control", "pair") * (number % 3))],
    } | values


def measure(kind: str, number: int, layer: int | None) -> dict[str, Any]:
    return {"kind": kind, "name": f"{kind} {number}", "metric": "sim_aou", "layer": layer, "fold": "all", "n": number, "mean": number / 3, "sd": None}


def prepared(path: Path, *rows: dict[str, Any]) -> Store:
    made = Store(path / "store")
    made.prepare()
    for each in rows:
        assert made.commit(each)
    return made


def full(value: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value.get(name) for name in names}


def assert_holds(results: Results, rows: list[dict[str, Any]]) -> None:
    """Compare with plain loops over the rows as they were committed."""
    assert sorted(results.cells["key"].to_pylist()) == sorted(each["key"] for each in rows)
    by_key = {each["key"]: each for each in rows}
    flat_names = [name for name in CELL.names if name not in ("folds", "layers", "examples", "measures")]
    for got in results.cells.to_pylist():
        assert got == full(by_key[got["key"]], flat_names)
    for name in ("folds", "layers", "examples"):
        inner = [field.name for field in CELL.field(name).type.value_type]
        expected = []
        for each in results.cells["key"].to_pylist():
            for element in by_key[each].get(name) or []:
                expected.append({"key": each} | full(element, inner))
        table = getattr(results, name)
        assert table.column_names == ["key", *inner]
        assert table.to_pylist() == expected
    for kind, names in {"control": ["cell", "control"], "pair": ["cell_a", "cell_b"], "metric": ["cell", "version"]}.items():
        table = getattr(results, f"{kind}s")
        assert table.column_names == [*names, "layer", "fold", "metric", "n", "mean", "sd"]
        measures = [(each, m) for each in results.cells["key"].to_pylist() for m in by_key[each].get("measures") or [] if m["kind"] == kind]
        expected = [{names[0]: each, names[1]: m["name"]} | {n: m[n] for n in table.column_names[2:]} for each, m in measures]
        assert table.to_pylist() == expected


def run_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    prelude = "import os, sys, time\nfrom iclgd_dist import cells, files, store\nfrom tests.stores import key, row\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def no_link(code: int) -> Callable[..., None]:
    def link(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    return link


class FailsOnce:
    """A system call that fails the nth time it is made."""

    def __init__(self, real: Callable[..., Any], nth: int, code: int) -> None:
        self.real, self.nth, self.code, self.calls = real, nth, code, 0

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.nth:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments, **options)


def at(point: str, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `action` happen, once, while a commit or a compaction stands at `point`."""

    def reach(name: str) -> None:
        if name == point:
            monkeypatch.setattr(store, "fault_point", lambda name: None)
            action()

    monkeypatch.setattr(store, "fault_point", reach)
