"""The verdict by task, as a forest plot: both differences, and the balanced accuracies beside them. Knows what `verdict` found; figures/verdict.csv holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .intervals import ALL_TASKS, Estimate
from .panels import CLEAR, COLOURS, GREY, LEGEND, Panel, drawing, safe
from .text import BASELINES, counted
from .verdict import BASE, METHOD, METRIC, Compared, Findings, passed

TITLE = "By task"
NOTE = (
    f"Differences: {METRIC} of {METHOD} less that of {BASE}, right of 0 where {METHOD} is closer to ICL; at equal size each method is taken where its R comes up to R*, at "
    "equal improvement where each has improved the labels' likelihood by half of what the weaker one can. A task without a mark has no such point. Dotted: the smallest effect "
    "that matters. Balanced accuracy: methods at the learning rate that one fold selects by nll_label, shown on the other, folds swapped and averaged; hollow: that rate is the "
    "smallest or largest of its grid (extend the grid); bold: tasks in which ICL beats zero-shot with its interval above 0. Bars: 95 % intervals, over draws and queries. Numbers: figures/verdict.csv. Model, position, "
    "sink, separator, queries and seeds stand under each task's own tables."
)
ROW, MORE, ROOM = 26, 8, 76  # of a task, for each further mark of it, around them all [pixels]


def panels(found: Findings) -> list[Panel]:
    """Return the difference at equal size, that at equal improvement where any task has one, and the accuracies."""
    first, has_icl = found.settings[0], passed(found)
    accuracies = {BASELINES.get(name, name): COLOURS[name] for name in ("zero_shot", "icl", BASE, METHOD)}
    differences = {f"equal size of update (R = {first.matched_ratio:g})": found.norm, "equal improvement": found.gain}
    made = []
    for where, one in differences.items():
        if math.isfinite(one.mean.mean):
            made.append(Panel(f"{METHOD} less {BASE} at {where}: {one}", _drawn(METRIC, {"": (one, COLOURS[METHOD])}, lines=(0.0, first.smallest_effect))))
    said = f"Balanced accuracy; ICL beats zero-shot in {len(has_icl)} of {counted(len(found.gate.tasks), 'task')}"
    edges = {method: {task for task, of_folds in found.rates[method].items() if any(one.is_edge for one in of_folds)} for method in (BASE, METHOD)}
    return [*made, Panel(said, _drawn("balanced accuracy", {name: (found.accuracies[name], shade) for name, shade in accuracies.items()}, has_icl, edges))]


def _drawn(
    title: str,
    compared: Mapping[str, tuple[Compared, str]],
    bold: Sequence[str] = (),
    edges: Mapping[str, set[str]] | None = None,
    *,
    lines: tuple[float, ...] = (),
) -> Any:
    tasks = list(next(iter(compared.values()))[0].tasks)
    names = [*tasks, ALL_TASKS] if len(tasks) > 1 else tasks
    data: list[dict[str, Any]] = []
    for place, (name, (one, shade)) in enumerate(compared.items()):
        line = [one.tasks[task] for task in tasks] + [one.mean] * (len(names) - len(tasks))
        at = [row + 0.2 * (place - (len(compared) - 1) / 2) for row in range(len(names))]
        symbols = [f"{'diamond' if row == ALL_TASKS else 'circle'}{'-open' if row in (edges or {}).get(name, ()) else ''}" for row in names]
        bars = {"type": "data", "symmetric": False, "array": [_length(each.upper - each.mean) for each in line], "thickness": 1.5, "width": 0}
        bars["arrayminus"] = [_length(each.mean - each.lower) for each in line]
        text = [f"{safe(row)}{f', {safe(name)}' if name else ''}: {each}; {each.used} draws" for row, each in zip(names, line, strict=True)]
        look = {"mode": "markers", "marker": {"color": shade, "size": 8, "symbol": symbols}, "error_x": bars | {"color": shade}}
        where = {"x": [_known(each) for each in line], "y": at, "hovertext": text, "hoverinfo": "text"}
        data.append({"type": "scatter", "name": safe(name), "legendgroup": safe(name), "showlegend": False, **where, **look})
    axis = {"tickvals": list(range(len(names))), "ticktext": [f"<b>{safe(row)}</b>" if row in bold else safe(row) for row in names]}
    axis |= {"range": [len(names) - 0.5, -0.5], "showgrid": False, "zeroline": False}
    shapes = [
        {"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x, "line": {"color": GREY, "width": 1, "dash": "dot" if x else "solid"}}
        for x in lines
    ]
    has_legend = len(compared) > 1
    for name, (_, shade) in compared.items() if has_legend else ():  # else the legend is hollow where a first point is
        key = {"mode": "markers", "marker": {"color": shade, "size": 8}, "x": [None], "y": [None]}
        data.append({"type": "scatter", "name": safe(name), "legendgroup": safe(name), **key})
    height = (ROW + MORE * (len(compared) - 1)) * len(names) + ROOM + (40 if has_legend else 0)
    under = {"title": {"text": title, "standoff": 4}, "zeroline": False}
    legend = {**LEGEND, "bgcolor": CLEAR, "entrywidth": 80}  # two in a line, beside the names of the tasks
    return drawing(data, height=height, bottom=86 if has_legend else 46, xaxis=under, yaxis=axis, shapes=shapes, showlegend=has_legend, legend=legend)


def _known(one: Estimate) -> float | None:
    return one.mean if math.isfinite(one.mean) else None


def _length(value: float) -> float:
    return value if math.isfinite(value) else 0.0  # one draw: a point without a bar
