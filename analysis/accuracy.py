"""What every method scores: zero-shot, finetuned at the selected learning rate, in-context; per task and over tasks, beside the published accuracies.

A learning rate is selected on one fold and reported on the other, the folds change places, and the two are averaged. Knows accuracies; knows no similarity.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import pandas as pd

from .crossing import crossfit, selected
from .intervals import ALL_TASKS, Estimate, descriptive, with_all_tasks
from .load import ACCURACIES, SETTING, Frames, load
from .reproduction import PUBLISHED_MODEL, published
from .setting import Setting, called
from .text import BASELINES, Grid, counted, entry, number, rate, show, stores

GROUP = ("table", "method", "metric")  # what a mean over tasks is a mean of
COUNTS = ("num_queries", "num_edges", "num_cells", "num_collapsed", "num_diverged")
TITLE = "Accuracy"
NOTE = (
    "Zero-shot and in-context: all queries. Finetuned: at the largest step, at the learning rate with the smallest nll_label on one fold, scored on the other; "
    "mean of both folds; lr: selected on fold A, and on fold B where it is another. Brackets: 95 % interval over seeds with the queries' share; one zero-shot "
    "cell has an interval over its queries alone, and none over tasks. n/N: draws used of draws planned. All tasks: mean of the tasks' means, "
    "of so many tasks. Marks count the cells at the selected learning rates; collapsed: one label predicted for nearly all queries. Model, position, sink, "
    "separator, queries and seeds stand under each task's own tables."
)
PUBLISHED_NOTE = (
    " Published: accuracies of Dai et al. (arXiv 2212.10559), k = 32, vanilla at a learning rate that was chosen on the evaluation set; over all tasks, their mean "
    "over the same tasks."
)


def data(frames: Frames) -> pd.DataFrame:
    """Return one row per metric, method and task (and all tasks): mean, interval, selected learning rates, counts, the published accuracy. `table`: what stands in one table."""
    rows: list[tuple[tuple[Any, ...], dict[str, Any], list[Estimate]]] = []
    for table, settings in enumerate(_tables(frames.settings())):
        for setting in settings:
            theirs = _published(setting)
            for method in ("zero_shot", *setting.methods, "icl"):
                columns, found = _line(frames, setting, method)
                named = {"table": table} | setting.named | {name: setting.first[name] for name in ("storage_dtype", "compute_dtype", "query_seed")}
                for metric, one in found.items():
                    line = named | {"method": method, "metric": metric} | columns
                    line["published"] = theirs.get(method, math.nan) if metric == "accuracy" else math.nan
                    line |= {"num_tasks": 1, "num_tasks_used": int(math.isfinite(one.mean))}
                    rows.append(((table, method, metric), line, [one]))
    tasks: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for group, line, _ in rows:
        tasks[group].append(line)
    whole = []
    for line, (one,) in with_all_tasks(rows):
        shown = line | (_over(tasks[tuple(line[name] for name in GROUP)]) if line["task"] == ALL_TASKS else {}) | one.columns
        whole.append({name: value for name, value in shown.items() if name != "signs"})
    return pd.DataFrame(whole)


def _tables(settings: Iterable[Setting]) -> list[list[Setting]]:
    """Return the settings of each table: alike in all but the task and its queries. A task has one place in a table, that with the most queries in the first."""
    found: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in sorted(settings, key=lambda setting: -setting.first["num_queries"]):
        place = (*setting.first[[name for name in SETTING if name not in ("task", "num_queries")]].astype(str), setting.train_on)
        rank = 0
        while any(other.named["task"] == setting.named["task"] for other in found.get((*place, rank), ())):
            rank += 1
        found.setdefault((*place, rank), []).append(setting)
    return sorted(found.values(), key=lambda table: min(setting.title.partition(", ")[2] for setting in table))


def _line(frames: Frames, setting: Setting, method: str) -> tuple[dict[str, Any], dict[str, Estimate]]:
    """Return what is told of a method in a setting, and its estimates by metric."""
    picked = {} if method in BASELINES else selected(frames, setting, method)
    if method in BASELINES:
        cells = setting.zero_shot if method == "zero_shot" else setting.icl
        found = {metric: frames.estimate(cells, metric) for metric in ACCURACIES}
    else:
        terms = {fold: part for fold, (_, part) in picked.items()}
        found = {metric: crossfit(frames, terms, metric) if terms else Estimate() for metric in ACCURACIES}
        cells = setting.finetuned[setting.finetuned["key"].isin([key for part in terms.values() for key in part["key"]])]
    columns: dict[str, Any] = {"num_planned": setting.num_planned(method)}
    columns |= {f"selected_on_{on}": picked[reports][0].learning_rate if picked else math.nan for on, reports in (("A", "B"), ("B", "A"))}
    columns["why_none"] = "" if picked or method in BASELINES else setting.no_rate(method)
    columns |= {"num_edges": int(any(one.is_edge for one, _ in picked.values())), "num_cells": len(cells)}
    return columns | {"num_collapsed": int(cells["collapsed"].sum()), "num_diverged": int((cells["status"] == "diverged").sum())}, found


def _published(setting: Setting) -> dict[str, float]:
    """Return the published accuracies of the setting's task, by method; none unless its model is the published one as it was trained."""
    if setting.is_random or setting.train_on != "true" or PurePath(str(setting.first["model_source"])).name != PUBLISHED_MODEL:
        return {}
    table = published("accuracy")
    return {str(method): float(value) for method, value in table.loc[table["task"] == setting.named["task"], ["method", "theirs"]].itertuples(index=False)}


