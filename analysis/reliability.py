"""Reliability diagrams: how often the predicted label is right among queries that give it some probability, for zero-shot, in-context and each method."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from .calibration import NUM_BINS, bin_of, states
from .load import Frames
from .panels import GREY, Panel, colour, drawing, safe
from .setting import Setting
from .text import BASELINES, EDGE_NOTE, counted, marked, number

TITLE = "Reliability"
NOTE = (
    "Queries of all draws, in 10 bins by the probability of the predicted label: its mean against the share that is right, a point's area as the number of "
    "queries. On the dashed line what is said holds; below it the model is surer than it should be. Pooled ECE: mean distance from the line, weighted by queries; the table has the mean over draws of each draw's own. Methods "
    "at the largest step, on each fold at the learning rate that the other selects." + EDGE_NOTE
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per state and bin that holds answers: bounds, number of answers (a query counts once per draw), mean probability of the predicted label, share right."""
    rows = []
    for state in states(frames, setting):
        found, draws = [], set()
        for fold, terms in state.terms.items():
            for key, draw in zip(terms["key"], terms["draw"], strict=True):
                said, gold = frames.probabilities(key, fold)
                if len(said):
                    found.append((said, gold))
                    draws.add(draw)
        if not found:
            continue
        confidence = np.concatenate([said.max(1) for said, _ in found])
        right = np.concatenate([said.argmax(1) == gold for said, gold in found])
        place = bin_of(confidence)
        for number_of_bin in np.unique(place):
            inside = place == number_of_bin
            named: dict[str, Any] = setting.named | {"method": state.name, "learning_rates": state.rates, "is_edge": state.is_edge}
            named |= {
                "lower": number_of_bin / NUM_BINS,
                "upper": (number_of_bin + 1) / NUM_BINS,
                "num_answers": int(inside.sum()),
                "num_used": len(draws),
                "num_planned": setting.num_planned(state.name),
            }
            rows.append(named | {"confidence": confidence[inside].mean(), "accuracy": right[inside].mean()})
    return pd.DataFrame(rows)


def panels(setting: Setting, rows: pd.DataFrame) -> list[Panel]:
    """Return a panel for each state."""
    found = []
    for method, part in rows.groupby("method", sort=False) if len(rows) else ():
        first, total = part.iloc[0], part["num_answers"].sum()
        error = ((part["confidence"] - part["accuracy"]).abs() * part["num_answers"]).sum() / total
        name = BASELINES.get(str(method), str(method))
        shade = colour(str(method), setting.own_methods)
        text = [f"said {number(row.confidence)}, right {number(row.accuracy)}<br>{counted(row.num_answers, 'answer')}" for row in part.itertuples()]
        sizes = [6 + 30 * math.sqrt(count / total) for count in part["num_answers"]]
        marks = {"size": sizes, "color": shade, "opacity": 0.85}
        points = {"type": "scatter", "mode": "lines+markers", "x": part["confidence"].tolist(), "y": part["accuracy"].tolist(), "name": safe(name)}
        line = {"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1, "line": {"color": GREY, "width": 1, "dash": "dash"}}
        axis = {"range": [0, 1.08], "title": {"text": "probability of the predicted label", "standoff": 4}}
        figure = drawing(
            [{**points, "hovertext": text, "hoverinfo": "text", "marker": marks, "line": {"color": shade, "width": 1}}],
            height=280,
            bottom=44,
            xaxis=axis,
            yaxis={"range": [-0.08, 1.08], "title": {"text": "share right", "standoff": 4}},
            shapes=[line],
            showlegend=False,
        )
        at = f" {marked(first)}".rstrip()
        found.append(
            Panel(
                f"{name}{at}: pooled ECE {number(error)} of {total:,} answers; {first['num_used']} of {counted(int(first['num_planned']), 'draw')}",
                figure,
            )
        )
    return found


if __name__ == "__main__":
    from .report import main

    main(only="reliability")
