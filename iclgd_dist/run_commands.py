"""iclgd run | tune | measure: running a sweep, searching, and filling in what was added since. Knows words and exit codes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from iclgd_dist import trackers
from iclgd_dist.config import Controls, Sweep, SweepError, load_sweep
from iclgd_dist.plan_command import Large, loaded_if_small, planned_for, show_plan
from iclgd_dist.runner import run_sweep
from iclgd_dist.session import check_place
from iclgd_dist.stopping import Budget
from iclgd_dist.store import Store
from iclgd_dist.terminal import (
    DONE,
    FAILED,
    INTERRUPTED,
    GpuHours,
    Hours,
    Insecure,
    StoreOption,
    SweepFile,
    console,
    counted,
    existing,
    resumable,
    say,
    store_of,
)

if TYPE_CHECKING:
    from iclgd_dist.plan import Plan
    from iclgd_dist.search import Place, Study

AddressOption = Annotated[
    str | None, typer.Option(help="Ray cluster, e.g. auto or 10.0.0.1:6379. Default: start Ray on this machine, for loopback only", show_default=False)
]

TrackOption = Annotated[
    list[str] | None,
    typer.Option(help="Also tell tensorboard (./tensorboard), mlflow or wandb of each committed step; more than once for several", show_default=False),
]


def run(
    sweep: SweepFile,
    store: StoreOption = None,
    address: AddressOption = None,
    yes: Large = False,
    hours: Hours = None,
    gpu_hours: GpuHours = None,
    insecure: Insecure = False,
    track: TrackOption = None,
) -> None:
    """Run every cell that is not in the store yet.

    The same command again resumes; a larger grid in the same file adds to what is there. With controls.random_delta = true, random weights of the same
    effect follow for the cells that the report cites.

    Example: iclgd run sweeps/demo.toml
    """
    with resumable():
        _run(sweep, store, address, yes=yes, budget=Budget(hours, gpu_hours), is_open=insecure, track=track or ())


def _run(sweep: str, store: str | None, address: str | None, *, yes: bool, budget: Budget, is_open: bool, track: Sequence[str]) -> NoReturn:
    loaded = loaded_if_small(sweep, yes=yes)
    trackers.check(track)
    results = store_of(loaded, store)
    planned = planned_for(loaded, results)
    show_plan(loaded, planned, results)
    if planned.blocks:
        check_place(loaded.resources, address, is_open=is_open)
        _try_code(loaded)
    results.prepare()
    results.save_sweep(digest=loaded.digest(), resolved=loaded.resolved(), keys=list(planned.keys))
    code = DONE
    if planned.blocks:
        code = run_sweep(loaded, planned, results, address=address, console=console, budget=budget, is_open=is_open, track=track)
    else:
        console.print(f"0 cells to run: all {len(planned.keys)} are in {results.root}", soft_wrap=True)
    if code == DONE and loaded.controls.random_delta:
        code = _random_deltas(loaded, results, address=address, budget=budget, is_open=is_open)
    if code == DONE:
        _cross_orders(loaded, results)
    if code == FAILED:
        console.print(f"some cells could not be computed here; see `iclgd status {results.root}`, then run again", soft_wrap=True)
    elif code == DONE:
        if num_lacking := _num_lacking(loaded, results, planned.keys):
            lacking = (
                f"{counted(num_lacking, 'finetuned cell')}, there before this run, have none of the controls, metrics or measures that the sweep file asks for"
            )
            console.print(f"{lacking}: iclgd measure {sweep} adds them", highlight=False, soft_wrap=True)
        console.print(f"next: iclgd report {results.root}", soft_wrap=True)
    raise typer.Exit(code)


def _num_lacking(sweep: Sweep, store: Store, keys: Collection[str]) -> int:
    """Return how many finetuned cells of the sweep have no row at all of something it asks for: those of a search, and those that an older file computed."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from iclgd_dist.store import read_results

    has_measures = any(sweep.measures.model_dump(exclude={"orders"}).values())
    has_contexts = bool(set(sweep.controls.contexts) - {"shifted"})  # which many models have no use for
    if not (has_contexts or sweep.metric or has_measures):
        return 0
    results, text = read_results(store), pa.string()
    cells = results.cells.filter(pc.and_(pc.equal(results.cells["kind"], "finetuned"), pc.equal(results.cells["status"], "done")))["key"].cast(text)
    cells = cells.filter(pc.is_in(cells, pa.array(sorted(keys), text)))
    has_all = pa.chunked_array([pa.array([True] * len(cells))])
    for table, is_asked, others in (
        (results.controls, has_contexts, "random_delta"),  # which `run` makes itself
        (results.metrics, sweep.metric, None),
        (results.extras, has_measures, "order:"),  # as above
    ):
        if is_asked:
            own = table.filter(pc.invert(pc.starts_with(table[1].cast(text), others))) if others else table
            has_all = pc.and_(has_all, pc.is_in(cells, own[0].cast(text).combine_chunks()))
    return len(cells) - (pc.sum(has_all).as_py() or 0)


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


