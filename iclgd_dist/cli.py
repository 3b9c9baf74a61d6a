"""The command line: iclgd plan | run | measure | status | report | check-method, and the commands of stores and jobs. Knows words, exit codes and where results go; the work is elsewhere.

Exit codes: 0 every planned cell has a final row; 2 wrong usage, found before any model loads; 3 some cells failed; 74 storage; 75 stopped by
SIGTERM, resumable; 130 Ctrl-C. After 75 and 130 the last line is the command that resumes.
"""

from __future__ import annotations

import os
import signal
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from iclgd_dist import job_commands, store_commands
from iclgd_dist.config import MAX_CELLS_UNASKED, Sweep, SweepError, load_sweep
from iclgd_dist.progress import in_words
from iclgd_dist.runner import CONTROL_C, DONE, FAILED, INTERRUPTED, STORAGE, USAGE, Budget, run_sweep
from iclgd_dist.session import check_machine
from iclgd_dist.store import Store, StoreError
from iclgd_dist.terminal import GpuHours, Hours, Insecure, StoreOption, SweepFile, Where, console, counted, existing, say, say_how_to_resume, store_of

if TYPE_CHECKING:
    from iclgd_dist.plan import Plan

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # they would show local variables
    help="""Compare in-context learning with finetuning over a grid of learning rates and steps.

A sweep file says what to compare. The commands in order of use:

\b
iclgd plan   sweeps/demo.toml   what it costs; nothing is written
iclgd run    sweeps/demo.toml   compute what is missing; again resumes
iclgd status results/demo       how far it is, also while it runs
iclgd report results/demo       the table, and a page of figures
iclgd measure SWEEP.toml        metrics and controls that were added since
iclgd check-method FILE:NAME    a training rule of your own

\b
iclgd submit | stop             a sweep as a job of a Ray cluster
iclgd verify | compact          is a store whole; make it quick to read
iclgd forget | gc               run cells again; delete what is left over

\b
Exit codes: 0 every cell is final; 2 wrong usage; 3 some cells failed;
74 storage; 75 stopped by SIGTERM, a spent budget or a lost cluster;
130 by Ctrl-C. Run again to resume.""",
)
AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster, e.g. auto or 10.0.0.1:6379. Default: start Ray on this machine, for loopback only", show_default=False)
]


@app.command()
def plan(sweep: SweepFile, store: StoreOption = None) -> None:
    """Show what a sweep would run.

    Cells, blocks, tokens, FLOPs, memory and time, by arithmetic on the actual prompts. Loads no model, writes no results.

    Example: iclgd plan sweeps/demo.toml
    """
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "2")  # seconds; where the hub does not answer, the file alone does
    loaded = load_sweep(sweep)
    results = store_of(loaded, store)
    planned = _plan(loaded, results, tolerate_unreachable=True)
    _show_plan(loaded, planned, results)


@app.command()
def run(
    sweep: SweepFile,
    store: StoreOption = None,
    address: AddressOption = None,
    yes: Annotated[bool, typer.Option("--yes", help=f"Run more than {MAX_CELLS_UNASKED:,} cells without asking")] = False,
    hours: Hours = None,
    gpu_hours: GpuHours = None,
    insecure: Insecure = False,
) -> None:
    """Run every cell that is not in the store yet.

    The same command again resumes; a larger grid in the same file adds to what is there. With [controls] random_delta = true, random weights of the same
    effect follow for the cells that the report cites.

    Example: iclgd run sweeps/demo.toml
    """
    from iclgd_dist.plan import count_cells

    loaded, budget = load_sweep(sweep), Budget(hours, gpu_hours)
    if count_cells(loaded)[0] > MAX_CELLS_UNASKED and not yes:
        raise SweepError(f"{sweep}: {count_cells(loaded)[0]:,} cells are more than {MAX_CELLS_UNASKED:,}; look at `iclgd plan {sweep}`, then add --yes")
    results = store_of(loaded, store)
    planned = _plan(loaded, results)
    _show_plan(loaded, planned, results)
    if planned.blocks and address is None:
        check_machine(loaded.resources)
    if planned.blocks:
        _try_code(loaded)
    results.prepare()
    results.save_sweep(digest=loaded.digest(), resolved=loaded.resolved(), keys=list(planned.keys))
    code = DONE
    if planned.blocks:
        code = run_sweep(loaded, planned, results, address=address, console=console, budget=budget, is_open=insecure)
    else:
        console.print(f"0 cells to run: all {len(planned.keys)} are in {results.root}", soft_wrap=True, markup=False)
    if code == DONE and loaded.controls.random_delta:
        code = _random_deltas(loaded, results, address=address, budget=budget, is_open=insecure)
    if code == FAILED:
        console.print(f"some cells could not be computed here; see `iclgd status {results.root}`, then run again", soft_wrap=True, markup=False)
    elif code == DONE:
        console.print(f"next: iclgd report {results.root}", soft_wrap=True, markup=False)
    raise typer.Exit(code)


