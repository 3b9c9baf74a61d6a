"""`python -m tests.faults`: every fault, then the matrix, then one JSON line: injections, lost, duplicated, holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

COLUMNS = ("injections", "planned", "committed", "duplicated", "lost", "steps", "recomputed")


class Matrix:
    """Collects what each test found."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, dict[str, Any]]] = []
        self.outcomes: dict[str, str] = {}
        self.facts: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome == "failed":
            self.outcomes[report.nodeid] = report.outcome
        if report.outcome == "failed":
            print(f"\n{report.nodeid}\n{report.longreprtext}", flush=True)  # now, not in half an hour
        for name, value in report.user_properties:
            if name == "facts":
                self.facts[report.nodeid] = value


def main() -> int:
    matrix = Matrix()
    code = pytest.main(
        ["-vv", "--show-capture=no", "--tb=short", "--no-header", "-m", "long or not long", str(Path(__file__).parent), *sys.argv[1:]], plugins=[matrix]
    )
    table = Table(box=None, header_style="bold")
    for column in ("fault", *COLUMNS, "holds"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for node, outcome in matrix.outcomes.items():
        facts = matrix.facts.get(node, {})
        name = node.rpartition("::")[2].removeprefix("test_").replace("_", " ")
        table.add_row(name, *(str(facts.get(column, "")) for column in COLUMNS), outcome)
    Console(width=200).print(table)
    total = {column: sum(facts.get(column, 0) for facts in matrix.facts.values()) for column in ("injections", "lost", "duplicated")}
    print(json.dumps({"faults": len(matrix.outcomes), **total, "holds": code == 0}))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
