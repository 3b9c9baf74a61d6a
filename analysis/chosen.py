"""Which cells stand for a method: those of the selected learning rate, of the one whose R is nearest R*, or what lies between two cells at R* itself.

At R*: each draw's figures interpolated linearly in log R between the two neighbouring learning rates that bracket R*. Knows loss and R; knows no other figure.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .intervals import MIN_SEEDS, geometric_mean
from .load import Frames
from .setting import Setting

SELECTED, NEAREST = "selected", "nearest R*"
REASONS = {
    "below_range": "below the smallest R of the grid",
    "above_range": "above the largest R of the grid",
    "diverged": "diverged before it",
    "missing": "a neighbouring cell is missing, or its R is undefined or in the noise",
}


@dataclass(frozen=True)
class Selected:
    """A learning rate chosen on one fold at the largest step; `is_edge`: the smallest or largest of its grid (of a control trained at one alone: never)."""

    learning_rate: float
    is_edge: bool


def select(frames: Frames, setting: Setting, method: str, *, fold: str = "A") -> Selected | None:
    """Return the learning rate with the smallest nll_label on a fold at the largest step, pooled over seeds; the smaller of two equal ones.

    Only learning rates with the most defined draws compete: a mean without the diverged draws would flatter. None if none is defined.
    """
    if (method, fold) not in setting.selected:
        setting.selected[method, fold] = _select(frames, setting, method, fold)
    found: Selected | None = setting.selected[method, fold]
    return found


def _select(frames: Frames, setting: Setting, method: str, fold: str) -> Selected | None:
    rows = comparable(setting.at_last_step(method))
    of_fold = frames.folds[frames.folds["fold"] == fold][["key", "nll_label"]]
    table = rows[["key", "learning_rate", "replicate"]].merge(of_fold, on="key").dropna(subset=["nll_label"])
    if table.empty:
        return None
    counts = table.groupby("learning_rate")["key"].count()
    by_seed = table[table["learning_rate"].isin(counts[counts == counts.max()].index)].groupby(["learning_rate", "replicate"])["nll_label"].mean()
    best = float(by_seed.groupby("learning_rate").mean().sort_index().idxmin())
    lowest, highest = rows["learning_rate"].min(), rows["learning_rate"].max()
    return Selected(best, best in (lowest, highest) and (setting.train_on == "true" or lowest < highest))


def comparable(cells: pd.DataFrame) -> pd.DataFrame:
    """Return the cells that learning rates are compared on: of the usual ones, in the draws that have them all; where no draw has, in all. 0 is a control, no candidate.

    More draws of one learning rate, or cells that are not there yet, would else leave it alone or out.
    """
    cells = cells[cells["learning_rate"] > 0]
    rates = usual(cells)
    rows = cells[cells["learning_rate"].isin(rates)]
    is_whole = rows.groupby("draw")["learning_rate"].transform("nunique").eq(len(rates))
    return rows[is_whole] if is_whole.any() else rows


def usual(cells: pd.DataFrame) -> set[float]:
    """Return the learning rates of the grid: those that make most cells with the draws that have all of them, draws beyond MIN_SEEDS not counted.

    And those that half of the draws have. One that a few draws alone have (a pilot, an added one that is under way) is none of it, and one that more draws have (a
    confirmation) does not stand for it.
    """
    counts, draws = cells["learning_rate"].value_counts(), cells.groupby("learning_rate")["draw"].agg(set)
    sets = [counts[counts >= least].index for least in sorted(counts.unique())]  # the largest first: it is taken of two that make as many
    most: Collection[float] = max(sets, key=lambda rates: len(rates) * min(len(set.intersection(*draws[rates])), MIN_SEEDS), default=[])
    return set(most) | set(counts[counts >= cells["draw"].nunique() / 2].index)


def nearest_ratio(setting: Setting, method: str) -> tuple[float, float] | None:
    """Return the learning rate whose R at the largest step (geometric mean over draws) is nearest R*, and that R; as in `select`, those of most draws compete."""
    rows = comparable(setting.at_last_step(method))
    rows = rows[rows["update_ratio"] > 0]
    if rows.empty:
        return None
    counts = rows["learning_rate"].value_counts()
    rows = rows[rows["learning_rate"].isin(counts[counts == counts.max()].index)]
    ratios = rows.groupby("learning_rate")["update_ratio"].apply(geometric_mean)
    best = (np.log(ratios) - math.log(setting.matched_ratio)).abs().idxmin()
    return float(best), float(ratios[best])


def cited(frames: Frames) -> list[str]:
    """Return the keys of the trained cells that a report cites: at the learning rates selected on either fold, and at the one whose R is nearest R*."""
    keys: list[str] = []
    for setting in frames.settings():
        for method in setting.methods if setting.train_on == "true" else ():
            picked = [select(frames, setting, method, fold=fold) for fold in "AB"]
            near = nearest_ratio(setting, method)
            rates = {each.learning_rate for each in picked if each} | ({near[0]} if near else set())
            for learning_rate in sorted(rates):
                cells = setting.at(method, learning_rate, setting.last_step_of(method))
                keys += cells.loc[cells["status"] == "done", "key"].tolist()
    return keys


@dataclass(frozen=True)
class Matched:
    """One method of a setting at R*: a weighted sum of two cells per draw (`terms`: key, weight, draw, replicate), and why the other draws have none."""

    terms: pd.DataFrame
    reasons: Counter[str]


def matched(setting: Setting, method: str, at: float | None = None) -> Matched:
    """Return what stands at an R (R* unless given) in each draw, at the largest step: between two neighbouring learning rates, first upward crossing.

    Nothing is extrapolated.
    """
    ratio = setting.matched_ratio if at is None else at
    cells = setting.at_last_step(method)
    cells = cells[cells["learning_rate"] > 0]
    rates = neighbours(cells)
    terms: list[dict[str, object]] = []
    reasons: Counter[str] = Counter()
    for draw, rows in cells.groupby("draw"):
        line = rows.set_index("learning_rate").reindex(rates[str(draw)])
        weights = crossing(line["update_ratio"].tolist(), ratio)
        if weights:
            keys = line["key"].tolist()
            terms += [{"key": keys[place], "weight": weight, "draw": draw, "replicate": rows["replicate"].iloc[0]} for place, weight in weights.items()]
        else:
            reasons[_reason(line, ratio)] += 1
    return Matched(pd.DataFrame(terms, columns=["key", "weight", "draw", "replicate"]), reasons)


def neighbours(cells: pd.DataFrame) -> dict[str, list[float]]:
    """Return by draw the usual learning rates and its own, ascending: one that is there for a few draws makes no gap in the others."""
    of_most = usual(cells)
    return {str(draw): sorted(of_most.union(rates)) for draw, rates in cells.groupby("draw")["learning_rate"]}


def crossing(ratios: list[float], at: float) -> dict[int, float]:
    """Return position -> weight of the point where R, in logarithms, first comes up to `at` between neighbours; nothing where it does not. 0 is no neighbour."""
    return upward([math.log(ratio / at) if ratio > 0 else math.nan for ratio in ratios])


def upward(values: Sequence[float]) -> dict[int, float]:
    """Return position -> weight of the point where values first come up to 0 between neighbours; nothing where they do not. NaN is no neighbour."""
    for position, value in enumerate(values):
        if value == 0:
            return {position: 1.0}
        if position and values[position - 1] < 0 < value:
            share = values[position - 1] / (values[position - 1] - value)
            return {position - 1: 1 - share, position: share}
    return {}


def _reason(line: pd.DataFrame, at: float) -> str:
    """Return why R, from small learning rates to large ones, never comes up to R*."""
    is_below = line["update_ratio"] < at
    if not is_below.any():
        return "below_range" if (line["update_ratio"] > at).any() else "diverged" if (line["status"] == "diverged").any() else "missing"
    after = line[is_below.cumsum().eq(is_below.sum())].iloc[1:]  # above the last learning rate whose R is too small
    if (after["status"] == "diverged").any():
        return "diverged"
    if len(after):  # undefined there, or 0, the last that is too small: it lies in the noise
        return "missing"
    return "below_range" if line["update_ratio"].iloc[0] > at else "above_range"


def paired(left: pd.DataFrame, right: pd.DataFrame) -> list[pd.DataFrame]:
    """Return both terms over the draws that both have."""
    both = set(left["draw"]) & set(right["draw"])
    return [terms[terms["draw"].isin(both)] for terms in (left, right)]


def difference(left: pd.DataFrame, right: pd.DataFrame) -> pd.DataFrame:
    """Return the terms of left - right over the draws that both have."""
    left, right = paired(left, right)
    return pd.concat([left, right.assign(weight=-right["weight"])])