def _random_deltas(sweep: Sweep, store: Store, *, address: str | None, budget: Budget, is_open: bool) -> int:
    """Make random weights of the same effect for the trained cells that the report cites, where they have none; return the exit code."""
    from iclgd_analysis import load
    from iclgd_analysis.chosen import cited

    from iclgd_dist.blocks import with_cells
    from iclgd_dist.measuring import Missing, random_targets, with_targets
    from iclgd_dist.plan import make_plan
    from iclgd_dist.store import read_results

    results = read_results(store)
    targets = random_targets(results, cited(load(str(store.root))), Missing(results))
    planned = make_plan(sweep, choose=lambda block, encoded: with_targets(block, targets, lambda cells: with_cells(block, cells, encoded)))
    if not planned.blocks:
        return DONE
    console.print(
        f"random weights of the same effect for {counted(sum(len(block.random_targets) for block in planned.blocks), 'trained cell')}", highlight=False
    )
    return run_sweep(sweep, planned.of_blocks(), store, address=address, console=console, budget=budget, is_open=is_open)


@app.command()
def measure(sweep: SweepFile, store: StoreOption = None, address: AddressOption = None, insecure: Insecure = False) -> None:
    """Fill in what committed cells lack: metrics and control contexts added to the sweep file since, and pairs of methods.

    Metrics come from kept captures where there are any; the other cells are trained again, and only their measures are stored.

    Example: iclgd measure sweeps/controls.toml
    """
    from iclgd_dist.blocks import Block, with_cells
    from iclgd_dist.encoding import Encoded
    from iclgd_dist.measuring import Missing, measure_kept
    from iclgd_dist.plan import make_plan
    from iclgd_dist.store import read_results

    loaded = load_sweep(sweep)
    _try_code(loaded)
    results = existing(store_of(loaded, store))
    results.prepare()
    missing, num_kept = Missing(read_results(results)), 0

    def lacking(block: Block, encoded: Encoded) -> Block | None:
        nonlocal num_kept
        num_kept += measure_kept(results, block, missing, encoded)
        cells = missing.to_train(block, encoded)
        return replace(with_cells(block, cells, encoded), is_measuring=True) if cells else None

    planned = make_plan(loaded, choose=lacking)
    console.print(f"{counted(num_kept, 'cell')} measured from kept captures", highlight=False)
    if absent := len(set(planned.keys) - results.keys()):
        console.print(f"{counted(absent, 'cell')} of the sweep not there yet: iclgd run {sweep}", highlight=False, soft_wrap=True)
    if not planned.blocks:
        console.print("nothing to train again", highlight=False)
        raise typer.Exit(FAILED if absent else DONE)
    planned = planned.of_blocks()
    console.print(f"{counted(len(planned.keys), 'cell')} to compute again in {counted(len(planned.blocks), 'block')}", highlight=False)
    if address is None:
        check_machine(loaded.resources)
    raise typer.Exit(run_sweep(loaded, planned, results, address=address, console=console, is_open=insecure) or (FAILED if absent else DONE))


@app.command()
def status(
    store: Annotated[str | None, typer.Argument(help="Store, or the sweep file whose store it is", metavar="STORE")] = None,
    address: Annotated[str | None, typer.Option(help="Dashboard of a Ray cluster, e.g. http://127.0.0.1:8265: show its sweeps", show_default=False)] = None,
    insecure: Insecure = False,
) -> None:
    """Show how far a store is, also while a sweep runs; or, with --address, the sweeps of a cluster.

    Cells planned and committed, blocks run, models loaded, cost, attempts that failed.

    Example: iclgd status results/demo
    """
    if (store is None) == (address is None):
        raise typer.BadParameter("give a store, e.g. results/demo, or the --address of a cluster's dashboard")
    if address is not None:
        job_commands.show_jobs(address, is_open=insecure)
    else:
        store_commands.show_status(existing(str(store)))


