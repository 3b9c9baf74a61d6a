"""Per-layer profiles of similarity: each method at its selected learning rate, and at the one whose update is nearest half of ICL's."""

from __future__ import annotations

import pandas as pd

from .chosen import NEAREST, SELECTED, choices
from .load import Frames
from .panels import Panel, colour, drawing, safe
from .setting import Setting
from .text import counted, number, rate

METRICS = ("sim_aou", "sim_aou_norm", "sim_am_delta")
TITLE = "Layer profiles"
NOTE = (
    "Means over draws at the largest step, layer 0 first. Selected: the learning rate with the smallest nll_label on fold A, shown on fold B. Nearest R*: "
    "the learning rate of the grid whose R is nearest R* (matched_ratio of the sweep file, 1/2 unless set), no interpolation, all queries; the two methods' R are close, not equal. A gap is an undefined layer."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per cell choice, method and layer: learning rate, R, fold, is_edge, the metrics with the draws that have each, num_planned."""
    parts = []
    for chosen in choices(frames, setting):
        cells = chosen.cells
        layers = frames.layers[frames.layers["key"].isin(cells["key"]) & (frames.layers["fold"] == chosen.fold)].merge(cells[["key", "replicate"]], on="key")
        means = layers.groupby(["layer", "replicate"])[list(METRICS)].mean().groupby("layer").mean()
        means = means.join(layers.groupby("layer")[list(METRICS)].count().add_suffix("_n")).reset_index()
        named = setting.named | {"choice": chosen.name, "method": chosen.method, "learning_rate": chosen.learning_rate, "R": chosen.R}
        parts.append(means.assign(**named, fold=chosen.fold, is_edge=chosen.is_edge, num_planned=setting.num_draws))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def panels(setting: Setting, rows: pd.DataFrame) -> list[Panel]:
    """Return a panel per choice and metric; the two choices of a metric share their scale."""
    found = []
    for choice in (SELECTED, NEAREST):
        for metric in METRICS:
            if rows.empty or not (rows["choice"] == choice).any() or rows[metric].isna().all():
                continue
            part = rows[rows["choice"] == choice]
            data, named = [], []
            for method, line in part.groupby("method", sort=False):
                at = line.iloc[0]
                used = sorted({int(line[f"{metric}_n"].min()), int(line[f"{metric}_n"].max())} - {0}) or [0]
                counts = f"{' to '.join(map(str, used))} of {counted(setting.num_draws, 'draw')}"
                named.append(f"{method} {rate(at['learning_rate'])} (R {number(at['R'], 2)}, {counts}{', edge of the grid' if at['is_edge'] else ''})")
                values = [None if pd.isna(value) else float(value) for value in line[metric]]
                style = {"line": {"color": colour(str(method)), "width": 2}, "marker": {"size": 5}, "mode": "lines+markers"}
                data.append({"type": "scatter", "x": line["layer"].tolist(), "y": values, "name": safe(method), **style})
            low, high = min(rows[metric].min(), 0.0), rows[metric].max()
            room = 0.05 * max(high - low, 1e-6)
            axis = {"title": {"text": "layer", "standoff": 4}, "tickformat": "d", "zeroline": False}
            figure = drawing(data, height=260, bottom=52, xaxis=axis, yaxis={"range": [low - room, high + room]}, showlegend=True)
            found.append(Panel(f"{metric}, {choice}: {', '.join(named)}", figure))
    return found


if __name__ == "__main__":
    from .report import main

    main(only="layer_profile")
