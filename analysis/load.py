"""Read stores into data frames: which cells belong together, means over draws, contrasts of cells.

Knows the columns of the results and which cells belong together. Knows nothing of figures or pages; `intervals` says what an interval is.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy.special import softmax

from iclgd_dist.extensions import METHODS
from iclgd_dist.schema import FLOOR_FACTOR, IDENTITY
from iclgd_dist.store import Results, Store, read_results

from .intervals import Estimate, estimate, geometric_mean
from .setting import MATCHED_RATIO, SMALLEST_EFFECT, Setting, resolved, spelled
from .written import check

PRECISION = ["storage_dtype", "compute_dtype", "tf32", "deterministic"]
BASE = ["model_hash", *PRECISION, "init", "init_scheme", "init_seed", "task", "protocol", "num_queries", "query_seed"]
DRAW = ["num_demonstrations", "seed", "order"]  # with BASE, which is one zero-shot cell each: one in-context cell each
SETTING = [*(name for name in BASE if name != "init_seed"), "num_demonstrations"]  # for random weights the seed of the weights is the replicate
ACCURACIES = ("accuracy", "balanced_accuracy")
BASELINE = ["key", *ACCURACIES, "nll_label", "collapsed", "status"]  # what a finetuned cell carries of its baselines
_SCORE_CHANGES = ("sim_am_delta", "sim_am_delta_prefix", "alpha")  # layer 0 holds at most a shift of position
_MEASURES = ("controls", "pairs", "metrics", "extras")
DISTINCT: dict[str, Callable[[Any], str]] = {  # what tells settings of one model apart beside what names them, and how it is written
    "model_hash": lambda value: f"weights {str(value)[:8]}",
    "storage_dtype": lambda value: f"stored as {value}",
    "compute_dtype": lambda value: f"computed in {value}",
    "tf32": lambda value: "TF32" if value else "",
    "deterministic": lambda value: "deterministic" if value else "",
    "query_seed": lambda value: f"query seed {value:.0f}",
}
_NOWHERE = np.array([], dtype=int)


@dataclass(frozen=True)
class Frames:
    """The results as pandas tables. `finetuned` holds grid cells only, with zs_* and icl_* of their own baselines.

    Every cell has a `replicate` (its seed; for random weights the seed of the weights) and a `draw` (weights, seed and order).
    """

    cells: pd.DataFrame
    finetuned: pd.DataFrame
    folds: pd.DataFrame
    layers: pd.DataFrame
    examples: pd.DataFrame
    controls: pd.DataFrame
    pairs: pd.DataFrame
    metrics: pd.DataFrame
    extras: pd.DataFrame
    attempts: pd.DataFrame
    num_cells: int  # of any kind and origin, superseded ones too
    num_planned: int = 0  # distinct keys of all sweep files
    num_missing: int = 0  # planned, not in the store
    sweeps: tuple[Mapping[str, Any], ...] = ()  # resolved
    num_search: int = 0  # cells found by a search: out of curves and of means over the grid
    num_superseded: int = 0  # cells that equal a later one in every named column (an edited template, other data), and those with such a baseline
    _rows: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)  # key -> positions in examples
    _scores: tuple[np.ndarray, np.ndarray] = field(
        default=(np.array([]), np.array([0])), repr=False
    )  # label scores one after the other, where each row's begin

    def settings(self) -> list[Setting]:
        """Return one Setting per model, weights, task, k, protocol, queries and train_on, in the order of their titles."""
        return [*self._settings]

    @cached_property
    def _settings(self) -> tuple[Setting, ...]:
        found = []
        drawn = self.cells[self.cells["kind"] == "icl"]
        pairs = pd.concat([drawn[SETTING], self.finetuned[SETTING]]).drop_duplicates()
        for _, row in pairs.iterrows():
            zero_shot = like(self.cells[self.cells["kind"] == "zero_shot"], row, SETTING[:-1])
            icl, finetuned = like(drawn, row, SETTING), like(self.finetuned, row, SETTING)
            for train_on in finetuned["train_on"].dropna().unique() if len(finetuned) else ["true"]:
                rows = finetuned[finetuned["train_on"] == train_on]
                cells = rows if len(rows) else icl
                planned = [(sweep.get("analysis", {}), draws) for sweep in self.sweeps if (draws := planned_draws(sweep, cells.iloc[0], str(train_on)))]
                every = frozenset(cells["draw"]).union(*(draws for _, draws in planned))
                found.append(Setting(zero_shot, icl, rows, str(train_on), every, **_registered([analysis for analysis, _ in planned])))
        place = ("task", "k", "init", "protocol", "variant")
        told = told_apart(found)
        return tuple(
            sorted(
                told,
                key=lambda setting: (setting.model, *map(setting.named.get, place), setting.train_on != "true", setting.train_on, setting.named["num_queries"]),
            )
        )

    def positions(self, key: str) -> np.ndarray:
        """Return where the queries of a cell stand in `examples`, in the order drawn; nothing for a cell that diverged."""
        return self._rows.get(key, _NOWHERE)

    def probabilities(self, key: str, fold: str = "all") -> tuple[np.ndarray, np.ndarray]:
        """Return a cell's label-normalised probabilities (Q, C) of a fold's queries, in the order drawn, and their gold labels (Q,)."""
        at, (flat, begins) = self._of_fold(key, fold), self._scores
        scores = np.stack([flat[begins[row] : begins[row + 1]] for row in at]) if len(at) else np.empty((0, 0))
        return softmax(scores, axis=1) if len(at) else scores, self.examples["gold"].to_numpy()[at]

    def asked(self, key: str, fold: str = "all") -> tuple[int, ...]:
        """Return what names the queries of a cell, in the order of `probabilities`."""
        return tuple(self.examples["query_number"].to_numpy()[self._of_fold(key, fold)])

    def _of_fold(self, key: str, fold: str) -> np.ndarray:
        at = self.positions(key)
        return at[(self.examples["fold"].to_numpy()[at] == fold) | (fold == "all")]

    def figures(self, keys: pd.Series, metric: str, fold: str = "all") -> pd.Series:
        """Return a figure of each cell on a fold, by key: the row's own, or the mean over its layers where the row has none for the fold."""
        if fold == "all":
            return pd.Series(self.cells[metric].to_numpy(), index=self.cells["key"]).reindex(keys)
        table = self.folds if metric in self.folds else self.layers
        rows = table[(table["fold"] == fold) & table["key"].isin(keys)]
        found = rows.set_index("key")[metric] if table is self.folds else self._over_layers(rows, ["key"], metric, metric)
        return found.rename(index=str).reindex(keys)

    def measured(self, measures: pd.DataFrame, metric: str, fold: str = "all") -> pd.Series:
        """Return a figure of `controls`, `pairs` or `metrics` by cell and by name (control, other cell, version): the mean over layers."""
        rows = measures[(measures["metric"] == metric) & (measures["fold"] == fold)]
        return self._over_layers(rows, list(measures.columns[:2]), metric, "mean")

    def counted(self, rows: pd.DataFrame, cell: str, metric: str) -> pd.DataFrame:
        """Return the rows by layer that a mean over layers is of: of a change of scores not layer 0, unless the protocol counts it. `cell`: the column of keys."""
        if metric not in _SCORE_CHANGES:
            return rows
        counting = self.cells.loc[self.cells["protocol"].str.contains('"first_layer": ?"count"'), "key"]
        return rows[rows["layer"].ne(0) | rows[cell].isin(counting)]

    def _over_layers(self, rows: pd.DataFrame, by: list[str], metric: str, value: str) -> pd.Series:
        rows = self.counted(rows, by[0], metric)
        if metric == "update_ratio":  # a metric of one's own cannot have that name
            moved = rows[~pd.MultiIndex.from_arrays([rows[by[0]].astype(str), rows["layer"]]).isin(self._still)]
            means = moved.groupby(by, observed=True)[value].agg(geometric_mean)
            return means.reindex(rows.groupby(by, observed=True)[value].first().index, fill_value=0.0)
        return rows.groupby(by, observed=True)[value].mean()

    def per_query(self, terms: pd.DataFrame, metric: str, fold: str = "all") -> pd.Series:
        """Return the contrast of each query, averaged over the draws of a replicate, then over replicates, under its gold label; undefined ones are left out."""
        column = "accuracy" if metric in ACCURACIES else metric
        values, folds, gold, queries = (self.examples[name].to_numpy() for name in (column, "fold", "gold", "query_number"))
        size = queries.max(initial=-1) + 1
        labels, totals = np.full(size, -1), defaultdict[tuple[str, str], np.ndarray](lambda: np.zeros(size))
        for key, weight, replicate, draw in terms[["key", "weight", "replicate", "draw"]].itertuples(index=False):
            at = self.positions(key)
            at = at[(folds[at] == fold) | (fold == "all")]
            line = np.full(size, math.nan)
            line[queries[at]], labels[queries[at]] = values[at], gold[at]
            totals[str(replicate), draw] += weight * line
        of_replicate = defaultdict[str, list[np.ndarray]](list)
        for (replicate, _), total in totals.items():
            of_replicate[replicate].append(total)
        if not of_replicate:
            return pd.Series(dtype=float)
        found = _mean([_mean(draws) for draws in of_replicate.values()])
        is_there = ~np.isnan(found)
        return pd.Series(found[is_there], index=labels[is_there])

    def contrast(self, terms: pd.DataFrame, metric: str, *, fold: str = "all", values: pd.Series | None = None) -> Estimate:
        """Return the mean over replicates of sum(weight x figure) within a draw, with its interval; a draw that lacks a figure has none.

        `terms`: key, weight, draw and replicate. `values` (by key) stand in for the cells' own figures and have no value per query.
        """
        found = self.by_replicate(terms, self.figures(terms["key"].drop_duplicates(), metric, fold) if values is None else values)
        if found.empty:
            return Estimate()
        has_queries = values is None and (metric in ACCURACIES or metric in self.examples.columns)
        per_query = self.per_query(terms, metric, fold) if has_queries else pd.Series(dtype=float)
        by_label = metric == "balanced_accuracy"
        groups = _groups(per_query, by_label)
        sides = [terms[terms["weight"] > 0], terms[terms["weight"] < 0]]
        if has_queries and all(map(len, sides)):
            of_sides = [self.per_query(side, metric, fold) for side in sides]
            if len(per_query) < max(map(len, of_sides)) and len({frozenset(q for key in side["key"] for q in self.asked(key, fold)) for side in sides}) > 1:
                # Not the same queries: the variances of the two sides add up, and `estimate` divides by the groups.
                groups = [2 * values for side in of_sides for values in _groups(side, by_label)]
        is_share = values is None and metric in ACCURACIES and bool((terms["weight"] > 0).all())
        return estimate(found["mean"], used=int(found["count"].sum()), groups=groups, is_share=is_share)

    @cached_property
    def _still(self) -> pd.MultiIndex:
        """The layers of cells that finetuning changes by no more than 10 x the noise floor: R is a mean over the others."""
        rows = self.layers[(self.layers["fold"] == "all") & (self.layers["update_norm"] <= FLOOR_FACTOR * self.layers["noise_floor"])]
        return pd.MultiIndex.from_arrays([rows["key"].astype(str), rows["layer"]])

    @staticmethod
    def by_replicate(terms: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
        """Return per replicate the mean of sum(weight x value) over its draws, and how many have one."""
        replicates, numbers = np.unique(terms["replicate"].to_numpy(dtype=float), return_inverse=True)  # those without a seed are one
        totals = defaultdict[tuple[int, str], float](float)
        for weight, value, number, draw in zip(terms["weight"], terms["key"].map(values), numbers, terms["draw"], strict=True):
            totals[number, draw] += weight * value  # NaN where a figure is missing
        found: list[list[float]] = [[] for _ in replicates]
        for (number, _), total in totals.items():
            found[number].extend([] if math.isnan(total) else [total])
        counts = np.array([len(of) for of in found], dtype=int)
        means = np.array([math.fsum(of) / max(len(of), 1) for of in found])
        table = pd.DataFrame({"mean": means, "count": counts}, index=pd.Index(replicates, name="replicate"))
        return table[counts > 0]

    def estimate(self, cells: pd.DataFrame, metric: str, *, fold: str = "all", values: pd.Series | None = None) -> Estimate:
        """Return the mean of a figure over `cells` (one setting, method, learning rate and step) with its interval."""
        return self.contrast(each(cells), metric, fold=fold, values=values)


def of_most_queries(settings: Iterable[Setting]) -> list[Setting]:
    """Return one of each group of settings that differ in nothing but their queries: that of most, as the same draws must not count twice."""
    found: dict[tuple[str, ...], Setting] = {}
    for setting in settings:
        place = (*setting.first[[name for name in SETTING if name != "num_queries"]].astype(str), setting.train_on)
        if place not in found or setting.first["num_queries"] > found[place].first["num_queries"]:
            found[place] = setting
    return list(found.values())


def load(*stores: str | Path) -> Frames:
    """Read stores, several as one: a cell that two of them hold counts once. Errors: StoreError, as `iclgd_dist.store` raises it."""
    parts, sweeps = [read_results(store) for store in stores], [Store(store).sweeps() for store in stores]
    for part, of_part, store in zip(parts, sweeps, stores, strict=True):
        check(part, of_part, store)
    every = sorted((sweep for of_part in sweeps for sweep in of_part), key=lambda sweep: str(sweep.get("created_at", "")))
    return frames(_together(parts) if len(parts) > 1 else parts[0], every)


def _together(parts: Sequence[Results]) -> Results:
    seen = pa.array([], pa.string())
    tables: dict[str, list[pa.Table]] = {name.name: [] for name in fields(Results)}
    for part in parts:
        for name, found in tables.items():
            table: pa.Table = getattr(part, name)
            is_old = pc.is_in(table[0].cast(pa.string()), seen)  # the first column of all but attempts is the cell's key
            found.append(table if name in ("attempts", *_MEASURES) else table.filter(pc.invert(is_old)))
        seen = pa.chunked_array([*pa.chunked_array([seen]).chunks, *part.cells["key"].chunks]).combine_chunks()
    whole = {name: pa.concat_tables(found).unify_dictionaries() for name, found in tables.items()}
    for name in _MEASURES:  # a later store may have measured what an earlier one holds: each figure counts once
        figures = whole[name]
        called = [column for column in figures.column_names if column not in ("n", "mean", "sd")]
        numbered = figures.append_column("row", pa.array(range(len(figures)), pa.int64()))
        rows = numbered.group_by(called, use_threads=False).aggregate([("row", "min")])["row_min"].combine_chunks()
        whole[name] = figures.take(rows.sort())
    return Results(**whole)


def frames(results: Any, sweeps: Sequence[Mapping[str, Any]] = (), *, with_search: bool = False) -> Frames:
    """Turn the Arrow tables of `read_results` and the sweeps, the oldest first, into Frames. `with_search`: keep what a search found among the cells."""
    sweeps = [sweep for sweep in sweeps if sweep.get("kind", "grid") == "grid"]
    planned = {key for sweep in sweeps for key in sweep["keys"]}
    cells = results.cells.to_pandas()
    cells["collapsed"] = cells["collapsed"].eq(True)
    cells["protocol"] = cells["protocol"].map({text: resolved(text) for text in cells["protocol"].unique()})
    cells["init"], cells["deterministic"] = cells["init"].fillna("trained"), cells["deterministic"].eq(True)  # a store older than the columns
    cells["replicate"] = cells["init_seed"].where(cells["init"] != "trained", cells["seed"])
    cells["draw"] = [draw_of(*draw) for draw in cells[["init_seed", "seed", "order"]].itertuples(index=False)]
    cells["method"] = _labels(cells)
    is_search = (cells["origin"] == "search") & ~cells["key"].isin(planned) & (not with_search)
    named = [name for name, _, _ in IDENTITY if name not in ("key", "model", "model_source", "model_notes", "num_context_demonstrations", "origin", "sweep")]
    grid = cells[~is_search].sort_values("created_at", kind="stable")
    is_old = grid.duplicated(named, keep="last")
    latest = grid[~is_old & ~_is_of_old_baselines(grid, is_old, sweeps)].sort_values(
        ["model", "task", "method", "learning_rate", "step", "init_seed", "seed", "order"], kind="stable"
    )
    zero_shot, icl = (latest[latest["kind"] == kind] for kind in ("zero_shot", "icl"))
    finetuned = latest[latest["kind"] == "finetuned"]
    for prefix, baseline, on in (("zs_", zero_shot, BASE), ("icl_", icl, BASE + DRAW)):
        finetuned = finetuned.merge(baseline[on + BASELINE].rename(columns=lambda c, p=prefix, o=on: c if c in o else p + c), on=on, how="left", validate="m:1")
    examples = results.examples.drop_columns(["label_scores"]).to_pandas()
    scores = results.examples["label_scores"].combine_chunks()
    begins = np.concatenate([[0], pc.fill_null(pc.list_value_length(scores), 0).to_numpy().cumsum()])
    is_right = (examples["prediction"] == examples["gold"]).astype(float)
    examples = examples.assign(query_number=pd.factorize(examples["query"])[0], fold=examples["fold"].astype(object), accuracy=is_right)
    return Frames(
        cells=latest,
        finetuned=finetuned,
        folds=results.folds.to_pandas(),
        layers=results.layers.to_pandas(),
        examples=examples,
        controls=_coded(results.controls),
        pairs=_coded(results.pairs),
        metrics=_coded(results.metrics),
        extras=_coded(results.extras),
        attempts=results.attempts.to_pandas(),
        num_cells=len(cells),
        num_planned=len(planned),
        sweeps=tuple(sweep.get("resolved", {}) for sweep in sweeps),
        num_missing=len(planned - set(cells["key"])),
        num_search=int(is_search.sum()),
        num_superseded=len(grid) - len(latest),
        _rows=examples.groupby("key").indices,
        _scores=(pc.list_flatten(scores).to_numpy(), begins),
    )


def _is_of_old_baselines(grid: pd.DataFrame, is_old: pd.Series, sweeps: Sequence[Mapping[str, Any]]) -> pd.Series:
    """Return which cells no sweep plans but those whose own baseline was superseded: an edited template makes other cells of everything."""
    found = pd.Series(data=False, index=grid.index)
    for kind, place in (("zero_shot", BASE), ("icl", BASE + DRAW)):
        for _, row in grid[is_old & grid["kind"].eq(kind)].iterrows():
            with_it = [set(sweep["keys"]) for sweep in sweeps if row["key"] in sweep["keys"]]
            others = set().union(*(sweep["keys"] for sweep in sweeps if row["key"] not in sweep["keys"]))
            keys = set().union(*with_it) - others
            found.loc[like(grid[grid["kind"].ne("zero_shot") & grid["key"].isin(keys)], row, place).index] = True
    return found


def _mean(lines: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of equally long arrays, place by place, over those that have a number there; NaN where none has."""
    values = np.stack(lines)
    counts = (~np.isnan(values)).sum(0)
    return np.where(counts > 0, np.nansum(values, axis=0) / np.maximum(counts, 1), math.nan)


def _groups(per_query: pd.Series, by_label: bool) -> list[np.ndarray]:
    return [part.to_numpy() for _, part in per_query.groupby(level=0)] if by_label else [per_query.to_numpy()]


def _coded(table: pa.Table) -> pd.DataFrame:
    """Return a long table whose texts are categories: a text is held once."""
    texts = [name for name in table.column_names if pa.types.is_string(table[name].type)]
    for name in texts:
        table = table.set_column(table.column_names.index(name), name, table[name].dictionary_encode())
    return table.to_pandas()


def _labels(cells: pd.DataFrame) -> pd.Series:
    """Return the methods' names; where one name stands for several sets of options, with them."""
    options = cells["method_options"].fillna("")
    is_shared = options.groupby(cells["method"]).transform("nunique") > 1
    return cells["method"].where(~is_shared | (options == ""), cells["method"] + " (" + options.map(spelled) + ")")


def draw_of(init_seed: float | None, seed: float | None, order: float | None) -> str:
    """Return what names a draw: seed and order, after the seed of random weights."""
    return "/".join("" if value is None or math.isnan(value) else f"{value:.0f}" for value in (init_seed, seed, order))


def planned_draws(sweep: Mapping[str, Any], cell: pd.Series, train_on: str = "true") -> set[str]:
    """Return the draws that a resolved sweep plans for the setting of a cell; none if it plans other settings."""
    protocol, task = json.loads(cell["protocol"]), cell["task"]
    if train_on not in sweep.get("controls", {}).get("train_on", ("true",)):
        return set()
    planned = sweep.get("protocols") or [sweep.get("protocol", {})]
    if task not in sweep.get("tasks", ()) or not any(all(protocol.get(name, value) == value for name, value in each.items()) for each in planned):
        return set()
    has_all = cell["num_queries"] == sweep["num_queries"] or (cell["num_queries"] < sweep["num_queries"] and cell["sweep"] == sweep["name"])  # a small pool
    if not has_all or cell["query_seed"] != sweep["query_seed"] or cell["num_demonstrations"] not in np.atleast_1d(sweep["num_demonstrations"]):
        return set()
    models = [model for model in sweep["models"] if (model["source"], model.get("init", "trained")) == (cell["model_source"], cell["init"])]
    models = [model for model in models if pd.isna(cell["init_scheme"]) or cell["init_scheme"] == model.get("init_scheme")]
    runs = sweep.get("per_task", {}).get(task, {}).get("runs") or sweep.get("runs") or list(product(sweep["seeds"], range(sweep["orders"])))
    return {draw_of(init_seed, *run) for model in models for init_seed in model.get("init_seeds") or (None,) for run in runs}


def _registered(planned: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return R* and the smallest effect as the oldest sweep file set them, before its run, and whether a later one sets others."""
    said = [(of.get("matched_ratio", MATCHED_RATIO), of.get("smallest_effect", SMALLEST_EFFECT)) for of in planned] or [(MATCHED_RATIO, SMALLEST_EFFECT)]
    return {"matched_ratio": float(said[0][0]), "smallest_effect": float(said[0][1]), "is_amended": len({*said}) > 1}


def told_apart(settings: Sequence[Setting]) -> list[Setting]:
    """Return the settings with what tells those of one model apart that are alike in all that names them, and with the methods of one's own in all of them."""
    values: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for setting in settings:
        for name in DISTINCT:
            values[setting.named["model"], name].add(setting.first[name])
    found = []
    own = tuple(sorted({method for setting in settings for method in setting.methods} - {*METHODS}))
    for setting in settings:
        said = (spell(setting.first[name]) for name, spell in DISTINCT.items() if len(values[setting.named["model"], name]) > 1)
        found.append(replace(setting, variant=", ".join(filter(None, said)), own_methods=own))
    names = Counter(setting.title for setting in found)
    return [replace(setting, has_twin=names[setting.title] > 1) for setting in found]


def each(cells: pd.DataFrame) -> pd.DataFrame:
    """Return cells as terms of a contrast, each with weight 1."""
    return cells[["key", "draw", "replicate"]].assign(weight=1.0)


def like(table: pd.DataFrame, row: pd.Series, columns: Sequence[str]) -> pd.DataFrame:
    """Return the rows equal to `row` in the columns; NULL equals NULL."""
    keep = np.ones(len(table), dtype=bool)
    for name in columns:
        keep &= (table[name].isna() if pd.isna(row[name]) else table[name].eq(row[name])).to_numpy(dtype=bool)
    return table[keep]
