"""When a run has to end: budgets, a head that does not answer, and that it is asked once."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

import pytest

from iclgd_dist import stopping
from iclgd_dist.stopping import Budget, stoppable, watched
from iclgd_dist.terminal import INTERRUPTED


@pytest.fixture(autouse=True)
def own_handlers() -> Iterator[None]:
    """Let no handler that another test left behind see the signals."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("WATCH_SECONDS", 0.02), ("HEAD_SECONDS", 0.05), ("HEAD_LOST_SECONDS", 0.3)):
        monkeypatch.setattr(stopping, name, seconds)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for_a_stop(budget: Budget, head: str, num_gpus: int = 0, seconds: float = 5) -> tuple[int, str]:
    end = time.monotonic() + seconds
    with stoppable() as stopped, watched(budget, stopped, num_gpus=lambda: num_gpus, head=lambda: head):
        while not stopped.code and time.monotonic() < end:
            time.sleep(0.01)
    return stopped.code, stopped.why


def test_hours_and_gpu_hours_are_spent_apart() -> None:
    assert wait_for_a_stop(Budget(hours=0.0), "") == (INTERRUPTED, "0 hours are spent")
    assert wait_for_a_stop(Budget(gpu_hours=1e-4), "", num_gpus=8) == (INTERRUPTED, "0.0001 GPU hours are spent")
    assert wait_for_a_stop(Budget(gpu_hours=1e-4), "", num_gpus=0, seconds=0.5) == (0, "")
    assert Budget().over() == ""


def test_a_head_that_is_silent_is_lost_and_one_that_answers_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    code, why = wait_for_a_stop(Budget(), f"127.0.0.1:{free_port()}")
    assert code == INTERRUPTED and "the cluster is lost: its head at 127.0.0.1" in why
    assert capsys.readouterr().out.count("the cluster is lost") == 1
    with socket.create_server(("127.0.0.1", free_port())) as server:
        assert wait_for_a_stop(Budget(), f"127.0.0.1:{server.getsockname()[1]}", seconds=1) == (0, "")


def test_a_second_signal_stops_at_once() -> None:
    with stoppable() as stopped:
        stopped.ask("enough")
        stopped.ask("said once")
        assert (stopped.code, stopped.why) == (INTERRUPTED, "enough")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        pytest.fail("it went on")
    assert stopped.code == INTERRUPTED
