"""alpha, the cosine of what two methods change in the attention scores: at the same learning rate, at each method's selected one, and at equal size of update.

The papers' Figure 2 asks whether two ways of finetuning move attention alike; at one learning rate for both that is a question of size as well. Knows which
cells stand for a method (chosen.py) and their pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from .chosen import matched
from .crossing import crossfit, selected
from .intervals import Estimate, descriptive
from .load import Frames, load
from .setting import Setting
from .text import EDGE_SAID, Grid, entry, rate, show, stores

BASE, METRIC = "vanilla", "alpha"
SAME, SELECTED, MATCHED = "same learning rate", "selected", "equal size"
TITLE = "alpha: do two methods change the attention scores alike?"
NOTE = (
    "Cosine of the changes of the attention scores of two finetuned cells of one draw, mean over heads, queries and layers, at the largest step. Selected: each "
    "method at the learning rate with the smallest nll_label on one fold, alpha on the other, folds swapped and averaged. Equal size: where each method's R "
    "crosses R* along its learning rates, between the four cells around. Brackets: 95 % interval over seeds, without the queries' share. n/N: draws used of "
    "draws planned; pairs of two learning rates are missing where a block was split over actors or ran in several runs: `iclgd measure` makes them."
)
Alphas = Mapping[tuple[str, str], float]  # (cell, cell) in either order


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per method other than vanilla and place (each learning rate that both have, selected, equal size): mean alpha with vanilla, interval, counts."""
    rows: list[dict[str, Any]] = []
    if BASE not in setting.methods or frames.pairs.empty:
        return pd.DataFrame()
    own = frames.pairs[frames.pairs["cell_a"].isin(setting.finetuned["key"])]
    by_fold = {fold: _alphas(frames, own, fold) for fold in ("all", "A", "B")}
    if not by_fold["all"]:
        return pd.DataFrame()
    base = setting.at_last_step(BASE)
    for method in setting.methods[1:]:
        theirs = setting.at_last_step(method)
        named = setting.named | {"method": method, "step": setting.last_step_of(method), "num_planned": setting.num_draws}
        for learning_rate in sorted((set(base["learning_rate"]) & set(theirs["learning_rate"])) - {0.0}):  # 0 is a control
            cells = base[base["learning_rate"] == learning_rate]
            partner = theirs[theirs["learning_rate"] == learning_rate].set_index("draw")["key"]
            values = {key: by_fold["all"].get((key, partner.get(draw, "")), math.nan) for key, draw in zip(cells["key"], cells["draw"], strict=True)}
            found = frames.estimate(cells, METRIC, values=pd.Series(values, dtype=float))
            rows.append(named | {"place": SAME, "learning_rates": rate(learning_rate)} | found.columns)
        places: tuple[tuple[str, Callable[[Frames, Setting, str, Mapping[str, Alphas]], tuple[Estimate, str]]], ...] = (
            (SELECTED, _selected),
            (MATCHED, _matched),
        )
        for place, of in places:
            estimate, rates = of(frames, setting, method, by_fold)
            rows.append(named | {"place": place, "learning_rates": rates} | estimate.columns)
    return pd.DataFrame(rows)


def _alphas(frames: Frames, pairs: pd.DataFrame, fold: str) -> Alphas:
    found = frames.measured(pairs, METRIC, fold)
    return {pair: value for (a, b), value in found.items() for pair in ((a, b), (b, a))}


def _selected(frames: Frames, setting: Setting, method: str, by_fold: Mapping[str, Alphas]) -> tuple[Estimate, str]:
    ours, theirs = selected(frames, setting, BASE), selected(frames, setting, method)
    if not ours or not theirs:
        return Estimate(), ""
    figures = {}
    for fold, (_, terms) in ours.items():
        partner = theirs[fold][1].set_index("draw")["key"]
        figures[fold] = pd.Series(
            {key: by_fold[fold].get((key, partner.get(draw, "")), math.nan) for key, draw in zip(terms["key"], terms["draw"], strict=True)}
        )
    rates = []
    for of in (ours, theirs):
        text = " or ".join(rate(one) for one in sorted({picked.learning_rate for picked, _ in of.values()}))
        rates.append(text + (EDGE_SAID if any(picked.is_edge for picked, _ in of.values()) else ""))
    return crossfit(frames, {fold: terms for fold, (_, terms) in ours.items()}, METRIC, figures=figures), " and ".join(rates)


def _matched(frames: Frames, setting: Setting, method: str, by_fold: Mapping[str, Alphas]) -> tuple[Estimate, str]:
    """Return alpha at R* of both methods: linear in both weights between the cells around, in each draw that has all of them."""
    ours, theirs = (matched(setting, name).terms for name in (BASE, method))
    both = ours.merge(theirs, on="draw", suffixes=("", "_b"))
    if both.empty:
        return Estimate(), ""
    alphas = [by_fold["all"].get(pair, math.nan) for pair in zip(both["key"], both["key_b"], strict=True)]
    both = both.assign(value=both["weight"] * both["weight_b"] * alphas)
    draws = both.groupby("draw", sort=False).agg(
        key=("key", "first"), replicate=("replicate", "first"), value=("value", lambda values: values.sum(skipna=False))
    )
    cells = draws.reset_index()[["key", "draw", "replicate"]]
    return frames.estimate(cells, METRIC, values=draws.set_index("key")["value"]), f"R = {setting.matched_ratio:g}"


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return the table of a setting: a row per method and place."""
    if rows.empty:
        return []
    body = [[f"{BASE} and {row['method']}", row["place"], row["learning_rates"], entry(row)] for row in rows.to_dict("records")]
    headers = ("methods", "at", "learning rates", "alpha")
    return [Grid(f"{TITLE} {setting.title}", headers, body, f"R* = {setting.matched_ratio:g}. {setting.caption} {NOTE}{descriptive(rows)}")]


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
