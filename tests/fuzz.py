"""`python -m tests.fuzz [--minutes 10] [--seed N]`: damaged and hostile files for every reader, for as long as you like.

A finding is an exception that is not one of the project's own errors, a process that dies, 5 s without an answer, more memory than 2 GiB, or a store that gives
other rows than before and does not say so. Each try is made in a worker process, so that whatever happens has a name; its input is saved under results/fuzz.
The same seed makes the same tries. The last line is one JSON object.
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
from pathlib import Path

SAVED = Path("results") / "fuzz"
HANG_SECONDS = 5.0  # of processor time; or it sleeps for as long as WAIT_SECONDS, which a busy machine does not explain
WAIT_SECONDS = 30.0


class Worker:
    """A process that makes tries of one target, and tells of each before and after."""

    def __init__(self, target: str, seed: int, first: int) -> None:
        self.target, self.seed, self.number, self.since = target, seed, first - 1, time.monotonic()
        self.spent, self.begun = 0.0, b""
        command = [sys.executable, "-m", "tests.fuzz_targets", target, str(seed), str(first)]
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (outlives this call)
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, start_new_session=True, env=os.environ | {"PYTHONHASHSEED": "0"})

    def lines(self) -> list[str]:
        """Return the lines that it has written since it was last asked."""
        assert self.process.stdout is not None
        *lines, self.begun = (self.begun + os.read(self.process.stdout.fileno(), 2**16)).split(b"\n")
        return [line.decode(errors="replace") for line in lines]

    def state(self) -> tuple[str, float]:
        """Return whether it runs (R) or waits, and the seconds of processor time that it has had so far."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return "R", 0.0
        return fields[0], sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

    def hangs(self) -> bool:
        waited, (state, seconds) = time.monotonic() - self.since, self.state()
        return self.number >= 0 and waited > HANG_SECONDS and (seconds - self.spent > HANG_SECONDS or (waited > WAIT_SECONDS and state != "R"))

    def end(self) -> str:
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        return self.log.read()[-2000:]


def fuzz(targets: dict[str, int], *, minutes: float, seed: int, num_workers: int = 2, say: bool = True) -> tuple[Counter[str], list[dict[str, str]]]:
    """Try one target after the other, each for its share of the time, by some workers at once. Returns how many inputs each had, and what was found."""
    inputs: Counter[str] = Counter()
    findings: list[dict[str, str]] = []
    queue = list(targets)
    end = time.monotonic() + minutes * 60
    share = minutes * 60 * num_workers / sum(targets.values())
    running: dict[int, tuple[Worker, float]] = {}
    chooser = selectors.DefaultSelector()

    def start(target: str, first: int, until: float) -> None:
        worker = Worker(target, seed, first)
        chooser.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
        running[id(worker)] = worker, until

    def leave(worker: Worker) -> None:
        chooser.unregister(worker.process.stdout)  # type: ignore[arg-type]
        del running[id(worker)]

    def found(worker: Worker, what: str) -> None:
        findings.append({"target": worker.target, "number": str(worker.number), "what": what, "input": save(worker.target, seed, worker.number)})
        if say:
            print(f"FOUND {worker.target} {worker.number}: {what} -> {findings[-1]['input']}", flush=True)

    last_said = time.monotonic()
    try:
        while running or queue:
            while queue and len(running) < num_workers:
                start(target := queue.pop(0), 0, min(end + 5, time.monotonic() + share * targets[target]))
            for key, _ in chooser.select(timeout=0.5):
                worker: Worker = key.data
                for line in worker.lines():
                    kind, _, rest = line.partition(" ")
                    if kind == "try":
                        worker.number, worker.since, worker.spent = int(rest), time.monotonic(), worker.state()[1]
                    elif kind == "done":
                        inputs[worker.target] += 1
                    elif kind == "found":
                        found(worker, rest)
            for worker, until in list(running.values()):
                code = worker.process.poll()
                is_hung = code is None and worker.hangs()
                if code is not None or is_hung:
                    leave(worker)
                    said = worker.end()
                    if worker.number < 0:
                        raise RuntimeError(f"{worker.target} does not start: {said}")
                    found(worker, f"no answer after {HANG_SECONDS:.0f} s" if is_hung else f"the process died with code {code}: {said[-200:]!r}")
                    inputs[worker.target] += 1
                    if time.monotonic() < until:
                        start(worker.target, worker.number + 1, until)
                elif time.monotonic() > until:
                    leave(worker)
                    worker.end()
            if say and time.monotonic() - last_said > 15:
                last_said = time.monotonic()
                print(", ".join(f"{target} {count:,}" for target, count in inputs.items()), f"inputs, {len(findings)} findings", flush=True)
    finally:
        for worker, _ in running.values():
            worker.end()
    return inputs, findings


def save(target: str, seed: int, number: int) -> str:
    """Write the files of a try that differ from the undamaged ones, and return where."""
    from tests.fuzz_targets import TARGETS

    folder = SAVED / f"{target}-{seed}-{number}"
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in TARGETS[target].case(seed, number).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.with_name(path.name + ".gone").touch()
        else:
            path.write_bytes(content)
    return str(folder)


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
    inputs, findings = fuzz({name: TARGETS[name].share for name in asked.targets}, minutes=asked.minutes, seed=asked.seed, num_workers=asked.workers)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({"seconds": seconds, "inputs": dict(inputs), "findings": len(findings), "holds": not findings}))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
