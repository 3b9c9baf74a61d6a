"""The papers' Tables 2 and 1 from a store, in their layout; the published figures stand beside ours only where the model is the published one.

Table 2: similarities of vanilla (GD) and layer-causal (LCGD) finetuning on trained weights, by task. Table 1: vanilla finetuning on trained weights, on random
ones that keep embeddings and norms, and on random ones; a store without random weights has no Table 1, as its one row would repeat Table 2's. A single task has
no mean over tasks. At the largest step, at the only learning rate that the store has of a task and method (all queries), else at the one that a fold selects,
shown on the other, folds swapped and averaged: random weights at their own. Knows the papers' layout and published.csv; compares nothing at equal size of update, which `equal_size` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from .chosen import SELECTED
from .crossing import Pick, crossfit, picked, picks
from .intervals import ALL_TASKS, Estimate, descriptive, over_tasks
from .load import SETTING, Frames, load
from .reproduction import PUBLISHED_MODEL, published
from .setting import Setting, called
from .text import EDGE_SAID, NULL, Grid, number, rate, show, stores

Row = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """What stands in a table of the papers, in their order, and what must be known of its published figures."""

    title: str
    metrics: tuple[str, ...]
    methods: tuple[str, ...]
    inits: tuple[str, ...]
    caveat: str


LAYOUTS = {
    "table_2": Layout(
        "Table 2",
        ("sim_aou_norm", "sim_aou", "sim_am", "sim_am_delta"),
        ("vanilla", "layer_causal"),
        ("trained",),
        "The code of their sim_aou and sim_am was never published.",
    ),
    "table_1": Layout(
        "Table 1",
        ("sim_aou", "sim_am_delta"),
        ("vanilla",),
        ("trained", "embeddings_norms", "random"),
        "Whether their sim_aou of random weights is sim_aou or sim_aou_norm is unclear; by which initialisation they were drawn, published.csv does not say.",
    ),
}
LABELS = {"vanilla": "GD", "layer_causal": "LCGD"}  # the papers' names
TASKS = ("sst2", "sst5", "mr", "subj", "agnews", "cb")  # in the papers' order
PLACE = [name for name in SETTING if name not in ("task", "num_queries", "init", "init_scheme")]  # a table each
ONLY = "only"
RATES = {
    ONLY: "The only learning rate in the store (all queries)",
    SELECTED: "Learning rate selected of several by the smallest nll_label on one fold (figures of the other, folds swapped and averaged)",
}
NOTE = (
    "Means over layers, then draws, then tasks, at the largest step ({steps}); stored as {storage_dtype}, computed in {compute_dtype}. n/N: draws used of draws "
    "planned, of each task; the mean is over the tasks that have a value. Draws over all tasks: {counts}."
)
ELSEWHERE = "95 % intervals stand in figures/paper_tables.csv; model, position, sink, separator, queries and seeds under each task's own tables."


def data(frames: Frames) -> pd.DataFrame:
    """Return one row per table, model and protocol, weights, method, metric and task (and all tasks): mean, interval, counts, learning rate and R.

    `theirs` is the published figure of a published model, `theirs_or` its second reading; the columns are there only with such a model.
    """
    rows: list[Row] = []
    for group, settings in enumerate(_groups(frames)):
        for table, layout in LAYOUTS.items():
            by_weights = _by_weights(settings, layout)
            if table == "table_1" and not any(some[0].is_random for some in by_weights.values()):
                continue
            has_mean = len({setting.named["task"] for some in by_weights.values() for setting in some}) > 1
            for some in by_weights.values():
                for method in layout.methods:
                    rows += [{"group": group, "table": table} | row for row in _rows(frames, table, some, method, has_mean)]
    return pd.DataFrame(rows)


def _groups(frames: Frames) -> list[list[Setting]]:
    """Return what shares a table, in the papers' order of tasks: of the same weights and task the setting with the most queries."""
    found: dict[tuple[str, ...], dict[tuple[str, str], Setting]] = {}
    for setting in sorted(frames.settings(), key=lambda setting: (_place(setting.named["task"]), setting.first["num_queries"])):
        if setting.train_on == "true":
            found.setdefault(tuple(setting.first[PLACE].astype(str)), {})[setting.named["init"], setting.named["task"]] = setting
    groups = [list(group.values()) for group in found.values()]
    return sorted(groups, key=lambda group: [group[0].named[name] for name in ("model", "k", "protocol")])


def _place(task: str) -> tuple[int, str]:
    return (TASKS.index(task) if task in TASKS else len(TASKS) + (task == ALL_TASKS), task)


