"""When a run has to end before its work does: signals, a spent budget, a head that is lost; and how long an orderly end may take.

Knows signals and clocks. Of Ray Tune it knows the signal that Tune listens to, of a cluster the address of its head.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from iclgd_dist.background import background
from iclgd_dist.terminal import CONTROL_C, INTERRUPTED, console, say, say_how_to_resume

DRAIN_SECONDS = 8.0  # from a signal to the end, whatever is under way
WATCH_SECONDS = 0.5
HEAD_SECONDS = 5.0  # between looks at whether the head answers
HEAD_LOST_SECONDS = 40.0  # of silence; Ray's own client ends the process after 60, without a word


class Budget:
    """What a command may spend on its runs, from now on; None = without limit. A GPU counts while an actor holds it for a block."""

    def __init__(self, hours: float | None = None, gpu_hours: float | None = None) -> None:
        self.hours, self.gpu_hours, self.spent_gpu_hours, self.started = hours, gpu_hours, 0.0, time.monotonic()

    def spend(self, num_gpus: int, seconds: float) -> None:
        self.spent_gpu_hours += num_gpus * seconds / 3600

    def over(self) -> str:
        """Return which limit is reached, or an empty text."""
        if self.hours is not None and time.monotonic() - self.started >= self.hours * 3600:
            return f"{self.hours:g} hours are spent"
        return f"{self.gpu_hours:g} GPU hours are spent" if self.gpu_hours is not None and self.spent_gpu_hours >= self.gpu_hours else ""


@dataclass
class Stopped:
    """Whether a run has to end, and with which exit code."""

    code: int = 0
    why: str = ""

    def ask(self, why: str) -> None:
        """Stop the run as SIGTERM would, and say why. Asked again, it does nothing."""
        if not self.code and not self.why:
            self.why = why
            say(why)
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stoppable() -> Iterator[Stopped]:
    """Turn SIGINT and SIGTERM into an orderly stop of Tune; a second one stops at once. Handlers that were there are put back."""
    stopped = Stopped()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def stop(number: int, frame: Any) -> None:
        if stopped.code:
            raise KeyboardInterrupt
        stopped.code = CONTROL_C if number == signal.SIGINT else INTERRUPTED
        if callable(signal.getsignal(signal.SIGUSR1)):  # Tune listens: finish the current second of work and end
            os.kill(os.getpid(), signal.SIGUSR1)
        elif callable(earlier := before[signal.Signals(number)]):
            earlier(number, frame)  # nothing runs yet: stop as the command line does

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    except KeyboardInterrupt:
        stopped.code = stopped.code or CONTROL_C
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def watched(budget: Budget, stopped: Stopped, *, num_gpus: Callable[[], int], head: Callable[[], str]) -> Iterator[None]:
    """Stop the run when its budget is spent or its head is lost, and end the process where an orderly stop takes too long.

    `num_gpus`: that are used now. `head`: host:port of the cluster, or an empty text as long as there is none.
    """

    def watch(ended: threading.Event) -> None:
        before = looked = answered = time.monotonic()
        drained = 0.0
        while not ended.wait(WATCH_SECONDS):
            now = time.monotonic()
            budget.spend(num_gpus(), now - before)
            drained += now - before if stopped.code or stopped.why else 0.0
            before = now
            if drained > DRAIN_SECONDS:  # actors in the middle of a long step: its cells are not committed, and no half of them is
                _end(stopped.code or INTERRUPTED)  # without a code the signal waits behind a call that does not return
            if why := budget.over():
                stopped.ask(why)
            if not stopped.code and now - looked > HEAD_SECONDS:
                looked = now
                answered = now if not (address := head()) or _answers(address) else answered
                if now - answered > HEAD_LOST_SECONDS:
                    stopped.ask(f"the cluster is lost: its head at {address} has not answered for {now - answered:.0f} s")

    with background(watch):
        yield


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True


def _end(code: int) -> None:
    try:
        console.show_cursor(True)  # a progress bar may have hidden it
        say_how_to_resume()
        sys.stdout.flush()
    finally:
        os._exit(code)
