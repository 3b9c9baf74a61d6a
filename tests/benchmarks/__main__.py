"""Runs a benchmark by name: `python -m tests.benchmarks NAME [ARGUMENTS]`. A benchmark is a module beside this one with `run(arguments) -> dict`.

The dict holds `value`, `goal`, `holds` and the parts; it is the last line printed, as one JSON object. Knows nothing of what is measured.
"""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path


def benchmarks() -> dict[str, str]:
    """Return name -> first line of the docstring; nothing is imported."""
    trees = {path.stem: ast.parse(path.read_text()) for path in sorted(Path(__file__).parent.glob("*.py"))}
    is_benchmark = {name: any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body) for name, tree in trees.items()}
    return {name: (ast.get_docstring(tree) or "").partition("\n")[0] for name, tree in trees.items() if is_benchmark[name]}


def main(arguments: list[str]) -> int:
    """Return the exit code: 0, or 2 where no benchmark has that name."""
    known = benchmarks()
    if not arguments or arguments[0] not in known:
        print("\n".join(f"{name:12}{line}" for name, line in known.items()))
        return 2
    name, *rest = arguments
    result = importlib.import_module(f"tests.benchmarks.{name}").run(rest)
    print(json.dumps({"benchmark": name, **result}, allow_nan=False), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