def _cross_orders(sweep: Sweep, store: Store) -> None:
    """Compare every finetuned cell with ICL in the other orders of its seed, where the sweep asks for it and captures are there."""
    if not sweep.measures.orders:
        return
    from iclgd_dist.orders import cross_orders  # torch
    from iclgd_dist.plan import make_plan
    from iclgd_dist.store import read_results

    num_cells, num_without = cross_orders(store, read_results(store), make_plan(sweep).blocks)
    console.print(f"{counted(num_cells, 'cell')} compared with ICL in the other orders, from kept captures", highlight=False)
    if num_without:
        console.print(
            f"{counted(num_without, 'cell')} not, for want of a capture: cells that were committed before [capture] keep was set, or whose captures were "
            "deleted, have none; `iclgd forget` sets them aside so that they run again",
            highlight=False,
            soft_wrap=True,
        )


def tune(
    sweep: SweepFile,
    store: StoreOption = None,
    address: AddressOption = None,
    hours: Hours = None,
    gpu_hours: GpuHours = None,
    insecure: Insecure = False,
    track: TrackOption = None,
) -> None:
    """Search for learning rates where the sweep file's section search says: each round trains a few, and what they score says where to look next.

    Judged on fold A of the queries, so that fold B can be reported. Every cell that is evaluated stays in the store; the same command again resumes.

    Example: iclgd tune sweeps/tune.toml
    """
    with resumable():
        _tune(sweep, store, address, budget=Budget(hours, gpu_hours), is_open=insecure, track=track or ())


def _tune(sweep: str, store: str | None, address: str | None, *, budget: Budget, is_open: bool, track: Sequence[str]) -> NoReturn:
    from iclgd_dist.search import check_sampler, num_cells_at_most, rounds, studies_of

    loaded = load_sweep(sweep)
    if loaded.search is None:
        raise SweepError(f"{sweep}: has no [search], which says where to look; for example\n\n[search.learning_rates]\nvanilla = [1e-4, 1e-1]")
    trackers.check(track)
    results, search, code = store_of(loaded, store), loaded.search, DONE
    studies = studies_of(loaded)
    check_place(loaded.resources, address, is_open=is_open)
    check_sampler(search)
    planned_for(loaded.model_copy(update={"controls": Controls()}), results)  # what is wrong with tasks, models and labels is told before anything is written
    _try_code(loaded)
    results.prepare()
    say(
        f"{loaded.name}: {len(studies)} searches by {search.sampler} for the best {search.objective} on fold A; "
        f"at most {num_cells_at_most(loaded):,} finetuned cells; store {results.root}"
    )

    def save(also: Collection[str] = ()) -> None:
        asked = set[str]().union(*(study.keys for study in studies))
        results.save_sweep(digest=loaded.digest(), resolved=loaded.resolved(), keys=sorted(results.keys() & asked | {*also}), kind="search")

    def compute(plan: Plan, said: str) -> int:
        if why := budget.over():
            say(why)
            return INTERRUPTED
        if search.scheduler == "none":  # else some of it is never computed
            save(plan.keys)
        say(f"{said}: {counted(plan.num_to_run, 'cell')} to run")
        return run_sweep(loaded, plan, results, address=address, console=console, budget=budget, is_open=is_open, track=track)

    def judge(keys: Sequence[str]) -> Mapping[str, Mapping[str, float | None]]:
        from iclgd_analysis.search import fold_figures

        return fold_figures(results, keys, search.metrics, fold="A")

    def stopped() -> set[str]:
        return {attempt["block"] for attempt in results.attempts().to_pylist() if attempt["outcome"] == "stopped"}

    try:
        for of_round in rounds(loaded, studies, results.keys, judge, compute, stopped):
            code = code or of_round
            save()
            if of_round not in (DONE, FAILED):
                code = of_round
                break
    finally:  # also where it is stopped while it plans or judges
        _show_studies(studies)
    if code in (DONE, FAILED):
        say(f"next: put what was found into [learning_rates], with its neighbours, and iclgd run {sweep}")
    raise typer.Exit(code)


