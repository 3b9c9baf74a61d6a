"""Similarity against the size of the update: along learning rates at the largest step, one line per method, beside a random state of the same size."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from .intervals import geometric_mean
from .load import Frames
from .panels import GREY, Panel, colour, drawing, safe
from .setting import Setting
from .text import BASELINES, number, rate

METRICS = ("sim_aou", "sim_aou_norm", "sim_am_delta", "sim_aou_pooled", "recovered_aou", "balanced_accuracy")
REFERENCE = {"sim_aou": "sim_aou_gaussian_state", "sim_aou_norm": "sim_aou_norm_gaussian_state"}
TITLE = "Similarity against the size of the update"
NOTE = (
    "Each point is a learning rate at the largest step; R is the size of finetuning's change relative to ICL's (geometric mean over layers and draws). Open "
    "markers: collapsed in at least one draw. Dotted (random): a state that knows nothing of ICL, zero-shot plus a random change of the same size; what "
    "sim_aou_norm scores there is size alone. Vertical line: R*, matched_ratio of the sweep file. Bars, from 2 seeds on: 95 % interval. Diverged learning rates have no R, undefined "
    "similarities no value: they are not drawn."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per method, learning rate and metric at the largest step: R, value, interval, the random state's value, counts."""
    rows = []
    for method in setting.methods:
        for learning_rate, part in setting.at_last_step(method).groupby("learning_rate"):
            for metric in METRICS:
                found = frames.estimate(part, metric)
                reference = part.groupby("replicate")[REFERENCE[metric]].mean().mean() if metric in REFERENCE else math.nan
                row = setting.named | {"method": method, "learning_rate": learning_rate}
                row |= {"step": setting.last_step_of(method), "metric": metric, "R": geometric_mean(part["update_ratio"])}
                row |= {"value": found.mean, "lower": found.lower, "upper": found.upper, "random_state": reference, "num_used": found.used}
                row |= {"num_cells": len(part), "num_collapsed": int(part["collapsed"].sum()), "num_diverged": int((part["status"] == "diverged").sum())}
                rows.append(row)
    return pd.DataFrame(rows)


def panels(setting: Setting, rows: pd.DataFrame, table: pd.DataFrame) -> list[Panel]:
    """Return one panel per metric that has a value at a positive R."""
    if rows.empty:
        return []
    rows = rows[(rows["R"] > 0) & rows["value"].notna()].sort_values("R")
    return [_panel(setting, metric, rows[rows["metric"] == metric], table) for metric in METRICS if (rows["metric"] == metric).any()]


def _panel(setting: Setting, metric: str, rows: pd.DataFrame, table: pd.DataFrame) -> Panel:
    data: list[dict[str, Any]] = []
    ranges = []
    for method in setting.methods:
        part = rows[rows["method"] == method]
        if part.empty:
            continue
        x, y = part["R"].tolist(), part["value"].tolist()
        text = [
            f"{safe(method)}, lr {rate(row.learning_rate)}<br>R {number(row.R)}, {metric} {number(row.value)}; {row.num_used} used of {setting.num_draws} draws"
            for row in part.itertuples()
        ]
        symbols = ["circle-open" if count else "circle" for count in part["num_collapsed"]]
        marker = {
            "symbol": symbols,
            "size": 8,
            "color": colour(method, setting.own_methods),
            "line": {"width": 2, "color": colour(method, setting.own_methods)},
        }
        points = {"type": "scatter", "mode": "lines+markers", "x": x, "y": y, "name": safe(method), "hovertext": text, "hoverinfo": "text"}
        if len(setting.replicates) > 1:
            above, below = part["upper"] - part["value"], part["value"] - part["lower"]
            points["error_y"] = {"array": above.tolist(), "arrayminus": below.tolist(), "thickness": 1, "width": 2}
        data.append({**points, "line": {"color": colour(method, setting.own_methods), "width": 2}, "marker": marker})
        if part["random_state"].notna().any():
            dots = {"color": colour(method, setting.own_methods), "width": 1.5, "dash": "dot"}
            data.append({"type": "scatter", "mode": "lines", "x": x, "y": part["random_state"].tolist(), "name": f"random, {safe(method)}", "line": dots})
        ranges.append(f"{method} {number(y[0], 2)} to {number(y[-1], 2)}")
    shapes = [
        {"x0": setting.matched_ratio, "x1": setting.matched_ratio, "y0": 0, "y1": 1, "yref": "y domain", "line": {"color": GREY, "width": 1, "dash": "dash"}}
    ]
    labels = []
    if metric == "balanced_accuracy":
        base = table.set_index("method")["balanced_accuracy"]
        for method, name in BASELINES.items():
            if math.isfinite(base[method]):
                shapes.append({"x0": 0, "x1": 1, "xref": "x domain", "y0": base[method], "y1": base[method], "line": {"color": GREY, "width": 1}})
                place = {"x": 1.01, "xref": "x domain", "xanchor": "left", "y": base[method], "yanchor": "middle", "showarrow": False}
                labels.append({"text": name, "font": {"size": 11}, **place})
    is_wide = rows["R"].max() > 100 * rows["R"].min()
    ticks = [digit * 10.0**power for power in range(-8, 9) for digit in ((1,) if is_wide else (1, 2, 5))]
    axis = {"type": "log", "title": {"text": "update ratio R", "standoff": 4}, "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    lowest = rows[["value", "random_state"]].min().min()
    cut = {"range": [-1.05, max(rows["value"].max(), 0) + 0.1]} if lowest < -1 else {}
    right = 66 if labels else 8
    figure = drawing(data, height=310, bottom=64, right=right, xaxis=axis, yaxis=cut, shapes=shapes, annotations=labels, showlegend=True)
    title = f"{metric} at step {setting.last_step}, from the smallest to the largest R: {', '.join(ranges)}"
    return Panel(title + ("; axis cut at \N{MINUS SIGN}1" if cut else ""), figure)


if __name__ == "__main__":
    from .report import main

    main(only="ratio")