def _over(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the row of all tasks says beside its mean: sums of counts, and the mean of what was published for exactly the tasks that count."""
    used = [line["published"] for line in tasks if line["num_tasks_used"]]
    found = {name: sum(line[name] for line in tasks) for name in (*COUNTS, "num_tasks", "num_tasks_used")}
    return found | {"selected_on_A": math.nan, "selected_on_B": math.nan, "published": sum(used) / len(used) if used else math.nan}


def grids(rows: pd.DataFrame) -> list[Grid]:
    """Return a table per model, weights, k and protocol: a line per task and method, all tasks last."""
    found = []
    for _, part in rows.groupby("table") if len(rows) else ():
        lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
        for row in part.to_dict("records"):
            lines[row["task"], row["method"]][row["metric"]] = row
        is_published, body = bool(part["published"].notna().any()), []
        for (task, method), of in sorted(lines.items(), key=lambda item: (item[0][0] == ALL_TASKS, item[0][0], _rank(item[0][1]))):
            rates = dict.fromkeys(rate(of["accuracy"][f"selected_on_{fold}"]) for fold in "AB" if math.isfinite(of["accuracy"][f"selected_on_{fold}"]))
            theirs = [number(of["accuracy"]["published"])] if is_published else []
            scored = [entry(of[metric]) for metric in ("balanced_accuracy", "accuracy")]
            body.append([task, BASELINES.get(method, method), ", ".join(rates), *scored, *theirs, _marks(of["balanced_accuracy"])])
        headers = ("task", "method", "lr", "balanced accuracy", "accuracy", *(["published accuracy"] if is_published else []), "marks")
        first = part.iloc[0]
        title = f"{TITLE}: {called(first)}"
        note = f"Stored as {first['storage_dtype']}, computed in {first['compute_dtype']}; query seed {first['query_seed']:.0f}. {NOTE}"
        note += (PUBLISHED_NOTE if is_published else "") + descriptive(part[part["method"] != "zero_shot"])
        found.append(Grid(title, headers, body, note))
    return found


def _rank(method: str) -> tuple[bool, bool, bool, str]:
    return method == "icl", method != "zero_shot", method != "vanilla", method


def _marks(row: Mapping[str, Any]) -> str:
    """Return what must be known before a line is read."""
    is_all, said = row["task"] == ALL_TASKS, []
    if is_all:
        said.append(f"{row['num_tasks_used']} of {counted(row['num_tasks'], 'task')}")
    elif row["method"] not in BASELINES and math.isnan(row["selected_on_A"]):
        said.append(row["why_none"])
    if row["num_edges"]:
        where = f" in {counted(row['num_edges'], 'task')}" if is_all else ""
        said.append(f"edge of the grid{where}: extend the grid")
    return "; ".join(said + [f"{what} {row[f'num_{what}']}/{row['num_cells']}" for what in ("collapsed", "diverged") if row[f"num_{what}"]])


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
