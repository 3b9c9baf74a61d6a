"""The floors of the house: imports point strictly down, Ray and torch stay where they belong, no module holds two nouns."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FLOORS = {
    9: ("__main__",),
    8: ("cli",),
    7.5: ("run_commands", "store_commands", "job_commands"),
    7.4: ("plan_command",),
    7: ("runner", "cluster"),
    6.8: ("trials",),
    6.5: ("session", "trackers"),
    6.2: ("stopping",),
    6: ("actor",),
    5.5: ("terminal",),
    5: ("block", "check"),
    4.95: ("orders",),
    4.9: ("measuring", "packing"),
    4.85: ("random_deltas",),
    4.8: ("commits",),
    4.6: ("baselines", "extras"),
    4.5: ("measures", "trajectory", "supervised"),
    4: ("updates", "probes", "rows"),
    3.5: ("comparison",),
    3: ("deltas", "attention", "layerwise", "losses"),
    2.7: ("positions",),
    2.5: ("sites",),
    2.2: ("search", "loading"),
    2.1: ("provenance",),
    2: ("model", "plan"),
    1.9: ("claims",),
    1.8: ("blocks",),
    1.6: ("upkeep",),
    1.5: ("cost", "captures", "untrained", "prepared", "pickles"),
    1.2: ("encoding", "contexts", "light_tokenizer"),  # draws as token ids, draws of controls
    1.05: ("calibration", "outputs"),
    1: ("metrics", "ranking", "shared_attention", "head", "spectra", "geometry", "tasks", "families", "sources", "store", "machine"),
    0.6: ("measured", "manifests", "model_files"),
    0.5: ("embedded", "cells", "own_code", "apart", "hub", "weights"),  # what tasks reads, what the store encodes
    0.3: ("locks",),
    0.2: ("files",),
    0.15: ("objects",),
    0.1: ("config",),
    0.06: ("extensions", "model_spec", "task_spec", "resources", "search_spec"),
    0.05: ("axes", "progress", "complaints"),
    0: ("patterns", "protocol", "schema", "toml_text", "store_errors", "nowhere", "background"),
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
RAY = (6, 6.5, 6.8, 7)


def imports_of(source: str, package: str = "iclgd_dist") -> set[str]:
    """Return the dotted names a module imports anywhere in its text; names inside the package come without it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or package != "iclgd_dist", "relative imports hide which floor they reach"
            base = node.module or ""
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == package else {base}
    return {name.removeprefix(f"{package}.") for name in found}


def faults(name: str, source: str) -> list[str]:
    """Return what a module's imports break."""
    here, found = FLOOR[name], []
    for imported in sorted(imports_of(source)):
        top = imported.split(".")[0]
        if imported in FLOOR and FLOOR[imported] >= here and imported != name:
            found.append(f"{name} (floor {here}) imports {imported} (floor {FLOOR[imported]})")
        if top == "ray" and here not in RAY:
            found.append(f"{name} imports ray")
        if top in ("torch", "accelerate") and not 1 <= here <= 5:
            found.append(f"{name} imports {top}")
        if top == "iclgd_analysis" and name not in ("cli", "run_commands"):
            found.append(f"{name} imports the analysis")
    return found


def modules() -> dict[str, str]:
    return {path.stem: path.read_text() for path in (ROOT / "iclgd_dist").glob("*.py") if path.stem != "__init__"}


def test_every_module_has_a_floor_and_imports_point_strictly_down() -> None:
    found = modules()
    assert set(found) == set(FLOOR)
    readme = (ROOT / "iclgd_dist" / "README.md").read_text()
    assert [name for name in FLOOR if f"`{name}`" not in readme and name != "__main__"] == []
    assert [fault for name, source in found.items() for fault in faults(name, source)] == []


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("metrics", "from iclgd_dist.block import run_block", "metrics (floor 1) imports block (floor 5)"),
        ("updates", "from iclgd_dist import probes", "updates (floor 4) imports probes (floor 4)"),
        ("block", "import ray", "block imports ray"),
        ("config", "def late():\n    import torch.nn", "config imports torch"),
        ("rows", "from iclgd_analysis import load", "rows imports the analysis"),
    ],
)
def test_a_planted_upward_import_is_found(name: str, line: str, fault: str) -> None:
    assert faults(name, line) == [fault]


def undeclared(source: str, *, dependencies: set[str], extras: set[str]) -> set[str]:
    """Return the packages of others that a module imports though they are not declared; those of extras count unless they are imported inside a function."""
    own = {"iclgd_dist", "iclgd_analysis", *sys.stdlib_module_names, *(path.stem for path in (ROOT / "analysis").glob("*.py"))}
    on_top = "\n".join(ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom))
    everywhere, first = ({name.split(".")[0] for name in imports_of(text, package="")} for text in (source, on_top))
    return (everywhere - own - dependencies - extras) | (first & extras)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {Requirement(line).name.replace("-", "_") for line in PROJECT["dependencies"]}
OPTIONAL = {Requirement(line).name.replace("-", "_") for name, lines in PROJECT["optional-dependencies"].items() if name != "dev" for line in lines}


def test_what_is_imported_is_declared_and_what_is_optional_only_where_it_is_used() -> None:
    texts = {f"{folder}/{path.name}": path.read_text() for folder in ("iclgd_dist", "analysis") for path in (ROOT / folder).glob("*.py")}
    assert {name: found for name, text in texts.items() if (found := undeclared(text, dependencies=DECLARED, extras=OPTIONAL))} == {}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import yaml", {"yaml"}),
        ("import optuna", {"optuna"}),
        ("def late():\n    import optuna", set()),
        ("def late():\n    from mlflow import x", {"mlflow"}),
    ],
)
def test_a_planted_import_is_found(line: str, found: set[str]) -> None:
    assert undeclared(line, dependencies=DECLARED, extras=OPTIONAL) == found


def test_the_analysis_imports_neither_torch_nor_ray() -> None:
    for path in (ROOT / "analysis").glob("*.py"):
        assert {"torch", "ray", "transformers"}.isdisjoint({name.split(".")[0] for name in imports_of(path.read_text(), package="")}), path.name


def test_no_module_is_longer_than_400_lines() -> None:
    lengths = {path: len(path.read_text().splitlines()) for folder in ("iclgd_dist", "analysis") for path in (ROOT / folder).glob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > 400} == {}