def _by_weights(settings: Sequence[Setting], layout: Layout) -> dict[str, list[Setting]]:
    """Return the settings of each weights that have rows in a table, in its order: those on which one of its methods ran."""
    found: dict[str, list[Setting]] = {}
    for setting in sorted((s for s in settings if s.first["init"] in layout.inits), key=lambda s: (layout.inits.index(s.first["init"]), s.named["init"])):
        found.setdefault(setting.named["init"], []).append(setting)
    return {init: some for init, some in found.items() if any({*layout.methods} & {*setting.methods} for setting in some)}


def _rows(frames: Frames, table: str, settings: Sequence[Setting], method: str, has_mean: bool) -> list[Row]:
    """Return the rows of one method on the same weights; none where it did not run."""
    if not any(method in setting.methods for setting in settings):
        return []
    known = published(table) if settings[0].first["model"] == PUBLISHED_MODEL else published(table)[:0]
    known = known[(known["method"] == method) & (known["init"] == settings[0].first["init"])].fillna({"task": ALL_TASKS})
    choices = [_choice(frames, setting, method) for setting in settings]
    rows: list[Row] = []
    for metric in LAYOUTS[table].metrics:
        found: list[Estimate] = []
        for setting, choice in zip(settings, choices, strict=True):
            one = crossfit(frames, choice.terms, metric) if choice else Estimate()
            found.append(one)
            named = setting.named | {"method": method, "metric": metric} | one.columns | {"num_planned": setting.num_draws}
            rows.append(named | _described(setting, choice) | _theirs(known, metric, setting.named["task"]))
        if has_mean:
            tasks = {setting.named["task"] for setting, one in zip(settings, found, strict=True) if math.isfinite(one.mean)}
            named = settings[0].named | {"method": method, "metric": metric, "task": ALL_TASKS} | over_tasks(found).columns
            named |= {
                "num_planned": sum(setting.num_draws for setting in settings),
                "num_queries": sum(setting.named["num_queries"] for setting in settings),
                "num_tasks": len(tasks),
            }
            rows.append(named | _precision(settings[0]) | (_theirs(known, metric, ALL_TASKS) if tasks == {*TASKS} else {}))
    return rows


def _choice(frames: Frames, setting: Setting, method: str) -> Pick | None:
    """Return the cells at the only learning rate of the largest step, else at the selected ones; None where none is defined."""
    if method not in setting.methods:
        return None
    cells = setting.at_last_step(method)
    rates = cells.loc[cells["learning_rate"] > 0, "learning_rate"].unique()  # 0 is a control
    if len(rates) == 1:
        return picked(setting, ONLY, method, {"all": float(rates[0])})
    return next((pick for pick in picks(frames, setting) if (pick.name, pick.method) == (SELECTED, method)), None)


def _described(setting: Setting, choice: Pick | None) -> Row:
    """Return what must be known of the cells behind a mean."""
    row = _precision(setting)
    if choice is None:
        return row
    cells = setting.finetuned[setting.finetuned["key"].isin([key for terms in choice.terms.values() for key in terms["key"]])]
    row |= {"choice": choice.name, "learning_rates": choice.rates, "is_edge": choice.is_edge, "fold": choice.fold, "R": choice.R}
    row |= {"step": setting.last_step_of(choice.method), "num_cells": len(cells)}
    return row | {"num_diverged": int((cells["status"] == "diverged").sum()), "num_collapsed": int(cells["collapsed"].sum())}


def _precision(setting: Setting) -> Row:
    return {name: setting.first[name] for name in ("storage_dtype", "compute_dtype")}


def _theirs(known: pd.DataFrame, metric: str, task: str) -> Row:
    """Return the published figure of a metric and task, both where it can be read in two ways; nothing where none was published."""
    values = known.loc[(known["metric"] == metric) & (known["task"] == task), "theirs"]
    return dict(zip(("theirs", "theirs_or"), values, strict=False))


def grids(rows: pd.DataFrame) -> list[Grid]:
    """Return Table 2 and Table 1 of each model and protocol."""
    return [_grid(str(table), part) for (_, table), part in rows.groupby(["group", "table"], sort=False)] if len(rows) else []


def _grid(table: str, part: pd.DataFrame) -> Grid:
    at = {(row["metric"], row["init"], row["method"], row["task"]): row for row in part.to_dict("records")}
    tasks = sorted(set(part["task"]), key=_place)
    lines = list(part[["init", "method"]].drop_duplicates().itertuples(index=False, name=None))
    body = []
    for metric in LAYOUTS[table].metrics:
        for init, method in lines:
            found = [at.get((metric, init, method, task)) for task in tasks]
            body.append([metric, _label(table, init, method), *map(_cell, found), _draws(found)])
    headers = ("metric", "method" if table == "table_2" else "weights", *("mean" if task == ALL_TASKS else str(task) for task in tasks), "n/N")
    first = part.iloc[0]
    title = f"{LAYOUTS[table].title} of the papers: {called(first.drop('init'))}"
    return Grid(title, headers, body, _note(table, part))


