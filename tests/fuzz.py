"""`python -m tests.fuzz [--minutes 10] [--seed N] [--targets NAME ...]`: damaged and hostile files for every reader, for as long as you like.

A finding is an exception that is not one of the project's own errors, a process that dies, 5 s without an answer, more memory than 2 GiB, or a store or a model
that gives other numbers than before and does not say so. Each try is made in a worker process, so that whatever happens has a name; its input is saved under
results/fuzz. The same seed makes the same tries. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

SAVED = Path("results") / "fuzz"
HANG_SECONDS = 5.0  # of processor time; or it sleeps for as long as WAIT_SECONDS, which a busy machine does not explain
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Finding:
    target: str
    what: str
    files: Path


class Worker:
    """A process that makes tries of one target, and tells of each before and after."""

    def __init__(self, module: str, target: str, seed: int, first: int, seconds: float) -> None:
        self.target, self.number, self.seconds, self.until = target, first - 1, seconds, float("inf")
        self.since, self.spent, self.begun = 0.0, 0.0, b""
        command = [sys.executable, "-m", module, target, str(seed), str(first)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (outlives this call)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, start_new_session=True, env=os.environ | {"PYTHONHASHSEED": "0"})
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()

    def lines(self) -> list[str]:
        """Return the lines that it has written since it was last asked."""
        *lines, self.begun = (self.begun + os.read(self.output, 2**16)).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def begin(self, number: int) -> None:
        self.number, self.since, self.spent = number, time.monotonic(), self.state()[1]
        self.until = min(self.until, self.since + self.seconds)  # what is imported before the first try does not count

    def left(self) -> float:
        return self.until - time.monotonic() if self.since else self.seconds

    def state(self) -> tuple[str, float]:
        """Return whether it runs (R) or waits, and the seconds of processor time that it has had so far."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return "R", 0.0
        return fields[0], sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def trouble(self) -> str:
        """Return why no more is to be expected from it; an empty text while it works."""
        if (code := self.process.poll()) is not None:
            return f"the process died with code {code}"
        waited, (state, seconds) = time.monotonic() - self.since, self.state()
        is_hung = seconds - self.spent > HANG_SECONDS or (waited > WAIT_SECONDS and state != "R")
        return f"no answer after {waited:.0f} s, {seconds - self.spent:.0f} s of the processor's" if self.since and waited > HANG_SECONDS and is_hung else ""

    def end(self) -> str:
        """Return the last of what it said."""
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        return self.log.read()[-2000:]


def fuzz(
    module: str,
    targets: list[str],
    *,
    minutes: float,
    seed: int,
    tries: int | None = None,
    num_workers: int = 2,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Counter[str], list[Finding]]:
    """Try one target of a module after the other, for its share of the time and at most so many times. Returns how many inputs each had, and each finding once."""
    shares = {name: import_module(module).TARGETS[name].share for name in targets}
    inputs, findings, running, waiting = Counter[str](), dict[tuple[str, str], Finding](), list[Worker](), list(targets)
    end, chooser = time.monotonic() + minutes * 60, selectors.DefaultSelector()

    def start(target: str, first: int, seconds: float) -> None:
        running.append(worker := Worker(module, target, seed, first, seconds))
        chooser.register(worker.output, selectors.EVENT_READ, worker)

    def found(worker: Worker, what: str) -> None:
        place = worker.target, what.rpartition(" at ")[2]
        if place not in findings:
            findings[place] = Finding(worker.target, what, save(module, worker.target, seed, worker.number))
            say(f"FOUND {worker.target} {worker.number}: {what} -> {findings[place].files}")

    def hear(worker: Worker) -> None:
        for line in worker.lines():
            kind, _, rest = line.partition(" ")
            if kind == "try":
                worker.begin(int(rest))
            elif kind == "done":
                inputs[worker.target] += 1
            elif kind == "found":
                found(worker, rest)

    said = time.monotonic()
    try:
        while running or waiting:
            while waiting and len(running) < num_workers:
                left = end - time.monotonic()
                free = num_workers * left - sum(worker.left() for worker in running)
                start(target := waiting[0], 0, max(1.0, min(left, free * shares[target] / sum(map(shares.__getitem__, waiting)))))
                del waiting[0]
            for key, _ in chooser.select(timeout=0.5):
                hear(key.data)
            for worker in list(running):
                trouble, is_over = worker.trouble(), time.monotonic() > worker.until or worker.number >= (tries or sys.maxsize)
                if not (trouble or is_over):
                    continue
                chooser.unregister(worker.output)
                running.remove(worker)
                last = worker.end()
                hear(worker)
                if not trouble or worker.number >= (tries or sys.maxsize):
                    continue
                if not worker.since:
                    raise RuntimeError(f"{worker.target} does not start: {last}")
                found(worker, f"{trouble}: {last.splitlines()[-1:]}")
                inputs[worker.target] += 1
                if not is_over and worker.number + 1 < (tries or sys.maxsize):
                    start(worker.target, worker.number + 1, worker.until - time.monotonic())
            if time.monotonic() - said > 15:
                said = time.monotonic()
                say(", ".join(f"{target} {count:,}" for target, count in inputs.items()) + f" inputs, {len(findings)} findings")
    finally:
        for worker in running:
            worker.end()
    return inputs, list(findings.values())


def save(module: str, target: str, seed: int, number: int) -> Path:
    """Write the files of a try that differ from the undamaged ones, and return where."""
    folder = SAVED / f"{target}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in import_module(module).TARGETS[target].case(seed, number).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.with_name(path.name + ".gone").touch()
        else:
            path.write_bytes(content)
    return folder


def main() -> int:
    from tests.fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 10**6)
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    started = time.monotonic()
    inputs, findings = fuzz(
        "tests.fuzz_targets",
        asked.targets,
        minutes=asked.minutes,
        seed=asked.seed,
        num_workers=asked.workers,
        say=lambda text: print(text, flush=True),
    )
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"seconds": seconds, "seed": asked.seed, "inputs": dict(inputs), "findings": len(findings), "holds": not findings}))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
