"""What a kind of input is to `tests/fuzz.py`: good files, how they are damaged, how they are read; and the process that makes the tries."""

from __future__ import annotations

import functools
import logging
import os
import random
import resource
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from iclgd_dist.config import SweepError
from iclgd_dist.store_errors import StoreError, Vanished
from tests import mutations

Files = dict[str, bytes | None]  # name -> content, None where it is gone
OURS = (SweepError, StoreError, Vanished)  # what the command line says in one message
MEMORY_BYTES = 2 << 30  # above what a worker has when it begins


@dataclass(frozen=True)
class Target:
    """One kind of input. `read` raises one of our errors or returns; what it returns is a finding, in words."""

    good: Callable[[], dict[str, bytes]]
    damage: Callable[[dict[str, bytes], random.Random], Files]
    read: Callable[[Path], str | None]
    share: int = 2  # of the time

    def case(self, seed: int, number: int) -> Files:
        """Return the files that differ from the good ones."""
        return self.damage(dict(good(self)), random.Random(f"{seed} {number}"))

    def attempt(self, files: Files, folder: Path) -> str | None:
        """Return what is wrong with how damaged files are read; None where all is well."""
        for name, content in (good(self) | files).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                (folder / name).write_bytes(content)
        try:
            return self.read(folder)
        except OURS as error:
            return "memory ran out, and that was taken for damage" if has_memory_error(error) else None
        except BaseException as error:  # a panic of a library in Rust is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            ours = next(
                (frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if {"iclgd_dist", "analysis"} & set(Path(frame.filename).parts)), place
            )
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            return f"{said} at {Path(ours.filename).name}:{ours.lineno} from {Path(place.filename).name}:{place.lineno}"


def has_memory_error(error: BaseException | None) -> bool:
    """Say whether memory ran out below an error of ours, which does not say so itself (`from None`)."""
    if error is None or isinstance(error, MemoryError):
        return error is not None
    return has_memory_error(error.__cause__ or (None if error.__suppress_context__ else error.__context__))


@functools.cache
def good(target: Target) -> dict[str, bytes]:
    return target.good()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one(names: str, how: mutations.Mutation = mutations.some_of) -> Callable[[dict[str, bytes], random.Random], Files]:
    """Return what damages one of some files."""

    def damage(files: dict[str, bytes], choose: random.Random) -> Files:
        name = choose.choice(names.split())
        return {name: how(files[name], choose)}

    return damage


def work(targets: dict[str, Target], target: str, seed: int, first: int) -> None:
    """Make one try after the other, for ever, and tell of each."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    chosen, number = targets[target], first
    with tempfile.TemporaryDirectory() as place:
        said = chosen.attempt({}, Path(place) / "whole")  # imports what is needed
        assert said is None, said
        held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY_BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while True:
            print(f"try {number}", flush=True)
            folder = Path(place) / str(number)
            finding = chosen.attempt(chosen.case(seed, number), folder)
            if finding:
                print("found", finding.replace("\n", " "), flush=True)
            print("done", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            number += 1
