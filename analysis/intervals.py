"""Means with 95 % intervals: over draws, over tasks, of shares. Knows numbers; knows nothing of a store.

A mean is over replicates (seeds of the demonstrations; of the weights, for random weights), the orders of a seed averaged first. Its 95 % interval:
- 2 replicates and more: mean +- t(n-1) x sqrt(sd^2 / n + se_query^2), se_query from the per-query values averaged over replicates (by label for balanced
  accuracy; from above where figures are kept without them, as in `controls.task_specific`, else left out);
- 1 replicate ("this draw only"): Wilson for an accuracy; for balanced accuracy the labels' Wilson intervals combined by square-and-add (Newcombe; Zou and
  Donner's MOVER): deterministic, inside [0, 1], and not of width zero when a label is always right. Queries are the only source of variation it knows.
Over tasks, which are fixed: the mean of the tasks' means, se = sqrt(sum se_t^2) / T, degrees of freedom by Welch and Satterthwaite.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from .text import counted, number

ALL_TASKS = "all tasks"
MIN_SEEDS = 5  # below: descriptive
MIN_SEEDS_OF_P = 6  # below: no p-value


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; NaN where there is none. `used` counts the draws that have a value, `replicates` the seeds they come from."""

    mean: float = math.nan
    lower: float = math.nan
    upper: float = math.nan
    used: int = 0
    replicates: int = 0
    error: float = math.nan  # standard error
    freedom: float = math.nan  # degrees of freedom

    @property
    def columns(self) -> dict[str, float]:
        """What stands in a table of data."""
        return {"mean": self.mean, "lower": self.lower, "upper": self.upper, "num_used": self.used, "num_replicates": self.replicates}

    @property
    def p(self) -> float:
        """Two-sided p-value of a mean of 0; NaN below MIN_SEEDS_OF_P replicates."""
        if self.replicates < MIN_SEEDS_OF_P or not self.error > 0:
            return math.nan
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.freedom))

    def __str__(self) -> str:
        return number(self.mean) + (f" [{number(self.lower)}, {number(self.upper)}]" if math.isfinite(self.lower) else "")


def estimate(values: pd.Series, *, used: int, groups: Sequence[np.ndarray] = (), is_share: bool = False, query_variance: float = 0.0) -> Estimate:
    """Return the mean of one value per replicate with its interval.

    `groups` holds the per-query values (one group, or one per label); where there are none, `query_variance` is the variance of their mean.
    """
    values, groups = values.dropna(), [group for group in groups if len(group)]
    if values.empty:
        return Estimate()
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Estimate(mean, *(square_and_add(groups) if is_share and groups else (math.nan, math.nan)), used, 1)
    if groups:
        query_variance = sum(np.var(part, ddof=1) / len(part) for part in groups if len(part) > 1) / len(groups) ** 2
    return _t_interval(mean, math.sqrt(values.var(ddof=1) / count + query_variance), count - 1, used, count, is_share)


def over_tasks(found: Sequence[Estimate]) -> Estimate:
    """Return the mean over the tasks that have one; no interval unless all of these have."""
    found = [task for task in found if math.isfinite(task.mean)]
    if not found:
        return Estimate()
    mean, used, replicates = float(np.mean([task.mean for task in found])), sum(task.used for task in found), min(task.replicates for task in found)
    errors = np.array([task.error for task in found])
    if not np.isfinite(errors).all():
        return Estimate(mean, used=used, replicates=replicates)
    fourth = sum(error**4 / task.freedom for error, task in zip(errors, found, strict=True))
    freedom = (errors**2).sum() ** 2 / fourth if fourth else min(task.freedom for task in found)
    return _t_interval(mean, math.sqrt((errors**2).sum()) / len(found), float(freedom), used, replicates, is_share=False)


