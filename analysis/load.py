"""Read a store into data frames; settings (one section of a report each), means with intervals, selection, labels and captions.

Knows the columns of the results and the statistics allowed on them. Knows nothing of figures or pages.

A mean is over seeds, the orders of a seed averaged first. Its 95 % interval:
- 2 seeds and more: mean +- t(n-1) x sqrt(sd^2 / n + se_query^2), se_query from the per-query values averaged over seeds (by label for balanced
  accuracy; left out for figures that have no value per query);
- 1 seed ("this draw only"): Wilson for an accuracy; for balanced accuracy the labels' Wilson intervals combined by square-and-add (Newcombe; Zou and
  Donner's MOVER): deterministic, inside [0, 1], and not of width zero when a label is always right. Queries are the only source of variation it knows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from iclgd_dist.protocol import Protocol
from iclgd_dist.schema import IDENTITY
from iclgd_dist.store import Store, read_results

BASE = ["model_hash", "storage_dtype", "compute_dtype", "tf32", "task", "protocol", "num_queries", "query_seed"]  # one zero-shot cell each
DRAW = ["num_demonstrations", "seed", "order"]  # with BASE: one in-context cell each
ACCURACIES = ("accuracy", "balanced_accuracy")
BASELINE = ["key", *ACCURACIES, "nll_label", "collapsed", "status"]  # what a finetuned cell carries of its baselines
MATCHED_RATIO = 0.5  # R*, unless a sweep file sets [analysis] matched_ratio
MIN_SEEDS = 5  # below: descriptive
NULL = "\N{EN DASH}"


@dataclass(frozen=True)
class Estimate:
    """A mean over draws and its 95 % interval; NaN where there is none. `used` counts the cells that have a value."""

    mean: float = math.nan
    lower: float = math.nan
    upper: float = math.nan
    used: int = 0

    def __str__(self) -> str:
        return number(self.mean) + (f" [{number(self.lower)}, {number(self.upper)}]" if math.isfinite(self.lower) else "")


@dataclass(frozen=True)
class Frames:
    """The results as pandas tables. `finetuned` holds grid cells only, with zs_* and icl_* of their own baselines."""

    cells: pd.DataFrame
    finetuned: pd.DataFrame
    folds: pd.DataFrame
    layers: pd.DataFrame
    examples: pd.DataFrame
    attempts: pd.DataFrame
    num_cells: int  # of any kind and origin, superseded ones too
    num_planned: int = 0  # distinct keys of all sweep files
    num_missing: int = 0  # planned, not in the store
    sweeps: tuple[Mapping[str, Any], ...] = ()  # resolved
    num_search: int = 0  # cells found by a search: out of curves and of means over the grid
    num_superseded: int = 0  # cells that equal a later one in every named column (an edited template, other data)
    _rows: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)  # key -> positions in examples

    def settings(self) -> list[Setting]:
        """Return one Setting per model, task, k, protocol, queries and train_on, in the order of their titles."""
        columns = [*BASE, "num_demonstrations"]
        found = []
        ratio = float(next((sweep["analysis"]["matched_ratio"] for sweep in reversed(self.sweeps) if "analysis" in sweep), MATCHED_RATIO))
        drawn = self.cells[self.cells["kind"] == "icl"]
        pairs = pd.concat([drawn[columns], self.finetuned[columns]]).drop_duplicates()
        for _, row in pairs.iterrows():
            zero_shot = _like(self.cells[self.cells["kind"] == "zero_shot"], row, BASE)
            icl, finetuned = _like(drawn, row, columns), _like(self.finetuned, row, columns)
            for train_on in finetuned["train_on"].dropna().unique() if len(finetuned) else ["true"]:
                rows = finetuned[finetuned["train_on"] == train_on]
                found.append(Setting(zero_shot, icl, rows, str(train_on), self._num_draws(pd.concat([icl, rows])), ratio))
        return sorted(found, key=lambda setting: (setting.model, *map(setting.named.get, ("task", "k", "train_on"))))

    def _num_draws(self, cells: pd.DataFrame) -> int:
        """Return how many draws (seed and order) a setting has: those in the store and those its sweeps plan."""
        first, found = cells.iloc[0], set(zip(cells["seed"].astype(int), cells["order"].astype(int), strict=True))
        for sweep in self.sweeps:
            is_ours = first["task"] in sweep.get("tasks", ()) and first["model_source"] in [model["source"] for model in sweep["models"]]
            if is_ours and all(first[name] in np.atleast_1d(sweep[name]) for name in ("num_demonstrations", "num_queries", "query_seed")):
                own = sweep.get("per_task", {}).get(first["task"], {}).get("runs") or sweep.get("runs")
                found |= {(seed, order) for seed, order in own or product(sweep["seeds"], range(sweep["orders"]))}
        return len(found)

    def per_query(self, cells: pd.DataFrame, metric: str, fold: str = "all") -> pd.Series:
        """Return the value of each query, averaged over the orders of a seed, then over seeds, under its gold label; undefined values are left out."""
        column = "accuracy" if metric in ACCURACIES else metric
        values, folds, gold, queries = (self.examples[name].to_numpy() for name in (column, "fold", "gold", "query_number"))
        of_seed, labels = [], np.full(queries.max(initial=-1) + 1, -1)
        for _, keys in cells[cells["status"] == "done"].groupby("seed", dropna=False)["key"]:
            at = np.concatenate([self._rows[key] for key in keys if key in self._rows] or [np.array([], dtype=int)])
            at = at[~np.isnan(values[at]) & ((folds[at] == fold) | (fold == "all"))]
            with np.errstate(invalid="ignore"):
                means = np.bincount(queries[at], values[at], minlength=len(labels)) / np.bincount(queries[at], minlength=len(labels))
            of_seed.append(means)
            labels[queries[at]] = gold[at]
        found = pd.DataFrame(of_seed).mean()
        return found.set_axis(labels[: len(found)]).dropna()

    def estimate(self, cells: pd.DataFrame, metric: str, *, fold: str = "all") -> Estimate:
        """Return the mean of a column over the seeds of `cells` (one setting, method, learning rate and step) with its interval."""
        table = cells
        if fold != "all":
            of_fold = self.folds[(self.folds["fold"] == fold) & self.folds["key"].isin(cells["key"])]
            table = of_fold[["key", metric]].merge(cells[["key", "seed"]], on="key")
        per_seed = table.groupby("seed", dropna=False)[metric].mean().dropna()
        if per_seed.empty:
            return Estimate()
        mean, used = float(per_seed.mean()), int(table[metric].notna().sum())
        has_queries = metric in ACCURACIES or metric in self.examples.columns
        per_query = self.per_query(cells, metric, fold) if has_queries else pd.Series(dtype=float)
        groups = [part.to_numpy() for _, part in per_query.groupby(level=0)] if metric == "balanced_accuracy" else [per_query.to_numpy()]
        if len(per_seed) == 1:
            return Estimate(mean, *(square_and_add(groups) if metric in ACCURACIES and len(per_query) else (math.nan, math.nan)), used)
        query_variance = sum(np.var(part, ddof=1) / len(part) for part in groups if len(part) > 1) / len(groups) ** 2 if groups else 0.0
        half = stats.t.ppf(0.975, len(per_seed) - 1) * math.sqrt(per_seed.var(ddof=1) / len(per_seed) + query_variance)
        lower, upper = mean - half, mean + half
        return Estimate(mean, *((max(lower, 0.0), min(upper, 1.0)) if metric in ACCURACIES else (lower, upper)), used)


@dataclass(frozen=True)
class Setting:
    """What one section of a report is about: one model, task, number of demonstrations, protocol and set of queries."""

    zero_shot: pd.DataFrame
    icl: pd.DataFrame
    finetuned: pd.DataFrame
    train_on: str
    num_draws: int  # planned
    matched_ratio: float = MATCHED_RATIO  # R*: where methods are compared at equal size of update

    @property
    def first(self) -> pd.Series:
        return (self.finetuned if len(self.finetuned) else self.icl).iloc[0]

    @property
    def model(self) -> str:
        return ", ".join([str(self.first["model"]), *(self.first["model_notes"] if self.first["model_notes"] is not None else ())])

    @property
    def named(self) -> dict[str, Any]:
        """The columns that name the setting in every table of figures."""
        return {"task": str(self.first["task"]), "model": self.first["model"], "k": int(self.first["num_demonstrations"]), "train_on": self.train_on}

    @property
    def seeds(self) -> list[int]:
        return sorted({int(seed) for seed in [*self.icl["seed"], *self.finetuned["seed"]]})

    @property
    def methods(self) -> list[str]:
        return sorted(self.finetuned["method"].unique(), key=lambda method: (method != "vanilla", method))

    @property
    def last_step(self) -> int:
        return int(self.finetuned["step"].max())

    @property
    def title(self) -> str:
        return f"{self.named['task']}, {self.named['model']}, k = {self.named['k']}" + ("" if self.train_on == "true" else f", trained on {self.train_on}")

    @property
    def caption(self) -> str:
        """What stands under every figure: model, recorded position, sink, separator, queries, seeds."""
        row = self.first
        protocol = json.loads(row["protocol"])
        position = {"last_prompt": "last prompt token", "label": "the first label's token after the prompt"}[protocol["record_position"]]
        switches = Protocol(**{name: value for name, value in protocol.items() if name in Protocol.model_fields}).switches()
        others = "".join(f"; {name}: {value}" for name, value in switches.items() if name not in ("record_position", "sink", "separator"))
        orders = pd.concat([self.icl["order"], self.finetuned["order"]]).nunique()
        return (
            f"{self.model}; stored as {row['storage_dtype']}, computed in {row['compute_dtype']}. Task {self.named['task']}, k = {self.named['k']}"
            + ("" if self.train_on == "true" else f", finetuned on {self.train_on}")
            + f". Recorded position: {position}; sink: {protocol.get('sink_token', protocol['sink'])}; separator: {protocol['separator']}{others}. "
            + f"{int(row['num_queries'])} queries (query seed {int(row['query_seed'])}); {counted(len(self.seeds), 'seed')} ({', '.join(map(str, self.seeds))})"
            + (f", {orders} orders each." if orders > 1 else ".")
        )

    def at(self, method: str, learning_rate: float, step: int) -> pd.DataFrame:
        rows = self.finetuned
        return rows[(rows["method"] == method) & (rows["learning_rate"] == learning_rate) & (rows["step"] == step)]

    def at_last_step(self, method: str) -> pd.DataFrame:
        return self.finetuned[(self.finetuned["method"] == method) & (self.finetuned["step"] == self.last_step)]


@dataclass(frozen=True)
class Selected:
    """A learning rate chosen on one fold at the largest step; `is_edge`: the smallest or largest of its grid."""

    learning_rate: float
    is_edge: bool


def load(store: str | Path) -> Frames:
    """Read a store. Errors: StoreError, as `iclgd_dist.store` raises it."""
    return frames(read_results(store), Store(store).sweeps())


def frames(results: Any, sweeps: Sequence[Mapping[str, Any]] = ()) -> Frames:
    """Turn the Arrow tables of `read_results` and the sweeps' planned keys into Frames."""
    cells = results.cells.to_pandas()
    cells["collapsed"] = cells["collapsed"].eq(True)
    cells["protocol"] = cells["protocol"].map({text: _resolved(text) for text in cells["protocol"].unique()})
    is_search = cells["origin"] == "search"
    named = [name for name, _, _ in IDENTITY if name not in ("key", "model", "model_source", "model_notes", "origin", "sweep")] + ["tf32"]
    grid = cells[~is_search].sort_values("created_at", kind="stable")
    latest = grid[~grid.duplicated(named, keep="last")].sort_values(["model", "task", "method", "learning_rate", "step", "seed", "order"], kind="stable")
    zero_shot, icl = (latest[latest["kind"] == kind] for kind in ("zero_shot", "icl"))
    finetuned = latest[latest["kind"] == "finetuned"]
    for prefix, baseline, on in (("zs_", zero_shot, BASE), ("icl_", icl, BASE + DRAW)):
        finetuned = finetuned.merge(baseline[on + BASELINE].rename(columns=lambda c, p=prefix, o=on: c if c in o else p + c), on=on, how="left", validate="m:1")
    examples = results.examples.drop_columns(["label_scores"]).to_pandas()
    is_right = (examples["prediction"] == examples["gold"]).astype(float)
    examples = examples.assign(query_number=pd.factorize(examples["query"])[0], fold=examples["fold"].astype(object), accuracy=is_right)
    planned = {key for sweep in sweeps for key in sweep["keys"]}
    return Frames(
        cells=latest,
        finetuned=finetuned,
        folds=results.folds.to_pandas(),
        layers=results.layers.to_pandas(),
        examples=examples,
        attempts=results.attempts.to_pandas(),
        num_cells=len(cells),
        num_planned=len(planned),
        sweeps=tuple(sweep.get("resolved", {}) for sweep in sweeps),
        num_missing=len(planned - set(cells["key"])),
        num_search=int(is_search.sum()),
        num_superseded=len(grid) - len(latest),
        _rows=examples.groupby("key").indices,
    )


