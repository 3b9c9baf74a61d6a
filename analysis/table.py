"""The table: zero-shot, ICL, then methods x learning rate x step, means over draws with marks. As data, CSV, text for a page, and for a terminal."""

from __future__ import annotations

import sys

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from iclgd_dist.schema import POOLED, SIMILARITIES

from .chosen import select
from .intervals import geometric_mean
from .load import ACCURACIES, Frames, load
from .setting import Setting
from .text import BASELINES, counted, number, rate

SHOWN = ("nll_label", "sim_aou", "sim_aou_norm", "sim_am_delta", "sim_aou_pooled", "recovered_aou", "update_ratio")
HEADERS = ("method", "lr", "step", "n", "balanced accuracy", "accuracy", *SHOWN[:-1], "R", "marks")
NARROW, WIDE = ("method", "lr", "step", "balanced accuracy", "sim_aou", "R", "marks"), 180
NOTE = (
    "n: draws used of draws planned (a draw is a seed and an order); a figure of fewer draws has their number behind it. Brackets: 95 % interval. R: update ratio, geometric mean. "
    "collapsed: one label predicted for nearly all queries. An en dash is undefined or not applicable, never zero. "
    "Means leave out diverged draws, which sit at high learning rates."
)


def summary(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per method, learning rate and step of a setting, after zero_shot and icl; numbers, NaN = undefined.

    `<metric>_n` counts the draws with a value, `num_draws` the draws of the setting (for zero_shot: 1), `num_cells` those in the store.
    """
    groups = [(("zero_shot", None, None), setting.zero_shot), (("icl", None, None), setting.icl)]
    order = {method: rank for rank, method in enumerate(setting.methods)}
    keys = ["method", "learning_rate", "step"]
    groups += sorted(((name, part) for name, part in setting.finetuned.groupby(keys)), key=lambda item: (order[item[0][0]], *item[0][1:]))
    rows = []
    for (method, learning_rate, step), part in groups:
        row = setting.named | {"method": method, "learning_rate": learning_rate, "step": step, "num_cells": len(part)}
        row["num_draws"] = setting.num_planned(method)
        row |= {"num_diverged": int((part["status"] == "diverged").sum()), "num_collapsed": int(part["collapsed"].sum())}
        row["diverged_step"] = part["diverged_step"].min()
        for metric in ACCURACIES:
            found = frames.estimate(part, metric)
            row |= {metric: found.mean, f"{metric}_lower": found.lower, f"{metric}_upper": found.upper, f"{metric}_n": found.used}
        for metric in ("nll_label", *SIMILARITIES, *POOLED):
            row |= {metric: part.groupby("replicate", dropna=False)[metric].mean().mean(), f"{metric}_n": int(part[metric].notna().sum())}
        row |= {"update_ratio": geometric_mean(part["update_ratio"]), "update_ratio_n": int(part["update_ratio"].notna().sum())}
        rows.append(row)
    return pd.DataFrame(rows).astype({"learning_rate": float, "step": float})


def marks(row: pd.Series) -> str:
    """Return what must be known before a row is read: collapsed, diverged, missing."""
    found = []
    of = f" {{}}/{row['num_cells']}" if row["num_cells"] > 1 else ""
    if row["num_diverged"]:
        found.append("diverged" + of.format(row["num_diverged"]) + f" (step {row['diverged_step']:.0f})")
    if row["num_collapsed"]:
        found.append("collapsed" + of.format(row["num_collapsed"]))
    if row["num_cells"] < row["num_draws"]:
        found.append(f"{row['num_draws'] - row['num_cells']} missing")
    return ", ".join(found)


def display(frames: Frames, setting: Setting, table: pd.DataFrame) -> list[list[str]]:
    """Return the table as text, one list per row in the order of HEADERS; the selected learning rate carries a mark."""
    chosen = {method: select(frames, setting, method) for method in setting.methods}
    rows = []
    for _, row in table.iterrows():
        method, at = row["method"], chosen.get(row["method"])
        note = [marks(row)] if marks(row) else []
        if at and row["learning_rate"] == at.learning_rate and row["step"] == setting.last_step_of(method):
            note.append("selected on A" + (", edge of the grid: extend the grid" if at.is_edge else ""))
        accuracies = []
        for metric in ACCURACIES[::-1]:
            interval = f" [{number(row[metric + '_lower'], 2)}, {number(row[metric + '_upper'], 2)}]" if row[metric + "_lower"] >= 0 else ""
            accuracies.append(number(row[metric]) + interval)
        position = [rate(row["learning_rate"]), f"{row['step']:.0f}"] if pd.notna(row["step"]) else ["", ""]
        used = f"{row['accuracy_n']}/{row['num_draws']}"
        figures = [number(row[metric]) + (f" ({row[f'{metric}_n']})" if 0 < row[f"{metric}_n"] != row["accuracy_n"] else "") for metric in SHOWN]
        rows.append([BASELINES.get(method, method), *position, used, *accuracies, *figures, "; ".join(note)])
    return rows


def terminal(frames: Frames, *, width: int) -> list[Table]:
    """Return a rich table per setting; a terminal under WIDE columns gets the columns of NARROW."""
    tables = []
    places = [index for index, header in enumerate(HEADERS) if width >= WIDE or header in NARROW]
    for setting in frames.settings():
        note = Text(f"{setting.caption} {NOTE}")
        out = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=Text(setting.title), caption=note, title_justify="left", caption_justify="left"
        )
        for header in (HEADERS[place] for place in places):
            out.add_column(header, justify="left" if header in ("method", "marks") else "right", no_wrap=header != "marks", overflow="fold")
        for row in display(frames, setting, summary(frames, setting)):
            out.add_row(*(Text(row[place]) for place in places))
        tables.append(out)
    return tables


def show(frames: Frames, console: Console | None = None) -> None:
    """Print the tables; 0 settings say so."""
    console = console or Console()
    for table in terminal(frames, width=console.width):
        console.print(table)
    console.print(Text(f"{counted(len(frames.cells), 'cell')} in {counted(len(frames.settings()), 'setting')}"))


if __name__ == "__main__":
    from .report import main

    if len(sys.argv) == 2:
        show(load(sys.argv[1]))
    main(only="table")
