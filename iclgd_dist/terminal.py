"""What the commands share: the console, their common arguments, and finding the store that is meant. Knows typer and rich; computes nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from iclgd_dist import files
from iclgd_dist.config import Sweep, SweepError, load_sweep
from iclgd_dist.store import Store

DONE, USAGE, FAILED, STORAGE, INTERRUPTED, CONTROL_C = 0, 2, 3, 74, 75, 130  # exit codes

console = Console(highlight=False, markup=False)  # names and errors come from data

AS_JOB = "ICLGD_AS_JOB"  # set where a sweep runs as a job of a cluster

SweepFile = Annotated[str, typer.Argument(help="Sweep file, e.g. sweeps/demo.toml", metavar="SWEEP")]
StoreOption = Annotated[
    str | None, typer.Option("--store", help="Where results go: a directory, or s3://bucket/prefix. Default: results/<name of the sweep>", show_default=False)
]
Where = Annotated[str, typer.Argument(help="Store (a directory, s3://bucket/prefix), or the sweep file whose store it is", metavar="STORE")]
Hours = Annotated[float | None, typer.Option(min=0, help="Stop after so many hours; the same command resumes", show_default=False)]
GpuHours = Annotated[float | None, typer.Option(min=0, help="Stop when blocks have used GPUs for so many hours together", show_default=False)]
Insecure = Annotated[bool, typer.Option("--insecure-no-auth", help="Use a cluster without a token: Ray runs code for whoever reaches it")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts")]
Yes = Annotated[bool, typer.Option("--yes", help="Do it; without this, only say what would be done")]


def say(text: str) -> None:
    """Print a line as it is: paths are not broken."""
    console.print(text, soft_wrap=True)


def say_json(said: Mapping[str, Any]) -> None:
    """Print one JSON object, and nothing else: not broken, not coloured."""
    sys.stdout.write(json.dumps(said, allow_nan=False) + "\n")


def say_how_to_resume() -> None:
    if os.environ.get(AS_JOB):
        say("stopped; what is committed stays. To resume, submit the sweep again.")
    else:
        say("stopped; what is committed stays. To resume:\n" + shlex.join(["iclgd", *sys.argv[1:]]))


@contextlib.contextmanager
def resumable() -> Iterator[None]:
    """Say how to resume where the block ends with the exit code of a stop."""
    try:
        yield
    except (SystemExit, typer.Exit) as end:
        if (end.exit_code if isinstance(end, typer.Exit) else end.code) in (INTERRUPTED, CONTROL_C):
            say_how_to_resume()
        raise


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def store_of(sweep: Sweep, where: str | None) -> Store:
    return _store(where or Path("results") / sweep.name)


def _store(where: str | Path) -> Store:
    try:
        return Store(where)
    except ValueError as error:
        raise SweepError(str(error)) from None


def existing(where: str | Store) -> Store:
    """Return a store that is there, or that of a sweep file. Errors: SweepError where there is none."""
    store = where if isinstance(where, Store) else store_of(load_sweep(where), None) if where.endswith(".toml") else _store(where)
    if not files.is_folder(store.root):
        raise SweepError(f"{store.root}: no such store; `iclgd run SWEEP` makes one, by default results/<name of the sweep>")
    if isinstance(store.root, Path) and not files.is_folder(store.root / "cells"):
        raise SweepError(f"{store.root}: is no store: it has no folder cells; `iclgd run SWEEP` makes one, by default results/<name of the sweep>")
    return store