def _resolved(protocol: str) -> str:
    """Return the protocol with the switches that the version which wrote it did not know: they had their defaults."""
    return json.dumps(Protocol().model_dump() | json.loads(protocol), sort_keys=True)


def select(frames: Frames, setting: Setting, method: str, *, fold: str = "A") -> Selected | None:
    """Return the learning rate with the smallest nll_label on a fold at the largest step, pooled over seeds; the smaller of two equal ones.

    Only learning rates with the most defined draws compete: a mean without the diverged draws would flatter. None if none is defined.
    """
    rows = setting.at_last_step(method)
    of_fold = frames.folds[frames.folds["fold"] == fold][["key", "nll_label"]]
    table = rows[["key", "learning_rate", "seed"]].merge(of_fold, on="key").dropna(subset=["nll_label"])
    if table.empty:
        return None
    counts = table.groupby("learning_rate")["key"].count()
    by_seed = table[table["learning_rate"].isin(counts[counts == counts.max()].index)].groupby(["learning_rate", "seed"])["nll_label"].mean()
    best = float(by_seed.groupby("learning_rate").mean().sort_index().idxmin())
    return Selected(best, best in (rows["learning_rate"].min(), rows["learning_rate"].max()))


def nearest_ratio(setting: Setting, method: str) -> tuple[float, float] | None:
    """Return the learning rate whose R at the largest step (geometric mean over draws) is nearest R*, and that R."""
    rows = setting.at_last_step(method)
    ratios = rows[rows["update_ratio"] > 0].groupby("learning_rate")["update_ratio"].apply(geometric_mean)
    if ratios.empty:
        return None
    best = (np.log(ratios) - math.log(setting.matched_ratio)).abs().idxmin()
    return float(best), float(ratios[best])


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


