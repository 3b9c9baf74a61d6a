"""Tables, figures and a one-page report of a store of results. Reads the store; imports neither torch nor ray."""

from __future__ import annotations

from pathlib import Path

from .load import Frames, load

__all__ = ["Frames", "load", "write_report"]


def write_report(store: str | Path, out: Path | None = None, *, frames: Frames | None = None) -> Path:
    """Write the report of a store as one self-contained HTML page (default <store>/report.html) and return its path. `frames`: what `load` made of it."""
    from .report import write_report as write  # late: `python -m iclgd_analysis.table` must not find its own module loaded

    return write(store, out, frames=frames)
