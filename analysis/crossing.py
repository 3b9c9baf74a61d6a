"""Figures by cross-fitting, and methods at equal improvement: what one fold chooses, the other reports; then the folds change places, and the two are averaged.

Equal improvement: G(lr) = nll_label of zero-shot less that of finetuning, mean over seeds, at the largest step. Half of the smaller of the methods' largest G on
one fold is what both have to reach on the other: there each method's figures lie between the two neighbouring learning rates where G first comes up to it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .chosen import NEAREST, SELECTED, Matched, Selected, comparable, nearest_ratio, select, upward
from .intervals import Estimate, estimate, geometric_mean
from .load import ACCURACIES, Frames, each
from .setting import Setting
from .text import number, rate

FOLDS = {"A": "B", "B": "A"}  # fold that chooses -> fold that reports
REASONS = {
    "never_improves": "no learning rate improves on zero-shot",
    "diverged": "every learning rate diverged",
    "below_range": "the smallest learning rate improves more already",
    "above_range": "no learning rate improves so much on the other fold",
    "missing": "a neighbouring cell is missing or diverged",
}


def crossfit(frames: Frames, terms: Mapping[str, pd.DataFrame], metric: str, *, figures: Mapping[str, pd.Series] | None = None) -> Estimate:
    """Return the mean of the contrasts of both folds with its interval, paired by replicate; `terms`: fold that reports -> key, weight, draw, replicate.

    `figures` (fold -> value by key) stand in for the cells' own and have no value per query. None of a fold is none at all.
    """
    found = {
        fold: frames.by_replicate(part, figures[fold] if figures else frames.figures(part["key"].drop_duplicates(), metric, fold))
        for fold, part in terms.items()
    }
    if any(part.empty for part in found.values()):
        return Estimate()
    means = pd.concat([part["mean"] for part in found.values()], axis=1).dropna().mean(axis=1)
    used = min(int(part["count"].reindex(means.index).sum()) for part in found.values())
    groups: list[np.ndarray] = []
    if figures is None and (metric in ACCURACIES or metric in frames.examples.columns):
        queries = pd.concat([frames.per_query(part, metric, fold) for fold, part in terms.items()])
        groups = [part.to_numpy() for _, part in queries.groupby(level=0)] if metric == "balanced_accuracy" else [queries.to_numpy()]
    is_share = metric in ACCURACIES and all((part["weight"] > 0).all() for part in terms.values())
    return estimate(means, used=used, groups=groups, is_share=is_share)


@dataclass(frozen=True)
class Pick:
    """What stands for a method: by the fold that reports them, cells of one learning rate each at the largest step; `all` reports on all queries."""

    name: str
    method: str
    learning_rates: Mapping[str, float]  # fold -> learning rate
    terms: Mapping[str, pd.DataFrame]  # fold -> key, weight, draw, replicate
    is_edge: bool
    R: float  # geometric mean over draws and folds

    @property
    def rates(self) -> str:
        return " or ".join(map(rate, sorted({*self.learning_rates.values()})))

    @property
    def fold(self) -> str:
        return " and ".join(sorted(self.terms))

    @property
    def title(self) -> str:
        return f"{self.method} {self.rates} (R {number(self.R, 2)}{', edge of the grid' if self.is_edge else ''})"


def picks(frames: Frames, setting: Setting) -> Iterator[Pick]:
    """Yield what stands for each method: at the learning rate that each fold selects, shown on the other; and at the one whose R is nearest R*."""
    for name in (SELECTED, NEAREST):
        for method in setting.methods:
            if name == SELECTED:
                found = {fold: one for fold, (one, _) in selected(frames, setting, method).items()}
                pick = picked(
                    setting, name, method, {fold: one.learning_rate for fold, one in found.items()}, is_edge=any(one.is_edge for one in found.values())
                )
            else:
                near = nearest_ratio(setting, method)
                pick = picked(setting, name, method, {"all": near[0]} if near else {})
            if pick.terms:
                yield pick


def picked(setting: Setting, name: str, method: str, learning_rates: Mapping[str, float], *, is_edge: bool = False) -> Pick:
    """Return the cells of a method at a learning rate for each fold that reports."""
    cells = {fold: setting.at(method, one, setting.last_step_of(method)) for fold, one in learning_rates.items()}
    ratio = geometric_mean(pd.concat([part["update_ratio"] for part in cells.values()])) if cells else math.nan
    return Pick(name, method, learning_rates, {fold: each(part) for fold, part in cells.items()}, is_edge, ratio)


def selected(frames: Frames, setting: Setting, method: str) -> dict[str, tuple[Selected, pd.DataFrame]]:
    """Return, by the fold that reports, the learning rate that the other fold selects and its cells as terms; nothing where none is defined."""
    found = {}
    for chooses, reports in FOLDS.items():
        if picked := select(frames, setting, method, fold=chooses):
            found[reports] = (picked, each(setting.at(method, picked.learning_rate, setting.last_step_of(method))))
    return found if len(found) == len(FOLDS) else {}


def gains(frames: Frames, setting: Setting, method: str, fold: str) -> pd.Series:
    """Return G by usual learning rate, ascending: mean over seeds of the mean over their draws; NaN where it is undefined in more draws than at others."""
    cells = comparable(setting.at_last_step(method))
    zero_shot = float(frames.figures(setting.zero_shot["key"], "nll_label", fold).mean())
    table = cells.assign(gain=zero_shot - frames.figures(cells["key"], "nll_label", fold).to_numpy()).dropna(subset=["gain"])
    counts = table.groupby("learning_rate")["gain"].count()
    table = table[table["learning_rate"].isin(counts[counts == counts.max()].index)]
    return table.groupby(["learning_rate", "replicate"])["gain"].mean().groupby("learning_rate").mean().reindex(sorted(cells["learning_rate"].unique()))


def at_equal_gain(frames: Frames, setting: Setting, methods: Sequence[str]) -> dict[str, dict[str, Matched]]:
    """Return, by the fold that reports, what stands for each method where it improves as much as the others do; no terms where there is no such point."""
    found: dict[str, dict[str, Matched]] = {}
    for chooses, reports in FOLDS.items():
        largest = {method: gains(frames, setting, method, chooses).max() for method in methods}
        target = 0.5 * min(largest.values()) if all(map(math.isfinite, largest.values())) else math.nan
        for method in methods:
            cells = setting.at_last_step(method)
            terms, reasons = [], Counter[str]()
            if not target > 0:
                none = "diverged" if (cells["status"] == "diverged").any() else "missing"
                why = "never_improves" if math.isfinite(largest[method]) else none
                reasons[why] += cells["draw"].nunique() if not largest[method] > 0 else 0  # else it is the other method that has none
            else:
                curve = gains(frames, setting, method, reports) - target
                weights = {curve.index[place]: weight for place, weight in upward(curve.tolist()).items()}
                for draw, rows in cells.groupby("draw"):
                    keys = rows.set_index("learning_rate")["key"].reindex(list(weights))
                    if not weights:
                        reasons[_without(curve)] += 1
                    elif keys.isna().any() or frames.figures(keys, "nll_label", reports).isna().any():
                        reasons["missing"] += 1
                    else:
                        terms += [
                            {"key": key, "weight": weight, "draw": draw, "replicate": rows["replicate"].iloc[0]}
                            for key, weight in zip(keys, weights.values(), strict=True)
                        ]
            found.setdefault(reports, {})[method] = Matched(pd.DataFrame(terms, columns=["key", "weight", "draw", "replicate"]), reasons)
    return found


def _without(curve: pd.Series) -> str:
    """Return why a curve never comes up to 0 between two neighbouring learning rates."""
    if len(curve) and curve.iloc[0] > 0:
        return "below_range"
    return "missing" if (curve > 0).any() else "above_range"