def square_and_add(groups: list[np.ndarray]) -> tuple[float, float]:
    """Return the interval of the mean of the groups' means from each group's Wilson interval; with one group it is Wilson's own."""
    means = [float(group.mean()) for group in groups]
    bounds = [wilson(float(group.sum()), len(group)) for group in groups]
    mean, count = sum(means) / len(means), len(means)
    below = math.sqrt(sum((m - low) ** 2 for m, (low, _) in zip(means, bounds, strict=True))) / count
    above = math.sqrt(sum((high - m) ** 2 for m, (_, high) in zip(means, bounds, strict=True))) / count
    return mean - below, mean + above


def rate(learning_rate: float) -> str:
    """Return 1e-3, 3e-3, 1.6e-4 ..."""
    if not learning_rate:
        return "0"
    mantissa, exponent = f"{learning_rate:.6e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def number(value: Any, digits: int = 3) -> str:
    """Return a value as text; an en dash where it is undefined."""
    return NULL if value is None or not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def _like(table: pd.DataFrame, row: pd.Series, columns: list[str]) -> pd.DataFrame:
    """Return the rows equal to `row` in the columns; NULL equals NULL."""
    keep = np.ones(len(table), dtype=bool)
    for name in columns:
        keep &= (table[name].isna() if pd.isna(row[name]) else table[name].eq(row[name])).to_numpy(dtype=bool)
    return table[keep]
