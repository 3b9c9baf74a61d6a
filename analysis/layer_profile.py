"""Per-layer profiles of similarity: each method at its selected learning rate, at the one whose R is nearest R*, and each layer where its own ratio is R*."""

from __future__ import annotations

import math

import pandas as pd

from .chosen import NEAREST, SELECTED, crossing, neighbours
from .crossing import picks
from .intervals import MIN_SEEDS, simultaneous
from .load import Frames
from .panels import Panel, band, colour, drawing, safe
from .setting import Setting
from .text import counted, number

METRICS = ("sim_aou", "sim_aou_norm", "sim_am_delta")
OWN = "each layer at R*"
TITLE = "Layer profiles"
NOTE = (
    "Means over draws at the largest step, layer 0 first. Selected: the learning rate with the smallest nll_label on one fold, shown on the other, folds swapped and averaged. Nearest R*: "
    "the learning rate of the grid whose R is nearest R* (matched_ratio of the sweep file, 1/2 unless set), no interpolation, all queries; each method's R stands in the title: they are not equal. Each layer at R*: where the layer's own update ratio "
    "crosses R* along the learning rates, linear in its logarithm in each draw, all queries: a profile, not a model, as no learning rate has all layers there. "
    f"Bands, from {MIN_SEEDS} seeds on: 95 % for all layers of a line at once (Bonferroni), over seeds. A gap is an undefined layer."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per cell choice, method and layer: learning rates, R, fold, is_edge, the metrics with their bands and the draws that have each, num_planned."""
    parts = []
    for pick in picks(frames, setting):
        of_folds = [frames.layers[frames.layers["fold"] == fold].merge(terms, on="key") for fold, terms in pick.terms.items()]
        named = setting.named | {"choice": pick.name, "method": pick.method, "learning_rates": pick.rates, "R": pick.R}
        parts.append(_profile(pd.concat(of_folds)).assign(**named, fold=pick.fold, is_edge=pick.is_edge, num_planned=setting.num_draws))
    for method in setting.methods:
        named = setting.named | {"choice": OWN, "method": method, "learning_rates": "", "R": setting.matched_ratio}
        if len(layers := _at_own_ratio(frames, setting, method)):
            parts.append(_profile(layers).assign(**named, fold="all", is_edge=False, num_planned=setting.num_draws))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _profile(layers: pd.DataFrame) -> pd.DataFrame:
    """Return per layer the mean of each metric over replicates, the draws that have it, and its band."""
    by_draw = layers.groupby(["layer", "replicate", "draw"])[list(METRICS)].mean()  # the folds of a draw first
    by_seed = by_draw.groupby(["layer", "replicate"]).mean()
    found = by_seed.groupby("layer").mean().join(by_draw.groupby("layer").count().add_suffix("_n"))
    for metric in METRICS:
        half = simultaneous(by_seed[metric].unstack("replicate"))
        found[f"{metric}_lower"], found[f"{metric}_upper"] = found[metric] - half, found[metric] + half
    return found.reset_index()


def _at_own_ratio(frames: Frames, setting: Setting, method: str) -> pd.DataFrame:
    """Return per draw and layer the metrics where the layer's own update ratio crosses R* between two learning rates; NaN where it does not."""
    cells = setting.at_last_step(method)
    cells = cells.loc[cells["learning_rate"] > 0, ["key", "learning_rate", "draw", "replicate"]]
    layers = frames.layers[frames.layers["key"].isin(cells["key"]) & (frames.layers["fold"] == "all")].merge(cells, on="key")
    rates = neighbours(cells)
    rows = []
    for (replicate, draw, layer), part in layers.groupby(["replicate", "draw", "layer"]):
        line = part.set_index("learning_rate").reindex(rates[str(draw)])  # a cell that diverged has no layers, and is no neighbour
        weights = crossing(line["update_ratio"].tolist(), setting.matched_ratio)
        values = (sum(weight * line[metric].iloc[at] for at, weight in weights.items()) if weights else math.nan for metric in METRICS)
        rows.append([replicate, draw, layer, *values])
    return pd.DataFrame(rows, columns=["replicate", "draw", "layer", *METRICS])


def panels(setting: Setting, rows: pd.DataFrame) -> list[Panel]:
    """Return a panel per choice and metric; the choices of a metric share their scale."""
    found = []
    for choice in (SELECTED, NEAREST, OWN):
        for metric in METRICS:
            if rows.empty or not (rows["choice"] == choice).any() or rows[metric].isna().all():
                continue
            part = rows[rows["choice"] == choice]
            data, named = [], []
            for method, line in part.groupby("method", sort=False):
                at = line.iloc[0]
                used = sorted({int(line[f"{metric}_n"].min()), int(line[f"{metric}_n"].max())} - {0}) or [0]
                counts = f"{' to '.join(map(str, used))} of {counted(setting.num_draws, 'draw')}"
                named.append(
                    f"{method} {at['learning_rates']}".rstrip() + f" (R {number(at['R'], 2)}, {counts}{', edge of the grid' if at['is_edge'] else ''})"
                )
                shade, layers = colour(str(method), setting.own_methods), line["layer"].tolist()
                values = [None if pd.isna(value) else float(value) for value in line[metric]]
                data += band(layers, line[f"{metric}_lower"].tolist(), line[f"{metric}_upper"].tolist(), shade)
                style = {"line": {"color": shade, "width": 2}, "marker": {"size": 5}, "mode": "lines+markers"}
                data.append({"type": "scatter", "x": layers, "y": values, "name": safe(method), **style})
            low = min(rows[[metric, f"{metric}_lower"]].min().min(), 0.0)
            high = rows[[metric, f"{metric}_upper"]].max().max()
            room = 0.05 * max(high - low, 1e-6)
            axis = {"title": {"text": "layer", "standoff": 4}, "tickformat": "d", "zeroline": False}
            figure = drawing(data, height=260, bottom=52, xaxis=axis, yaxis={"range": [low - room, high + room]}, showlegend=True)
            found.append(Panel(f"{metric}, {choice}: {', '.join(named)}", figure))
    return found


if __name__ == "__main__":
    from .report import main

    main(only="layer_profile")