@app.command()
def report(
    store: Where, out: Annotated[Path | None, typer.Option("--out", help="Where the page goes. Default: <store>/report.html", show_default=False)] = None
) -> None:
    """Print the table of results and write the page with all figures.

    Example: iclgd report results/demo
    """
    from iclgd_analysis import load, write_report
    from iclgd_analysis.table import show

    root = str(existing(store).root)
    if out is None and "://" in root:
        raise SweepError(f"{root}: is no directory to write the page to; give --out PAGE.html")
    show(load(root), console)
    say(f"page: {write_report(root, out)}")


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

    from iclgd_dist.check import check_method
    from iclgd_dist.extensions import MethodSpec
    from iclgd_dist.updates import make_method

    try:
        options = tomllib.loads("\n".join(option or ()))
        spec = MethodSpec(name="checked", code=code, options=options).with_text(Path())
    except ValidationError as error:
        raise SweepError(f"check-method {code}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    except ValueError as error:
        raise SweepError(f"check-method {code}: {error}") from None
    make_method(spec)
    findings = []
    for finding in check_method(lambda: make_method(spec)):
        findings.append(finding)
        mark = Text("holds ", "green") if finding.holds else Text("fails ", "red")
        console.print(Text.assemble(mark, finding.what, f": {finding.problem}" if finding.problem else ""), soft_wrap=True)
    raise typer.Exit(0 if all(finding.holds for finding in findings) else USAGE)


for _command in (store_commands.verify, store_commands.compact, store_commands.forget, store_commands.gc, job_commands.submit, job_commands.stop):
    app.command()(_command)


def _try_code(sweep: Sweep) -> None:
    """Import the code of the sweep's own methods and metrics, so that a mistake is found before a model is loaded. Errors: SweepError."""
    methods = [method for method in map(sweep.method_spec, sweep.methods) if method.code is not None]
    if methods:
        from iclgd_dist.updates import make_method

        for method in methods:
            make_method(method)
    if sweep.metric:
        from iclgd_dist.measures import make_metric

        for metric in sweep.metric:
            make_metric(metric)


def _plan(sweep: Sweep, store: Store, *, tolerate_unreachable: bool = False) -> Plan:
    from iclgd_dist.plan import make_plan

    with console.status("planning") if console.is_terminal else _silent() as shown:
        say = (lambda text: shown.update(text)) if shown is not None else (lambda text: None)
        return make_plan(sweep, store.keys(), tolerate_unreachable=tolerate_unreachable, progress=say)


class _silent:
    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _show_plan(sweep: Sweep, planned: Plan, store: Store) -> None:
    for line, kind, style in (*((w, "warning: ", "yellow") for w in planned.warnings), *((n, "note: ", "cyan") for n in planned.notes)):
        console.print(Text.assemble((kind, style), line), soft_wrap=True)
    console.print(f"{sweep.name}: {planned.num_cells:,} cells in {planned.num_blocks_planned:,} blocks; store {store.root}", soft_wrap=True, markup=False)
    for problem in planned.unreachable:
        console.print(f"not reachable: tokens, FLOPs and finished cells unknown ({problem})", markup=False, soft_wrap=True)
    if not planned.blocks:
        return
    costs = [block.cost for block in planned.blocks]
    flops = sum(cost.flops for cost in costs)
    rate = machine_gflops() * 1e9
    rows = {
        "to run": f"{planned.num_to_run:,} cells in {len(planned.blocks):,} blocks; {planned.num_done:,} are there",
        "tokens": f"{sum(cost.training_tokens for cost in costs):,} trained, {sum(cost.capture_tokens for cost in costs):,} captured (times learning rates and steps)",
        "FLOPs": f"{flops:.2e}",
        "memory": f"about {max(cost.peak_gib for cost in costs):.1f} GiB per actor",
        "time": f"about {in_words(flops / rate / 0.6)} on this machine alone ({rate / 1e9:.0f} GFLOP/s measured; 60 % of it assumed)",
    }
    if kept := {cell.key: block.cost.capture_bytes for block in planned.blocks for cell in block.cells if cell.is_kept}:
        rows["captures"] = f"{decimal(sum(kept.values()))} kept, of {len(kept):,} cells"
    if sweep.resources.is_offloaded:
        once, more = max((cost.layer_bytes, cost.vanilla_reads) for cost in costs)
        vanilla = f"; methods that need the layers above read them {more} times more, {decimal(once * more)}" if more else ""
        rows["weights"] = f"{decimal(once)} of layers, read once a block by baselines and layer by layer training{vanilla}"
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def machine_gflops(size: int = 768) -> float:
    """Return this machine's float32 matrix-product rate through numpy, in a fraction of a second: the plan's yardstick."""
    import time

    import numpy as np

    a = np.ones((size, size), dtype=np.float32)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def main() -> None:
    """Run the command line; errors of the user's are one message and exit code 2, trouble with the store is 74."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    errors = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # while blocks run, the runner's own handlers
        signal.signal(number, _stop)
    try:
        app()
    except SweepError as error:
        errors.print(str(error))
        raise SystemExit(USAGE) from None
    except StoreError as error:
        errors.print(str(error))
        raise SystemExit(STORAGE) from None
    except SystemExit as end:
        if end.code in (INTERRUPTED, CONTROL_C):
            say_how_to_resume()
        raise


def _stop(number: int, frame: object) -> NoReturn:
    raise SystemExit(CONTROL_C if number == signal.SIGINT else INTERRUPTED)


if __name__ == "__main__":
    main()