def _show_studies(studies: Sequence[Study]) -> None:
    """Print what each search found, then what must be known of it. Of model, k and protocol only what is not the same for all is told."""
    if not studies[0].scores:
        return
    options = [_options(study.place) for study in studies]
    common = set.intersection(*(set(each.items()) for each in options))
    own = [", ".join(f"{name} {value}" for name, value in each.items() if (name, value) not in common) for each in options]
    table, texts = Table(box=None, header_style="bold"), ("task", "method", *(["of"] if any(own) else []))
    for column in (*texts, "lr", "step", f"{studies[0].search.objective} (A)", "tried"):
        table.add_column(column, justify="left" if column in texts else "right", overflow="fold")
    for study, of in zip(studies, own, strict=True):
        best, num_tried = study.best, sum(bool(found) for found in study.scores[0].values())
        found = (f"{best.learning_rate:.3g}", str(best.step), f"{best.objective:.4f}") if best else ("", "", "")
        table.add_row(*map(Text, (study.place.task, study.method, *([of] if any(own) else []), *found, str(num_tried))))
    console.print(table)
    for study, of in zip(studies, own, strict=True):
        if study.mark:
            say(f"{', '.join(filter(None, (study.place.task, study.method, of)))}: {study.mark}")


def _options(place: Place) -> dict[str, str]:
    """Return what may tell a study from others of its task and method, as text."""
    dumped = {"model": place.model.source.rstrip("/").rpartition("/")[2], "k": place.num_demonstrations}
    dumped |= place.model.model_dump(mode="json", exclude={"source"}) | place.protocol.model_dump(mode="json")
    return {name: ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value) for name, value in dumped.items()}


def measure(
    sweep: SweepFile,
    store: StoreOption = None,
    address: AddressOption = None,
    hours: Hours = None,
    gpu_hours: GpuHours = None,
    insecure: Insecure = False,
) -> None:
    """Fill in what committed cells lack: metrics, control contexts and measures added to the sweep file since, and pairs of methods.

    Metrics come from kept captures where there are any, crossed orders from these alone; for all else cells are trained again, and only what they lacked
    is stored.

    Example: iclgd measure sweeps/controls.toml
    """
    with resumable():
        _measure(sweep, store, address, budget=Budget(hours, gpu_hours), is_open=insecure)


def _measure(sweep: str, store: str | None, address: str | None, *, budget: Budget, is_open: bool) -> NoReturn:
    loaded = load_sweep(sweep)
    results = existing(store_of(loaded, store))
    check_place(loaded.resources, address, is_open=is_open)
    from iclgd_dist.blocks import Block, with_cells
    from iclgd_dist.encoding import Encoded
    from iclgd_dist.measuring import Missing, measure_kept  # torch
    from iclgd_dist.plan import make_plan
    from iclgd_dist.store import read_results

    _try_code(loaded)
    results.prepare()
    missing, num_kept = Missing(read_results(results)), 0

    def lacking(block: Block, encoded: Encoded) -> Block | None:
        nonlocal num_kept
        num_kept += measure_kept(results, block, missing, encoded)
        cells = missing.to_train(block, encoded)
        return replace(with_cells(block, cells, encoded), is_measuring=True) if cells else None

    planned = make_plan(loaded, choose=lacking)
    console.print(f"{counted(num_kept, 'cell')} measured from kept captures", highlight=False)
    _cross_orders(loaded, results)
    if absent := len(set(planned.keys) - results.keys()):
        console.print(f"{counted(absent, 'cell')} of the sweep not there yet: iclgd run {sweep}", highlight=False, soft_wrap=True)
    if not planned.blocks:
        console.print("nothing to train again", highlight=False)
        raise typer.Exit(FAILED if absent else DONE)
    planned = planned.of_blocks()
    console.print(f"{counted(len(planned.keys), 'cell')} to compute again in {counted(len(planned.blocks), 'block')}", highlight=False)
    code = run_sweep(loaded, planned, results, address=address, console=console, budget=budget, is_open=is_open)
    raise typer.Exit(code or (FAILED if absent else DONE))


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
