"""A method that is vanilla finetuning until an accident happens; which, where and how often stands in a file beside the sweep. Travels to the actors as text."""

import contextlib
import json
import os
import resource
import signal
import time
from pathlib import Path

import torch

from iclgd_dist import store
from iclgd_dist.updates import Vanilla


class Accident(Vanilla):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = Path(folder)

    def train(self, lm, demonstrations, learning_rates, *, steps, seed):
        for probe in super().train(lm, demonstrations, learning_rates, steps=steps, seed=seed):
            self.happen(seed, probe.step, len(learning_rates))
            yield probe

    def happen(self, seed, step, num_lanes):
        path = self.folder / "accidents.json"
        for number, accident in enumerate(json.loads(path.read_text()) if path.exists() else []):
            if accident.get("seed", seed) == seed and accident.get("step", step) == step and self.is_due(number, accident):
                getattr(self, accident["what"])(accident, num_lanes)

    def is_due(self, number, accident):
        for turn in range(accident.get("times", 1)):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.folder / f"happened-{number}-{turn}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                return True
        return accident.get("always", False)

    def kill(self, accident, num_lanes):
        if num_lanes > accident.get("lanes", 0):
            os.kill(os.getpid(), signal.SIGKILL)

    def stop(self, accident, num_lanes):
        (self.folder / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def slow(self, accident, num_lanes):
        time.sleep(accident["seconds"])

    def die_at(self, accident, num_lanes):
        """Let the process end at a point of the next commit."""
        store.fault_point = lambda point: os._exit(7) if point == accident["point"] else None

    def memory(self, accident, num_lanes):
        """Ask for 1 GiB per learning rate where the process may have `gib` more than it has."""
        before, used = resource.getrlimit(resource.RLIMIT_AS), int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(accident["gib"] * 2**30), before[1]))
        try:
            torch.empty(num_lanes * 2**30, dtype=torch.uint8)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    def call_fails(self, accident, num_lanes):
        """Let a system call of the next commits fail once, the nth time it is made."""
        name, real, calls = accident["call"], getattr(os, accident["call"]), []

        def failing(*arguments, **options):
            calls.append(1)
            if len(calls) == accident["nth"]:
                raise OSError(accident["code"], os.strerror(accident["code"]))
            return real(*arguments, **options)

        setattr(os, name, failing)

    def no_links(self, accident, num_lanes):
        def link(*arguments, **options):
            raise OSError(95, "no hard links here")

        os.link = link

    def disk_full(self, accident, num_lanes):
        """Let no file grow beyond some bytes, as on a full disk."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (accident["bytes"], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def clock(self, accident, num_lanes):
        real = time.time
        time.time = lambda: real() - 3600
