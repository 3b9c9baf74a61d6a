"""iclgd status | verify | compact | forget | gc: what a store holds and looking after it. Knows words and exit codes; the work is in upkeep.py."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from iclgd_dist import files
from iclgd_dist.config import SweepError
from iclgd_dist.store import Store
from iclgd_dist.terminal import DONE, FAILED, STORAGE, AsJson, Where, Yes, console, counted, existing, say, say_json

SHOWN = 10  # of a long list


def show_status(store: Store, *, as_json: bool = False) -> None:
    keys, planned = store.keys(), store.planned()
    asked = planned | store.planned("search")
    num_extra = len(keys - asked) if asked else 0
    attempts = store.attempts().to_pylist()
    loads = Counter(a["actor"] for a in attempts if a["num_model_loads"])
    others = Counter(a["outcome"] for a in attempts if a["outcome"] != "done")
    failed = [a for a in attempts if a["outcome"] not in ("done", "interrupted", "stopped")]
    if as_json:
        counts = {"planned": len(planned), "committed": len(keys), "missing": len(planned - keys), "extra": num_extra}
        steps = {name: sum(a[name] for a in attempts) for name in ("num_baselines", "num_training_steps", "num_model_loads")}
        say_json({"store": str(store.root), **counts, "attempts": dict(Counter(a["outcome"] for a in attempts)), **steps, "failed": failed[-5:]})
        return
    table = Table(title=Text(str(store.root)), title_justify="left", show_header=False, box=None)
    for name, value in (
        ("cells planned", len(planned)),
        ("cells committed", len(keys)),
        ("cells missing", len(planned - keys)),
        ("cells no sweep asks for", num_extra),
        ("blocks run", sum(a["outcome"] == "done" for a in attempts)),
        ("baselines computed", f"{sum(a['num_baselines'] for a in attempts)} (zero-shot and in-context, once each per block)"),
        ("training steps", f"{sum(a['num_training_steps'] for a in attempts)} (summed over learning rates)"),
        ("actors", len({a["actor"] for a in attempts})),
        ("models loaded", f"{sum(loads.values())} (at most {max(loads.values(), default=0)} by one actor)"),
        ("cost", _cost(attempts)),
        ("attempts not done", ", ".join(f"{count} {outcome}" for outcome, count in sorted(others.items())) or "0"),
    ):
        table.add_row(name, str(value))
    console.print(table)
    for attempt in failed[-5:]:
        say(f"  {attempt['created_at'][:19]} {attempt['block']} on {attempt['host']}: {attempt['outcome']}: {attempt['reason']}")


def _cost(attempts: list[dict[str, Any]]) -> str:
    """Return what the attempts took, and what of it a cell cost."""
    parts = []
    for what in ("cpus", "gpus"):
        num_cells = sum(a["num_cells"] for a in attempts if a[what] is not None)
        if hours := sum((a["wall_seconds"] or 0) * (a[what] or 0) for a in attempts) / 3600:
            each = f", {hours * 3600 / num_cells:.1f} {what[:-1].upper()} s a cell" if num_cells else ""
            parts.append(f"{hours:.2f} {what[:-1].upper()} h{each}")
    return "; ".join(parts) or "unknown"


def verify(
    store: Where,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Move what is damaged to set_aside/, so that its cells run again")] = False,
    as_json: AsJson = False,
) -> None:
    """Read every file of a store and say what is damaged, there twice, missing or not asked for.

    Run it while nothing else writes to the store. Exit code 0: whole; 3: cells are missing; 74: something is damaged.

    Example: iclgd verify results/demo
    """
    results = existing(store)
    from iclgd_dist.upkeep import verify as look

    found = look(results, quarantine=quarantine)
    is_left = not found.is_whole and (not quarantine or not all(error.is_damage for error in found.damaged))
    code = STORAGE if is_left else FAILED if found.missing else DONE
    if as_json:
        damaged = [{"file": error.filename, "what": error.strerror} for error in found.damaged]
        keys_of = {"duplicates": found.duplicates, "missing": found.missing, "extra": found.extra}
        say_json({"store": str(results.root), "cells": found.num_cells, "is_whole": found.is_whole, "damaged": damaged, **keys_of})
        raise typer.Exit(code)
    for error in found.damaged:
        console.print(Text.assemble(("damaged ", "red"), str(error)), soft_wrap=True)
    for name, keys in (("there twice, counted once", found.duplicates), ("missing", found.missing), ("asked for by no sweep", found.extra)):
        if keys:
            say(f"{counted(len(keys), 'cell')} {name}: {', '.join(key[:12] for key in keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}")
    if quarantine and any(error.is_damage for error in found.damaged):
        say(f"what was damaged is in {results.root / 'set_aside'}; run the sweep again")
    elif found.num_cells is None:
        say("what is missing is known after `iclgd verify --quarantine`")
    if found.num_cells is not None:
        say(f"{counted(found.num_cells, 'cell')} in {results.root}, {len(found.missing)} missing")
    raise typer.Exit(code)


def compact(store: Where) -> None:
    """Move loose cells into large files, which are read ten times as fast. `iclgd run` does it by itself; nothing needs to stop.

    Example: iclgd compact results/demo
    """
    results = existing(store)
    say(f"{counted(results.compact(), 'cell')} compacted in {results.root}")


def forget(
    store: Where,
    condition: Annotated[list[str], typer.Argument(help="column=value, also != < <= > >=; of several all must hold", metavar="CONDITION...")],
    yes: Yes = False,
) -> None:
    """Set cells aside, with all that belongs to them, so that the next run computes them again.

    Example: iclgd forget results/demo method=vanilla "learning_rate>0.01" --yes
    """
    results = existing(store)
    from iclgd_dist import upkeep

    try:
        keys = upkeep.matching(results, condition)
    except ValueError as error:
        raise SweepError(f"forget: {error}") from None
    if not yes:
        say(f"{counted(len(keys), 'cell')} of {results.root} would be set aside; add --yes")
        return
    say(f"{counted(upkeep.forget(results, keys), 'cell')} set aside in {results.root / upkeep.ASIDE}")


def gc(store: Where, yes: Yes = False) -> None:
    """Delete what nothing needs: set aside, left by killed processes a day ago, replaced by compaction, captures of no cell.

    Example: iclgd gc results/demo --yes
    """
    results = existing(store)
    from iclgd_dist import upkeep

    found = list(upkeep.debris(results))
    for path, why in found[:SHOWN]:
        say(f"{path}: {why}")
    if len(found) > SHOWN:
        say(f"... and {len(found) - SHOWN:,} more")
    size = decimal(sum(files.size_of(path) for path, _ in found))
    if yes:
        for path, _ in found:
            files.remove(path)
    say(f"{counted(len(found), 'file')}, {size} {'deleted' if yes else 'would be deleted' + ('; add --yes' if found else '')}")
