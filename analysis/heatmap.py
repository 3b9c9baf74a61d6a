"""Heat maps over learning rate x step: balanced accuracy and each similarity, the methods below each other on one colour scale."""

from __future__ import annotations

from typing import Any

import pandas as pd

from .panels import Panel, drawing, safe
from .setting import Setting
from .text import NULL, number, rate

METRICS = ("balanced_accuracy", "sim_aou", "sim_aou_norm", "sim_am", "sim_am_delta", "sim_aou_pooled", "recovered_aou")
TITLE = "Learning rate x step"
CROSS = "\N{MULTIPLICATION SIGN}"
NOTE = (
    f"Means over draws. Blue above zero, red below, white at zero; accuracy from dark (low) to light (high). Dark grey with {CROSS}: diverged in every draw. "
    f"Light grey with {NULL}: undefined. Blank: not run. {CROSS} beside a number: diverged in some draws, which the mean leaves out; c: collapsed in at least "
    "one draw. The largest value of a grid is chosen after the fact and is no estimate of what that learning rate would score again."
)
DIVERGED, UNDEFINED = "#4a4a4a", "#c9c9c9"
LABEL = {"xanchor": "left", "yanchor": "bottom", "showarrow": False}


def data(table: pd.DataFrame) -> pd.DataFrame:
    """Return long rows: method, learning_rate, step, metric, value, num_used, num_cells, num_draws, state (value, undefined or diverged)."""
    grid = table[table["step"].notna()]
    parts = []
    for metric in METRICS:
        part = grid[
            [
                "task",
                "model",
                "k",
                "train_on",
                "init",
                "protocol",
                "variant",
                "num_queries",
                "method",
                "learning_rate",
                "step",
                "num_cells",
                "num_draws",
                "num_diverged",
                "num_collapsed",
            ]
        ]
        part = part.assign(metric=metric, value=grid[metric], num_used=grid[f"{metric}_n"], state="value")
        part.loc[part["value"].isna(), "state"] = "undefined"
        part.loc[part["num_diverged"] == part["num_cells"], "state"] = "diverged"
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def panels(setting: Setting, table: pd.DataFrame) -> list[Panel]:
    """Return one panel per metric that has a value anywhere."""
    rows = data(table)
    return [_panel(setting, table, metric, rows[rows["metric"] == metric]) for metric in METRICS if rows.loc[rows["metric"] == metric, "value"].notna().any()]


def _panel(setting: Setting, table: pd.DataFrame, metric: str, rows: pd.DataFrame) -> Panel:
    rates, steps = sorted(rows["learning_rate"].unique()), sorted(rows["step"].unique())
    names, count = [rate(value) for value in rates], len(setting.methods)
    is_accuracy, extent = metric == "balanced_accuracy", min(rows["value"].abs().max() or 1.0, 1.0)
    low, high = (rows["value"].min(), rows["value"].max()) if is_accuracy else (-extent, extent)
    data: list[dict[str, Any]] = []
    layout: dict[str, Any] = {"annotations": []}
    for line, method in enumerate(setting.methods):
        suffix = str(line + 1) if line else ""
        layout["annotations"].append({"text": f"<b>{safe(method)}</b>", "x": 0, "y": 1, "xref": "x domain", "yref": f"y{suffix} domain", **LABEL})
        top = 1 - line / count
        layout[f"yaxis{suffix}"] = {"type": "category", "title": {"text": "step", "standoff": 2}, "showgrid": False, "domain": [top - 0.76 / count, top]}
        grid = {"x": names, "y": [f"{step:.0f}" for step in steps], "yaxis": f"y{suffix}", "xgap": 2, "ygap": 2}
        blanks: tuple[Any, ...] = (None, None, "", "", "")
        values, states, texts, signs, hovers = ([[blank] * len(rates) for _ in steps] for blank in blanks)
        for cell in rows[rows["method"] == method].to_dict("records"):
            i, j = steps.index(cell["step"]), rates.index(cell["learning_rate"])
            if cell["state"] == "value":
                values[i][j] = cell["value"]
                texts[i][j] = _short(cell["value"]) + "c" * (cell["num_collapsed"] > 0) + CROSS * (cell["num_diverged"] > 0)
            else:
                states[i][j], signs[i][j] = (1, CROSS) if cell["state"] == "diverged" else (0, NULL)
            shown = f"{metric} {number(cell['value'])}" if cell["state"] == "value" else cell["state"]
            hovers[i][j] = f"{safe(method)}, lr {names[j]}, step {cell['step']:.0f}<br>{shown}; {cell['num_used']} used of {cell['num_draws']} draws"
        grid |= {"type": "heatmap", "texttemplate": "%{text}", "hovertext": hovers, "hoverinfo": "text", "hoverongaps": False}
        data.append({**grid, "z": values, "text": texts, "coloraxis": "coloraxis"})
        data.append({**grid, "z": states, "text": signs, "colorscale": [[0, UNDEFINED], [1, DIVERGED]], "zmin": 0, "zmax": 1, "showscale": False})
    bar = {"thickness": 9, "tickfont": {"size": 10}, "outlinewidth": 0, "xpad": 4, "nticks": 5}
    layout["coloraxis"] = {"colorscale": "Cividis" if is_accuracy else "RdBu", "cmin": low, "cmax": max(high, low + 1e-6), "colorbar": bar}
    layout["xaxis"] = {"type": "category", "tickangle": 0, "showgrid": False, "categoryarray": names, "title": {"text": "learning rate", "standoff": 4}}
    layout["xaxis"]["anchor"] = f"y{count if count > 1 else ''}"
    largest = rows.loc[rows["value"].idxmax()]
    title = f"{metric}: {number(rows['value'].min(), 2)} to {number(largest['value'], 2)}; "
    title += f"largest for {largest['method']} at {rate(largest['learning_rate'])}, step {largest['step']:.0f}"
    if is_accuracy:
        base = table.set_index("method")["balanced_accuracy"]
        title += f"; zero-shot {number(base['zero_shot'], 2)}, in-context {number(base['icl'], 2)}"
    return Panel(title, drawing(data, height=60 + count * (44 + 34 * max(2, len(steps))), **layout))


def _short(value: float) -> str:
    text = number(value, 2 if abs(value) < 9.995 else 0)
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else text


if __name__ == "__main__":
    from .report import main

    main(only="heatmap")
