"""The command line: status, report, check-method, convert-weights, and where the commands of sweeps, stores and jobs come together. Knows words and exit codes; the work is elsewhere.

Exit codes: 0 every planned cell has a final row; 2 wrong usage, found before any model loads; 3 some cells failed; 74 storage; 75 stopped by
SIGTERM, resumable; 130 Ctrl-C. After 75 and 130 the last line is the command that resumes.
"""

from __future__ import annotations

import os
import signal
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from iclgd_dist import job_commands, plan_command, run_commands, store_commands
from iclgd_dist.config import SweepError
from iclgd_dist.store import StoreError
from iclgd_dist.store_errors import Vanished
from iclgd_dist.terminal import (
    CONTROL_C,
    INTERRUPTED,
    STORAGE,
    USAGE,
    AsJson,
    Insecure,
    Where,
    console,
    existing,
    say,
)

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # they would show local variables
    help="""Compare in-context learning with finetuning over a grid of learning rates and steps.

A sweep file says what to compare. The commands in order of use:

\b
iclgd plan   sweeps/demo.toml   what it costs; no results are written
iclgd run    sweeps/demo.toml   compute what is missing; again resumes
iclgd tune   sweeps/tune.toml   search for learning rates
iclgd status results/demo       how far it is, also while it runs
iclgd report results/demo       the table, and a page of figures
iclgd measure SWEEP.toml        metrics, controls, measures added since
iclgd check-method FILE:NAME    a training rule of your own
iclgd convert-weights DIR       pickled weights as safetensors

\b
iclgd submit | stop             a sweep as a job of a Ray cluster
iclgd verify | compact          is a store whole; make it quick to read
iclgd forget | gc               run cells again; delete what is left over

\b
Exit codes: 0 every cell is final; 2 wrong usage; 3 some cells failed;
74 storage; 75 stopped by SIGTERM, a spent budget or a lost cluster;
130 by Ctrl-C. Run again to resume.""",
)


def _add(*commands: Callable[..., None]) -> None:
    for command in commands:
        app.command()(command)


_add(plan_command.plan, run_commands.run, run_commands.tune, run_commands.measure)


@app.command()
def status(
    store: Annotated[str | None, typer.Argument(help="Store, or the sweep file whose store it is", metavar="STORE")] = None,
    address: Annotated[str | None, typer.Option(help="Dashboard of a Ray cluster, e.g. http://127.0.0.1:8265: show its sweeps", show_default=False)] = None,
    as_json: AsJson = False,
    insecure: Insecure = False,
) -> None:
    """Show how far a store is, also while a sweep runs; or, with --address, the sweeps of a cluster.

    Cells planned and committed, blocks run, models loaded, cost, attempts that failed.

    Example: iclgd status results/demo
    """
    if (store is None) == (address is None):
        raise typer.BadParameter("give a store, e.g. results/demo, or the --address of a cluster's dashboard")
    if address is not None:
        if as_json:
            raise typer.BadParameter("--json is for a store; leave it out with --address")
        job_commands.show_jobs(address, is_open=insecure)
    else:
        store_commands.show_status(existing(str(store)), as_json=as_json)


@app.command()
def report(
    store: Where, out: Annotated[Path | None, typer.Option("--out", help="Where the page goes. Default: <store>/report.html", show_default=False)] = None
) -> None:
    """Print the table of results and write the page with all figures.

    Example: iclgd report results/demo
    """
    results = existing(store)
    root = str(results.root)
    if not results.keys():
        raise SweepError(f"{root}: holds no cells yet; `iclgd status {root}` says what was tried, and `iclgd run SWEEP` computes them")
    from iclgd_analysis import load, write_report  # slow, and of no use without a store
    from iclgd_analysis.table import show

    if out is None and "://" in root:
        raise SweepError(f"{root}: is no directory to write the page to; give --out PAGE.html")
    frames = load(root)
    show(frames, console)
    say(f"page: {write_report(root, out, frames=frames)}")


@app.command("check-method")
def check_method_command(
    code: Annotated[str, typer.Argument(help="A file and a class in it: my_rules.py:Mine", metavar="FILE:NAME")],
    option: Annotated[
        list[str] | None, typer.Option("--option", help="A keyword of the class, name=value, as in options = { name = value }; may be repeated")
    ] = None,
) -> None:
    """Check a method of your own on a tiny random model, before a sweep uses it.

    Example: iclgd check-method my_rules.py:Mine
    """
    from pydantic import ValidationError

    from iclgd_dist.extensions import MethodSpec

    try:
        options = tomllib.loads("\n".join(option or ()))
    except tomllib.TOMLDecodeError as error:
        raise SweepError(f"check-method: --option must be name=value as in TOML (text in quotes), got {', '.join(option or ())}: {error}") from None
    try:
        spec = MethodSpec(name="checked", code=code, options=options).with_text(Path())
    except ValidationError as error:
        raise SweepError(f"check-method {code}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise SweepError(f"check-method {code}: {error}") from None
    from iclgd_dist.check import check_method  # slow: torch
    from iclgd_dist.updates import make_method

    make_method(spec)
    findings = []
    for finding in check_method(lambda: make_method(spec)):
        findings.append(finding)
        mark = Text("holds ", "green") if finding.holds else Text("fails ", "red")
        console.print(Text.assemble(mark, finding.what, f": {finding.problem}" if finding.problem else ""), soft_wrap=True)
    raise typer.Exit(0 if all(finding.holds for finding in findings) else USAGE)


@app.command("convert-weights")
def convert_weights(directory: Annotated[Path, typer.Argument(help="A model directory with pickled weights", metavar="DIR")]) -> None:
    """Write a model's pickled weights as safetensors beside them, for sweeps, which read no pickles.

    Tensors are read and nothing else: a pickle that names code is refused, and none of it is run.

    Example: iclgd convert-weights models/opt-125m
    """
    from iclgd_dist.pickles import convert_pickles

    for path in convert_pickles(directory):
        say(f"written: {path}")


_add(store_commands.verify, store_commands.compact, store_commands.forget, store_commands.gc, job_commands.submit, job_commands.stop)


def main() -> None:
    """Run the command line; errors of the user's are one message and exit code 2, trouble with the store is 74."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # while blocks run, those of stopping.py
        signal.signal(number, _stop)
    try:
        app()
    except SweepError as error:
        errors.print(str(error))
        raise SystemExit(USAGE) from None
    except StoreError as error:
        errors.print(str(error))
        raise SystemExit(STORAGE) from None
    except Vanished as error:
        errors.print(f"{error}: is gone; somebody changed the store meanwhile: run the same command again")
        raise SystemExit(STORAGE) from None


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(CONTROL_C if number == signal.SIGINT else INTERRUPTED)


if __name__ == "__main__":
    main()
