"""How far a run is, in words: cells, tokens per second, time left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from iclgd_dist import progress
from iclgd_dist.progress import Counts, in_words, shown


def report(block: str, fraction: float, cells: int, outcome: str = "") -> dict[str, object]:
    return {"block": block, "fraction": fraction, "gflops": 90.0, "num_cells": cells, "actor": "a", "stage": "layer 3/30", "outcome": outcome, "reason": ""}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    made = Counts(num_cells=40, flops={"one": 3e12, "two": 1e12}, tokens={"one": 300_000, "two": 100_000})
    monkeypatch.setattr(time, "monotonic", lambda: made.started + 100)
    return made


def test_before_anything_is_done_no_speed_and_no_time_are_made_up(counts: Counts) -> None:
    assert counts.line() == "0/40 cells, estimating time left; starting actors"


def test_cells_tokens_per_second_and_time_left(counts: Counts) -> None:
    counts.take(report("two", 1.0, 10, outcome="done"))
    counts.take(report("one", 0.5, 4))
    assert counts.fraction == 0.625
    assert counts.line() == "14/40 cells, 2,500 tokens/s, 60 s left; layer 3/30"


def test_a_block_that_goes_into_another_round_counts_as_not_begun(counts: Counts) -> None:
    counts.take(report("one", 0.5, 4))
    counts.again("one", "its actor is gone", most=2)
    assert counts.fraction == 0 and counts.speed() == ""
    assert counts.outcomes["one"][0] == "again"


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    out = io.StringIO()
    with shown(Counts(num_cells=2, flops={"one": 1e9}), Console(file=out, force_terminal=False)):
        time.sleep(0.2)
    assert "  0% after 0 s: 0/2 cells, estimating time left; starting actors" in out.getvalue() and "\x1b" not in out.getvalue()


def test_times_are_written_as_people_say_them() -> None:
    assert [in_words(seconds) for seconds in (0.4, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]