def with_all_tasks(rows: Iterable[tuple[Hashable, dict[str, Any], list[Estimate]]]) -> list[tuple[dict[str, Any], list[Estimate]]]:
    """Return the rows (group, names, estimates of one task), group by group; after a group of several tasks a row of the means over them.

    Its `signs` says in how many tasks the last estimate, a difference, lies above 0; `num_planned`, `num_queries`, and `reasons` (counts) where there are any, add up.
    """
    groups: dict[Hashable, list[tuple[dict[str, Any], list[Estimate]]]] = {}
    for group, named, found in rows:
        groups.setdefault(group, []).append((named | {"signs": ""}, found))
    result = []
    for tasks in groups.values():
        result += tasks
        if len(tasks) > 1:
            finite = [found[-1].mean for _, found in tasks if math.isfinite(found[-1].mean)]
            above = sum(mean > 0 for mean in finite)
            named = {
                "task": ALL_TASKS,
                **{name: sum(named[name] for named, _ in tasks) for name in ("num_planned", "num_queries")},
                "signs": f"above 0 in {above} of {counted(len(finite), 'task')}" if finite else "",
            }
            named |= {"reasons": sum((named["reasons"] for named, _ in tasks), Counter())} if "reasons" in tasks[0][0] else {}
            result.append((tasks[0][0] | named, [over_tasks(part) for part in zip(*(found for _, found in tasks), strict=True)]))
    return result


def _t_interval(mean: float, error: float, freedom: float, used: int, replicates: int, is_share: bool) -> Estimate:
    half = float(stats.t.ppf(0.975, freedom)) * error
    lower, upper = mean - half, mean + half
    bounds = (max(lower, 0.0), min(upper, 1.0)) if is_share else (lower, upper)
    return Estimate(mean, *bounds, used, replicates, error, freedom)


def descriptive(rows: pd.DataFrame) -> str:
    """Return what must be said under a table of estimates if some mean of it is over fewer than MIN_SEEDS replicates."""
    fewest = rows.loc[rows["num_used"] > 0, "num_replicates"].min()
    return f" Descriptive: some means are over {counted(int(fewest), 'seed')}, fewer than {MIN_SEEDS}." if fewest < MIN_SEEDS else ""


def simultaneous(values: pd.DataFrame) -> pd.Series:
    """Return half the width of 95 % bands that hold for all rows (layers) at once, by Bonferroni; one column per replicate. NaN below MIN_SEEDS replicates."""
    count = values.count(axis=1)
    num_rows = int((count > 0).sum())
    quantile = stats.t.ppf(1 - 0.025 / max(num_rows, 1), (count - 1).clip(lower=1))
    return (values.std(axis=1, ddof=1) / np.sqrt(count) * quantile).where(count >= MIN_SEEDS)


def holm(values: pd.Series) -> pd.Series:
    """Return Holm's adjusted p-values of a family; NaN is no member of it."""
    family = values.dropna().sort_values()
    adjusted = (family * np.arange(len(family), 0, -1)).cummax().clip(upper=1.0)
    return adjusted.reindex(values.index)


def geometric_mean(values: pd.Series) -> float:
    values = values.dropna()
    return math.nan if values.empty else 0.0 if (values <= 0).any() else float(np.exp(np.log(values).mean()))


def wilson(num_hits: float, num_trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share; `num_hits` may be fractional (a query's average over orders)."""
    z = float(stats.norm.ppf(0.5 + level / 2))
    share, shrink = num_hits / num_trials, 1 + z * z / num_trials
    centre = (share + z * z / (2 * num_trials)) / shrink
    half = z * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2)) / shrink
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))


def square_and_add(groups: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the interval of the mean of the groups' means from each group's Wilson interval; with one group it is Wilson's own."""
    means = [float(group.mean()) for group in groups]
    bounds = [wilson(float(group.sum()), len(group)) for group in groups]
    mean, count = sum(means) / len(means), len(means)
    below = math.sqrt(sum((m - low) ** 2 for m, (low, _) in zip(means, bounds, strict=True))) / count
    above = math.sqrt(sum((high - m) ** 2 for m, (_, high) in zip(means, bounds, strict=True))) / count
    return mean - below, mean + above
