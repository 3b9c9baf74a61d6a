"""How numbers are written, and tables of text for a page and for a terminal. Knows nothing of results."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

NULL = "\N{EN DASH}"
BASELINES = {"zero_shot": "zero-shot", "icl": "in-context"}  # as they are written


def rate(learning_rate: float) -> str:
    """Return 1e-3, 3e-3, 1.6e-4 ..."""
    if not learning_rate:
        return "0"
    mantissa, exponent = f"{learning_rate:.6e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def number(value: Any, digits: int = 3) -> str:
    """Return a value as text; an en dash where it is undefined."""
    return NULL if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


EDGE, EDGE_SAID = " (edge)", " (edge of the grid: extend the grid)"
EDGE_NOTE = " Edge: a selected learning rate is the smallest or the largest of its grid; extend the grid."


def marked(row: Mapping[str, Any]) -> str:
    """Return the learning rates of a row, marked where one that was selected lies at an edge of its grid."""
    return f"{row['learning_rates']}{EDGE if row['is_edge'] else ''}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


@dataclass(frozen=True)
class Grid:
    """A table of text: first and last column read from the left, numbers between them from the right."""

    title: str
    headers: tuple[str, ...]
    rows: list[list[str]]
    note: str

    def rich(self) -> Table:
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            title=Text(self.title),
            caption=Text(self.note),
            title_justify="left",
            caption_justify="left",
        )
        for place, header in enumerate(self.headers):
            is_last = place == len(self.headers) - 1
            table.add_column(header, justify="left" if is_last or not place else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def entry(row: Mapping[str, Any]) -> str:
    """Return a mean, its interval and n/N as text; an en dash for no row."""
    if not row:
        return NULL
    interval = f" [{number(row['lower'])}, {number(row['upper'])}]" if math.isfinite(row["lower"]) else ""
    return f"{number(row['mean'])}{interval} {row['num_used']:.0f}/{row['num_planned']:.0f}"


def show(grids: Iterable[Grid], console: Console | None = None) -> None:
    """Print the tables; none at all is said."""
    console = console or Console()
    grids = list(grids)
    for grid in grids:
        console.print(grid.rich())
    if not grids:
        console.print("The store holds no such rows.")


def stores() -> list[str]:
    """Return the command line's stores."""
    if len(sys.argv) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} STORE [STORE ...]")
    return sys.argv[1:]
