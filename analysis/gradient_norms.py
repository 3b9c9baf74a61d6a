"""Maps of the gradient's norm over layers and steps, a map per method at its selected learning rate: which layers a loss reaches, and how hard it pulls.

Knows the layers' gradients and the selected learning rates; knows no similarity.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from .chosen import select
from .load import Frames
from .panels import Panel, drawing, safe
from .setting import Setting
from .text import rate

TITLE = "Gradient norms"
CROSS = "\N{MULTIPLICATION SIGN}"
STATES = ("undefined", "zero", "diverged")
COLOURS = ("#c9c9c9", "#9a9a9a", "#4a4a4a")
NOTE = (
    "L2 norm of the gradient of what learns in a layer, in the update that led to the step; means over draws, at the learning rate with the smallest nll_label on "
    "fold A. Layer 0 first. One logarithmic colour scale for all methods, from dark (small) to light (large). Dark grey: diverged in every draw. Light grey: "
    f"undefined, nothing learns in the layer; grey between the two: exactly 0, which has no logarithm. {CROSS} beside a step: diverged in some draws, which the "
    "means leave out. A method without a learning rate that can be selected has no map."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per method, step and layer at the selected learning rate: gradient_norm, num_used, num_cells, num_diverged, state (value or one of STATES)."""
    chosen = {method: found for method in setting.methods if (found := select(frames, setting, method))}
    rows = setting.finetuned
    cells = rows[rows["learning_rate"].eq(rows["method"].map({method: found.learning_rate for method, found in chosen.items()}))]
    of_cells = frames.layers[frames.layers["key"].isin(cells["key"])]
    of_cells = of_cells.loc[of_cells["fold"] == "all", ["key", "layer", "gradient_norm"]].astype({"key": object})
    if of_cells.empty:
        return pd.DataFrame()
    layers = cells[["key", "method", "step", "replicate"]].merge(of_cells, on="key")
    by = ["method", "step", "layer"]
    norms = layers.groupby([*by, "replicate"])["gradient_norm"].mean().groupby(by).mean()  # the orders of a seed first
    found = pd.DataFrame({"gradient_norm": norms, "num_used": layers.groupby(by)["gradient_norm"].count()}).reset_index()
    counts = cells.groupby(["method", "step"])["status"].agg(num_cells="count", num_diverged=lambda status: int((status == "diverged").sum())).reset_index()
    table = counts.merge(pd.DataFrame({"layer": range(int(layers["layer"].max()) + 1)}), how="cross").merge(found, on=by, how="left")
    table["num_used"] = table["num_used"].fillna(0).astype(int)
    why = [table["num_diverged"] == table["num_cells"], table["gradient_norm"].isna(), table["gradient_norm"] == 0]
    table["state"] = np.select(why, ["diverged", "undefined", "zero"], "value")
    for name in ("learning_rate", "is_edge"):
        table.insert(1, name, table["method"].map({method: getattr(found, name) for method, found in chosen.items()}))
    return table.assign(**setting.named, num_draws=setting.num_draws)[[*setting.named, *table.columns, "num_draws"]]


def panels(setting: Setting, rows: pd.DataFrame) -> list[Panel]:
    """Return one panel per method that has a value anywhere; all on one colour scale."""
    drawn = rows[rows["state"] == "value"] if len(rows) else rows
    if drawn.empty:
        return []
    scale = (math.log10(drawn["gradient_norm"].min()), math.log10(drawn["gradient_norm"].max()))
    return [_panel(method, rows[rows["method"] == method], scale) for method in setting.methods if (drawn["method"] == method).any()]


def _panel(method: str, rows: pd.DataFrame, scale: tuple[float, float]) -> Panel:
    """Return the map of one method; its rows are every layer of the first step, then of the next."""
    steps, layers = list(dict.fromkeys(rows["step"])), list(dict.fromkeys(rows["layer"]))
    ticks, values, states, texts = [], list[float | None](), list[int | None](), list[str]()
    for cell in rows.to_dict("records"):
        is_value = cell["state"] == "value"
        values.append(round(math.log10(cell["gradient_norm"]), 4) if is_value else None)
        states.append(None if is_value else STATES.index(cell["state"]))
        texts.append(f"{_short(cell['gradient_norm']) if is_value else cell['state']}; {cell['num_used']} used of {cell['num_draws']} draws")
        if cell["layer"] == layers[0]:
            ticks.append(f"{cell['step']:.0f}" + f" {CROSS}" * (0 < cell["num_diverged"] < cell["num_cells"]))
    width = len(layers)
    grid = {"type": "heatmap", "x": layers, "y": ticks, "xgap": 1, "ygap": 1, "text": _lines(texts, width), "hoverongaps": False}
    grid["hovertemplate"] = f"{safe(method)}, layer %{{x}}, step %{{y}}<br>gradient norm %{{text}}<extra></extra>"
    data: list[dict[str, Any]] = [{**grid, "z": _lines(values, width), "coloraxis": "coloraxis"}]
    if any(state is not None for state in states):
        blocks = [[place, shade] for n, shade in enumerate(COLOURS) for place in (n / len(COLOURS), (n + 1) / len(COLOURS))]
        data.append({**grid, "z": _lines(states, width), "colorscale": blocks, "zmin": -0.5, "zmax": len(COLOURS) - 0.5, "showscale": False})
    low, high = scale
    digits = (1,) if high - low > 2 else (1, 2, 5)
    marks = [math.log10(digit) + power for power in range(-12, 13) for digit in digits if low <= math.log10(digit) + power <= high] or [low]
    bar = {"thickness": 9, "tickfont": {"size": 10}, "outlinewidth": 0, "xpad": 4, "tickvals": marks, "ticktext": [_short(10**mark) for mark in marks]}
    layer_axis = {"title": {"text": "layer", "standoff": 4}, "tickformat": "d", "showgrid": False, "zeroline": False}
    step_axis = {"type": "category", "title": {"text": "step", "standoff": 2}, "showgrid": False}
    colours = {"colorscale": "Viridis", "cmin": low, "cmax": max(high, low + 1e-6), "colorbar": bar}
    seen, first = rows[rows["state"] == "value"], rows.iloc[0]
    largest = seen.loc[seen["gradient_norm"].idxmax()]
    title = f"{method} {rate(first['learning_rate'])}{' (edge of the grid)' if first['is_edge'] else ''}: {_short(seen['gradient_norm'].min())} to "
    title += f"{_short(largest['gradient_norm'])}, largest in layer {largest['layer']} at step {largest['step']:.0f}"
    height = 90 + min(22 * max(3, len(steps)), 400)
    return Panel(title, drawing(data, height=height, coloraxis=colours, xaxis=layer_axis, yaxis=step_axis))


def _lines(values: list[Any], width: int) -> list[list[Any]]:
    return [values[at : at + width] for at in range(0, len(values), width)]


def _short(value: float) -> str:
    """Return three digits of a positive number of any size."""
    value = float(f"{value:.2e}")
    return f"{value:g}" if 1e-3 <= value < 1e4 else rate(value)


if __name__ == "__main__":
    from .report import main

    main(only="gradient_norms")