def _label(table: str, init: str, method: str) -> str:
    """Return what the papers call a row."""
    return LABELS[method] if table == "table_2" else init.replace("random", "untrained")


def _cell(row: Row | None) -> str:
    """Return a mean as text, a published figure behind it in parentheses, with the digits that it was published with."""
    if row is None:
        return NULL
    digits = 3 if row["task"] == ALL_TASKS else 2
    theirs = [number(row[name], digits) for name in ("theirs", "theirs_or") if name in row and math.isfinite(row[name])]
    return number(row["mean"]) + (f" ({' or '.join(theirs)})" if theirs else "")


def _draws(found: Sequence[Row | None]) -> str:
    """Return the draws used of draws planned, of each task, once where all have the same; and over how many tasks the mean is, if not over all."""
    mean = next((row for row in found if row and row["task"] == ALL_TASKS), None)
    tasks = [row for row in found if row is not mean]
    counts = {row["task"]: f"{row['num_used']}/{row['num_planned']}" for row in tasks if row}
    is_alike = len({*counts.values()}) == 1 and len(counts) == len(tasks)
    text = next(iter(counts.values())) + " each" * (len(counts) > 1) if is_alike else ", ".join(f"{task} {count}" for task, count in counts.items())
    return text if mean is None or mean["num_tasks"] == len(tasks) else f"{text}; mean over {mean['num_tasks']:.0f} of {len(tasks)} tasks"


def _note(table: str, part: pd.DataFrame) -> str:
    of_tasks, first = part[part["task"] != ALL_TASKS], part.iloc[0]
    labelled = of_tasks.assign(label=[_label(table, *names) for names in of_tasks[["init", "method"]].itertuples(index=False)])
    steps = ", ".join(f"{step:.0f}" for step in sorted(labelled.get("step", pd.Series(dtype=float)).dropna().unique())) or NULL
    said = [NOTE.format(steps=steps, counts=_counts(labelled), **{name: first[name] for name in ("storage_dtype", "compute_dtype")})]
    once = labelled.drop_duplicates(["label", "task"]).to_dict("records")
    for choice, meaning in RATES.items():
        of_choice = [row for row in once if row.get("choice") == choice]
        said += [f"{meaning}: {_by_label(of_choice, _rate)}."] if of_choice else []
    for name, meaning in {"num_diverged": "Diverged", "num_collapsed": "Collapsed, one label predicted for nearly all queries"}.items():
        marked = [row for row in once if row.get(name, 0) > 0]
        said += [f"{meaning}: {_by_label(marked, partial(_share, name))}."] if marked else []
    said += [_beside(table)] if "theirs" in part and part["theirs"].notna().any() else []
    return " ".join([*said, ELSEWHERE]) + descriptive(part)


def _counts(labelled: pd.DataFrame) -> str:
    """Return, for each row's name, over how many draws of all tasks its means are, of those planned: fewest to most over the metrics."""
    parts = []
    for label, rows in labelled.groupby("label", sort=False):
        sums = rows.groupby("metric")[["num_used", "num_planned"]].sum()
        fewest, most = sums["num_used"].min(), sums["num_used"].max()
        parts.append(f"{label} {fewest}{'' if fewest == most else f' to {most}'} used of {sums['num_planned'].max()} planned")
    return ", ".join(parts)


def _by_label(rows: Sequence[Mapping[str, Any]], text: Callable[[Mapping[str, Any]], str]) -> str:
    labels = dict.fromkeys(row["label"] for row in rows)
    return "; ".join(f"{label} " + ", ".join(f"{row['task']} {text(row)}" for row in rows if row["label"] == label) for label in labels)


def _rate(row: Mapping[str, Any]) -> str:
    return row["learning_rates"] + (EDGE_SAID if row["is_edge"] else "")


def _share(name: str, row: Mapping[str, Any]) -> str:
    return f"{row[name]:.0f} of {row['num_cells']:.0f} cells"


def _beside(table: str) -> str:
    """Return what the published figures were measured with, and what must be known of them."""
    known = published(table).dropna(subset=["task"]).drop_duplicates("task")
    rates = ", ".join(f"{task} {rate(learning_rate)}" for task, learning_rate in known[["task", "learning_rate"]].itertuples(index=False))
    where = f"In parentheses: {LAYOUTS[table].title} of arXiv 2311.07772v4, of this model under protocol reference, k = 32, 3 draws, learning rates {rates}."
    return f"{where} {LAYOUTS[table].caveat}"


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
