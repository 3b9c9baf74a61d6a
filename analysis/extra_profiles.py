"""Per-layer profiles of spectra and geometry: ranks of updates and changes, directions shared with ICL, clusters and dimension of the states."""

from __future__ import annotations

import pandas as pd

from .calibration import states
from .load import Frames
from .panels import Panel, colour, drawing, safe
from .setting import Setting
from .text import BASELINES, EDGE_NOTE, counted, number

SHOWN = {
    ("weights", "stable_rank_k"): "stable rank of what training added to W_K",
    ("weights", "stable_rank_v"): "stable rank of what training added to W_V",
    ("weights", "effective_rank_v"): "effective rank of what training added to W_V",
    ("change", "participation_ratio"): "participation ratio of the change of the attention output over queries",
    ("change", "icl_share_in_ft"): "share of ICL's change inside finetuning's 8 largest directions",
    ("change", "ft_share_in_icl"): "share of finetuning's change inside ICL's 8 largest directions",
    ("change", "principal_cosine"): "mean cosine of the principal angles of the two",
    ("change", "cka"): "linear CKA of the two changes",
    ("geometry", "learnability"): "learnability: k-means clusters found by the nearest neighbours",
    ("geometry", "intrinsic_dimension"): "intrinsic dimension of the attention outputs (TwoNN)",
}
TITLE = "Spectra and geometry"
NOTE = (
    "Means over draws at the largest step, layer 0 first, all queries; methods at the learning rates with the smallest nll_label on either fold. Figures of weights are of "
    "what training added, of changes of the attention output less zero-shot's, not centred. A gap: the change is at most 10 x the noise floor. All of them stand in "
    "figures/extra_profiles.csv." + EDGE_NOTE
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per group, metric, state and layer: mean over draws, draws with a value."""
    own = frames.extras[frames.extras["group"].isin({group for group, _ in SHOWN})]
    rows = []
    for state in states(frames, setting) if len(own) else ():
        part = own[own["cell"].isin(state.cells["key"])].astype({"cell": str, "group": str, "metric": str})
        part = part.merge(state.cells[["key", "draw", "replicate"]], left_on="cell", right_on="key")
        if part.empty:
            continue
        by = ["group", "metric", "layer"]
        means = part.groupby([*by, "replicate"], dropna=False)["mean"].mean().groupby(by).mean().rename("value").to_frame()
        means = means.join(part[part["mean"].notna()].groupby(by)["draw"].nunique().rename("num_used")).fillna({"num_used": 0}).reset_index()
        rows.append(
            means.assign(
                **setting.named,
                method=state.name,
                learning_rates=state.rates,
                is_edge=state.is_edge,
                title=state.title,
                num_planned=setting.num_planned(state.name),
            )
        )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def panels(setting: Setting, rows: pd.DataFrame) -> list[Panel]:
    """Return a panel for each figure that the store has, a line per state."""
    found = []
    for (group, metric), meaning in SHOWN.items():
        part = rows[(rows["group"] == group) & (rows["metric"] == metric)] if len(rows) else rows
        if part.empty or part["value"].isna().all():
            continue
        lines, named = [], []
        for method, line in part.groupby("method", sort=False):
            shade = colour(str(method), setting.own_methods)
            used = sorted({int(line["num_used"].min()), int(line["num_used"].max())})
            of = f"{' to '.join(map(str, used))} of {counted(int(line['num_planned'].iloc[0]), 'draw')}"
            named.append(f"{line['title'].iloc[0]} {number(line['value'].mean(), 2)} ({of})")
            values = [None if pd.isna(value) else float(value) for value in line["value"]]
            style = {"line": {"color": shade, "width": 2}, "marker": {"size": 5}, "mode": "lines+markers"}
            lines.append({"type": "scatter", "x": line["layer"].tolist(), "y": values, "name": safe(BASELINES.get(str(method), method)), **style})
        axis = {"title": {"text": "layer", "standoff": 4}, "tickformat": "d", "zeroline": False}
        figure = drawing(lines, height=260, bottom=52, xaxis=axis, yaxis={"rangemode": "tozero"}, showlegend=True)
        found.append(Panel(f"{meaning}; mean over layers: {', '.join(named)}", figure))
    return found


if __name__ == "__main__":
    from .report import main

    main(only="extra_profiles")
