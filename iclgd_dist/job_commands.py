"""iclgd submit | stop, and status of a cluster: sweeps as jobs. Knows words and exit codes; the work is in cluster.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from iclgd_dist.config import SweepError, load_sweep
from iclgd_dist.plan_command import Large, loaded_if_small
from iclgd_dist.terminal import DONE, FAILED, INTERRUPTED, GpuHours, Hours, Insecure, StoreOption, SweepFile, console, say

Dashboard = Annotated[str, typer.Option("--address", help="Dashboard of a Ray cluster, e.g. http://127.0.0.1:8265", envvar="RAY_DASHBOARD_ADDRESS")]


def submit(
    sweep: SweepFile,
    address: Dashboard,
    store: StoreOption = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Return as soon as the job is there")] = False,
    yes: Large = False,
    hours: Hours = None,
    gpu_hours: GpuHours = None,
    insecure: Insecure = False,
) -> None:
    """Run a sweep as a job of a Ray cluster, with this project's code and the files that the sweep names, and follow its log.

    The same sweep into the same store is one job: submitting it again follows the one that runs, or resumes what ended. Ctrl-C ends the following alone.

    Example: iclgd submit sweeps/demo.toml --address http://127.0.0.1:8265 --store /shared/results/demo
    """
    from iclgd_dist.cluster import Cluster, shared_store

    loaded, results = loaded_if_small(sweep, yes=yes), shared_store(store)
    cluster = Cluster(address, is_open=insecure)
    budget = [[f"--{name}", str(limit)] for name, limit in (("hours", hours), ("gpu-hours", gpu_hours)) if limit is not None]
    flags = [flag for flag, is_set in (("--yes", yes), ("--insecure-no-auth", insecure)) if is_set]
    job_id, is_new = cluster.submit(loaded, Path(sweep), results, more=(*flags, *(word for words in budget for word in words)))
    say(f"{'submitted' if is_new else 'runs already:'} {job_id}; results go to {results.root}")
    if no_wait:
        say(f"next: iclgd status --address {address}")
        return
    try:
        for text in cluster.follow(job_id):
            console.out(text, end="", highlight=False)
    except (KeyboardInterrupt, SystemExit):
        say(f"the job goes on; iclgd stop {job_id} --address {address} ends it")
        raise
    job = cluster.job(job_id)
    say(f"{job_id}: {job.status.lower() if job else 'gone'}")
    raise typer.Exit(_exit_code(job.status if job else "", job.exit_code if job else None))


def _exit_code(status: str, code: int | None) -> int:
    return DONE if status == "SUCCEEDED" else code if code and code > 0 else INTERRUPTED if status == "STOPPED" else FAILED


def stop(
    sweep: Annotated[str, typer.Argument(help="Sweep file, or the id of its job", metavar="SWEEP")],
    address: Dashboard,
    store: StoreOption = None,
    insecure: Insecure = False,
) -> None:
    """Stop a sweep's job; what is committed stays, and submitting it again resumes. Exit code 3: it did not end within 30 s.

    Example: iclgd stop sweeps/demo.toml --address http://127.0.0.1:8265 --store /shared/results/demo
    """
    from iclgd_dist.cluster import Cluster, id_of, shared_store

    job_id = id_of(load_sweep(sweep), shared_store(store)) if sweep.endswith(".toml") else sweep
    cluster = Cluster(address, is_open=insecure)
    job = cluster.job(job_id)
    if job is None:
        raise SweepError(f"{address}: no job {job_id}; `iclgd status --address {address}` lists them")
    if not job.has_ended:
        job = cluster.stop(job_id)
    say(f"{job_id}: {job.status.lower()}")
    if not job.has_ended:
        raise typer.Exit(FAILED)


def show_jobs(address: str, *, is_open: bool) -> None:
    """Print this project's jobs on a cluster, with the last line that each has logged."""
    from iclgd_dist.cluster import Cluster

    cluster = Cluster(address, is_open=is_open)
    jobs = cluster.jobs()
    if not jobs:
        say(f"{address}: no sweeps")
        return
    table = Table(box=None, header_style="bold")
    for column in ("job", "status", "last line"):
        table.add_column(column, overflow="fold")
    for job in jobs:
        lines = [line for line in cluster.log(job.id).splitlines() if line.strip()]
        table.add_row(Text(job.id), job.status.lower(), Text(lines[-1] if lines else ""))
    console.print(table)
