"""What all figures share: a panel (title, figure), colours, plain layout. The page draws titles and wraps panels, so figures stay small and readable."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

# After Okabe and Ito: told apart with any colour vision. Each has a contrast of 3 or more with the page, light and dark.
GREY = "#8a8a8a"
COLOURS = {"vanilla": "#0072B2", "layer_causal": "#D55E00", "layer_causal_attn": "#008F68", "zero_shot": GREY, "icl": "#B07D00"}
OTHERS = ("#C2629A", "#7B6FD0", "#8C6D46", "#5B8C2A", "#2F8F9D", "#C0504D")  # methods of one's own
LINE, CLEAR = "rgba(128,128,128,0.35)", "rgba(0,0,0,0)"
AXIS = {"gridcolor": LINE, "linecolor": LINE, "zerolinecolor": GREY, "automargin": True, "tickfont": {"size": 10}}
LEGEND = {"orientation": "h", "x": 0, "xref": "container", "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom"}


@dataclass(frozen=True)
class Panel:
    """One drawing of a figure; the title is a sentence on what is seen."""

    title: str
    figure: go.Figure


def colour(method: str, own: Sequence[str]) -> str:
    """Return the colour of a method or baseline; of those of one's own, `own`, by their place among them."""
    return COLOURS.get(method) or OTHERS[own.index(method) % len(OTHERS)]


def safe(text: object) -> str:
    """Return text that plotly shows as written: its labels understand a little HTML, and names come from data."""
    return html.escape(str(text))


def band(x: Sequence[float], lower: Sequence[float], upper: Sequence[float], shade: str) -> list[dict[str, Any]]:
    """Return the area between two lines, one trace for each stretch where both are defined."""
    traces = []
    is_there = [math.isfinite(low) and math.isfinite(high) for low, high in zip(lower, upper, strict=True)]
    for is_drawn, stretch in itertools.groupby(range(len(x)), key=is_there.__getitem__):
        if is_drawn:
            at = list(stretch)
            edge = {"x": [float(x[n]) for n in (*at, *reversed(at))], "y": [*(float(upper[n]) for n in at), *(float(lower[n]) for n in reversed(at))]}
            look = {"mode": "lines", "line": {"width": 0}, "fill": "toself", "fillcolor": shade, "opacity": 0.18, "hoverinfo": "skip", "showlegend": False}
            traces.append({"type": "scatter", **edge, **look})
    return traces


def drawing(data: list[dict[str, Any]], *, height: int, bottom: int = 8, right: int = 8, **layout: Any) -> go.Figure:
    """Return a figure with the common layout: no background (the page has one, light or dark), thin lines, a legend below."""
    # One call: every later update of a plotly figure costs as much as making it.
    common = {
        "template": {},
        "height": height,
        "margin": {"l": 8, "r": right, "t": 22, "b": bottom},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, sans-serif", "size": 11},
        "legend": {**LEGEND, "bgcolor": CLEAR, "entrywidth": 118},
    }
    axes = {name: {**AXIS, **value} for name, value in layout.items() if name.startswith(("xaxis", "yaxis"))}
    return go.Figure(data, {**common, **layout, **axes})
