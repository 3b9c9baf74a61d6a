"""Similarity against accuracy: each learning rate of each method at the largest step, and the Pareto front, where neither can grow but at the other's cost.

Knows the two figures of each point; knows nothing of cells or draws, which `ratio` has counted.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from .panels import GREY, Panel, colour, drawing, safe
from .setting import Setting
from .text import BASELINES, counted, number, rate

ACCURACY, SIMILARITY = "balanced_accuracy", "sim_aou"
TITLE = "Similarity against accuracy"
NOTE = (
    "Each point is a learning rate at the largest step, means over draws. Line: the Pareto front, the points that no other exceeds in one figure without falling behind in the other; "
    "their learning rates are written beside them. Open markers: collapsed in at least one draw. Faint: fewer draws than other learning rates of the method have; "
    "they do not compete, as a mean without the diverged draws would flatter. Diverged learning rates and undefined similarities are not drawn. Vertical lines: "
    "balanced accuracy of zero-shot and in-context. The front is chosen after the fact and is no estimate of what these learning rates would score again."
)


def data(setting: Setting, ratios: pd.DataFrame) -> pd.DataFrame:
    """Return one row per method and learning rate at the largest step: both figures with intervals, num_used (draws that both have), competes, is_front."""
    if ratios.empty:
        return pd.DataFrame()
    place = [*setting.named, "method", "learning_rate", "step", "num_cells", "num_collapsed", "num_diverged"]
    parts = []
    for metric in (ACCURACY, SIMILARITY):
        part = ratios.loc[ratios["metric"] == metric, [*place, "value", "lower", "upper", "num_used"]]
        parts.append(part.rename(columns={"value": metric, "lower": f"{metric}_lower", "upper": f"{metric}_upper", "num_used": f"{metric}_n"}))
    rows = parts[0].merge(parts[1], on=place).assign(num_draws=setting.num_draws)
    used = rows[[f"{ACCURACY}_n", f"{SIMILARITY}_n"]].min(axis=1)
    rows["competes"] = rows[[ACCURACY, SIMILARITY]].notna().all(axis=1) & (used > 0) & (used == used.groupby(rows["method"]).transform("max"))
    rows["is_front"] = [bool(point.competes) and not _is_dominated(point, rows[rows["competes"]]) for point in rows.itertuples()]
    return rows


def _is_dominated(point: Any, others: pd.DataFrame) -> bool:
    """Return whether another point is at least as large in both figures and larger in one."""
    accuracy, similarity = others[ACCURACY] - point.balanced_accuracy, others[SIMILARITY] - point.sim_aou
    return bool(((accuracy >= 0) & (similarity >= 0) & ((accuracy > 0) | (similarity > 0))).any())


def panels(setting: Setting, rows: pd.DataFrame, table: pd.DataFrame) -> list[Panel]:
    """Return the panel of a setting, if it has a point."""
    drawn = rows.dropna(subset=[ACCURACY, SIMILARITY]) if len(rows) else rows
    if drawn.empty:
        return []
    data: list[dict[str, Any]] = []
    for method in setting.methods:
        part = drawn[drawn["method"] == method]
        if part.empty:
            continue
        texts = []
        for row in part.itertuples():
            counts = f"{min(row.balanced_accuracy_n, row.sim_aou_n)} used of {counted(row.num_draws, 'draw')}" + f", {row.num_collapsed} collapsed" * (
                row.num_collapsed > 0
            )
            texts.append(
                f"{safe(method)}, lr {rate(row.learning_rate)}<br>{ACCURACY} {number(row.balanced_accuracy)}, {SIMILARITY} {number(row.sim_aou)}; {counts}"
            )
        marker = {"symbol": ["circle-open" if count else "circle" for count in part["num_collapsed"]], "size": 8, "color": colour(method, setting.own_methods)}
        marker |= {"opacity": [1 if competes else 0.4 for competes in part["competes"]], "line": {"width": 2, "color": colour(method, setting.own_methods)}}
        points = {"type": "scatter", "mode": "markers", "name": safe(method), "hovertext": texts, "hoverinfo": "text", "marker": marker}
        data.append({**points, "x": part[ACCURACY].tolist(), "y": part[SIMILARITY].tolist()})
    front = drawn[drawn["is_front"]].sort_values([ACCURACY, SIMILARITY], ascending=[True, False])
    line = {"type": "scatter", "mode": "lines+text", "name": "Pareto front", "x": front[ACCURACY].tolist(), "y": front[SIMILARITY].tolist()}
    # vh, down and then on: the edge of what a point of the front equals or exceeds in both figures; between two learning rates nothing was measured.
    line |= {"line": {"color": GREY, "width": 1.5, "shape": "vh"}, "text": front["learning_rate"].map(rate).tolist(), "textposition": "top right"}
    data.append({**line, "textfont": {"size": 10}, "hoverinfo": "skip", "cliponaxis": False})
    base = table.set_index("method")[ACCURACY]
    levels = sorted((base[method], name) for method, name in BASELINES.items() if math.isfinite(base[method]))
    shapes, labels = [], []
    for index, (level, name) in enumerate(levels):
        shapes.append({"x0": level, "x1": level, "y0": 0, "y1": 1, "yref": "y domain", "line": {"color": GREY, "width": 1, "dash": "dash"}})
        side = "right" if index == 0 and len(levels) > 1 else "left"  # the labels lean away from each other
        labels.append({"text": name, "font": {"size": 11}, "x": level, "xanchor": side, "y": 1, "yref": "y domain", "yanchor": "bottom", "showarrow": False})
    axes = {"xaxis": {"title": {"text": "balanced accuracy", "standoff": 4}, "zeroline": False}, "yaxis": {"title": {"text": SIMILARITY, "standoff": 4}}}
    figure = drawing(data, height=310, bottom=64, right=40, shapes=shapes, annotations=labels, showlegend=True, **axes)
    ends = list(dict.fromkeys(f"{row.method} {rate(row.learning_rate)}" for row in (front.iloc[[0, -1]] if len(front) else front).itertuples()))
    title = (
        f"{SIMILARITY} against balanced accuracy at step {setting.last_step}: {len(front)} of {counted(len(drawn), 'point')} on the front, {' to '.join(ends)}"
    )
    title += "".join(f"; {name} {number(base[method], 2)}" for method, name in BASELINES.items() if math.isfinite(base[method]))
    return [Panel(title, figure)]


if __name__ == "__main__":
    from .report import main

    main(only="pareto")
