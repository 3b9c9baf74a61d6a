"""Every bad input of tests/bad_inputs.py through the command line, in this process; `python -m tests.bad_inputs` gives each to a process of its own."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from iclgd_dist import cli, run_commands
from tests import bad_inputs
from tests.bad_inputs import CASES, SECONDS, Case, Outcome, listing, prepared


@pytest.fixture
def _stopped_in_time() -> Iterator[None]:
    """End what waits for ever, and put back the handlers of signals."""

    def late(number: int, frame: Any) -> NoReturn:
        raise TimeoutError(f"did not end within {SECONDS:.0f} s")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGALRM, late)
    signal.alarm(int(SECONDS))
    yield
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Outcome:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["iclgd", *shlex.split(case.command)])
    monkeypatch.setattr(run_commands, "run_sweep", lambda *_, **__: pytest.fail("blocks would run"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, errors = capsys.readouterr()
    return Outcome(int(ended.value.code or 0), out, errors, frozenset())


@pytest.mark.usefixtures("_stopped_in_time")
@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if not case.needs_process])
def test_a_bad_input_is_one_message_and_nothing_is_written(
    case: Case, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = bad_inputs.environment(case, good.parent / "cache", "")
    for name in os.environ.keys() - values.keys():
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    folder = prepared(case, good, tmp_path / "case")
    before = listing(folder)
    outcome = run(case, folder, monkeypatch, capsys)
    assert bad_inputs.faults(case, outcome, folder, before) == [], bad_inputs.said(case, outcome, folder)


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES if case.needs_process])
def test_what_the_hub_refuses_is_one_message_without_the_token(case: Case, good: Path, tmp_path: Path) -> None:
    folder = prepared(case, good, tmp_path / "case")
    before = listing(folder)
    with bad_inputs.hub() as address:
        outcome = bad_inputs.in_a_process(case, folder, good.parent / "cache", address)
    assert bad_inputs.faults(case, outcome, folder, before) == [], bad_inputs.said(case, outcome, folder)


def test_no_two_cases_have_one_name() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) > 250
