"""What unrelated contexts, trainings and weights score: each stands beside ICL, for ICL itself and for each method.

A similarity says something of the task only where it exceeds that of changes that know nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import numpy as np
import pandas as pd

from iclgd_dist.axes import Context

from .crossing import Pick, crossfit, picks
from .intervals import Estimate, descriptive, estimate, geometric_mean
from .load import SETTING, Frames, each, like, load
from .setting import Setting
from .text import EDGE_NOTE, Grid, entry, marked, number, show, stores

METRICS = ("sim_aou", "sim_aou_norm", "sim_am_delta")
ICL, TASK_SPECIFIC, RANDOM_DELTA, TRAINED_ON = "in-context", "task_specific", "random_delta", "trained on "
EMPTY = ("other_task", "shuffled_words", "separator")  # contexts that teach nothing of the task
MEANING = {
    ICL: "the k demonstrations themselves",
    "other_draw": "k other demonstrations of the task: as similar as ICL is to itself",
    "random_labels": "the same demonstrations, labels drawn at random",
    "flipped_labels": "the same demonstrations, every label the next one",
    "other_task": "k demonstrations of another task",
    "shuffled_words": "the demonstrations' words in random order",
    "separator": "one separator",
    "shifted": "no context, at the positions that the query has in ICL",
    "other_query": "ICL's change of the next query",
    "centred": "ICL's and finetuning's change, each minus its mean over the fold",
    RANDOM_DELTA: "random weights of the same effect instead of the trained ones",
    "trained on random_labels": "trained on random labels; ICL keeps the true ones",
    "trained on other_task": "trained on another task; ICL keeps this one",
    "trained on shuffled_words": "trained on shuffled words; ICL keeps the true ones",
    TASK_SPECIFIC: "in-context minus the largest of other_task, shuffled_words and separator, taken in each seed",
}
TITLE = "Controls"
NOTE = (
    "Cosine (sim_aou) of a change with the change that each context makes, mean over layers, mean over draws at the largest step. In-context: ICL's own "
    "change. Selected: the learning rate with the smallest nll_label on one fold, shown on the other, folds swapped and averaged; nearest R*: all queries. Brackets: 95 % interval over seeds, with "
    "the queries' share where a figure has a value per query (in-context, trained on), from above in task_specific. n/N: draws used of draws planned. The other similarities stand in figures/controls.csv."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per metric, method (icl: ICL's own change) and what its change is compared with; nothing if the store has no controls of the setting."""
    of_setting = frames.controls[frames.controls["cell"].isin([*setting.icl["key"], *setting.finetuned["key"]])]
    variants = like(frames.finetuned, setting.first, SETTING)
    if setting.train_on != "true" or (of_setting.empty and (variants["train_on"] == "true").all()):  # the variants stand beside the true one
        return pd.DataFrame()
    rows: list[dict[str, Any]] = []
    icl = {"choice": "", "method": "icl", "learning_rates": "", "is_edge": False, "fold": "all"}
    for metric in METRICS:
        for name, values in by_name(frames, of_setting, setting.icl["key"], metric, "all").items():
            rows.append(icl | {"metric": metric, "against": name} | frames.estimate(setting.icl, metric, values=values).columns)
    for pick in picks(frames, setting):
        named = {"choice": pick.name, "method": pick.method, "learning_rates": pick.rates, "is_edge": pick.is_edge, "fold": pick.fold}
        same = variants[(variants["method"] == pick.method) & (variants["step"] == setting.last_step_of(pick.method))]
        of_pick = of_setting[of_setting["cell"].isin([key for terms in pick.terms.values() for key in terms["key"]])]
        for metric in METRICS:
            rows += [named | {"metric": metric} | row for row in _finetuned(frames, of_pick, pick, same, metric)]
    return pd.DataFrame([setting.named | row | {"num_planned": setting.num_draws} for row in rows])


def _finetuned(frames: Frames, of_pick: pd.DataFrame, pick: Pick, variants: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    nothing, ratios = pd.Series(dtype=float), dict[str, float]()  # R of what is not the cell itself
    named = {fold: by_name(frames, of_pick, terms["key"], metric, fold) for fold, terms in pick.terms.items()}
    found = {ICL: crossfit(frames, pick.terms, metric)}
    for name in dict.fromkeys(name for of_fold in named.values() for name in of_fold):
        found[name] = crossfit(frames, pick.terms, metric, figures={fold: of_fold.get(name, nothing) for fold, of_fold in named.items()})
    for train_on, part in variants[variants["train_on"] != "true"].groupby("train_on"):
        trained = {fold: each(part[part["learning_rate"] == learning_rate]) for fold, learning_rate in pick.learning_rates.items()}
        found[f"{TRAINED_ON}{train_on}"] = crossfit(frames, trained, metric)
        ratios[f"{TRAINED_ON}{train_on}"] = geometric_mean(
            part.set_index("key")["update_ratio"].reindex([key for terms in trained.values() for key in terms["key"]])
        )
    if one := task_specific(frames, pick.terms, named, metric):
        found[TASK_SPECIFIC] = one
    randoms = [by_name(frames, of_pick, terms["key"], "update_ratio", fold).get(RANDOM_DELTA, nothing) for fold, terms in pick.terms.items()]
    ratios[RANDOM_DELTA] = geometric_mean(pd.concat(randoms))
    return [{"against": name, "R": ratios.get(name, pick.R)} | value.columns for name, value in found.items()]


def task_specific(frames: Frames, terms: Mapping[str, pd.DataFrame], named: Mapping[str, Mapping[str, pd.Series]], metric: str) -> Estimate | None:
    """Return the similarity with ICL's change less the largest with a context that teaches nothing, taken in each seed; None where one of these is missing.

    `terms` and `named` (of `by_name`) by the fold that reports; the folds are averaged.
    """
    gaps, counts, variances = [], [], []
    for fold, part in terms.items():
        names = [name for name in named[fold] if kind_of(name) in EMPTY]
        if {kind_of(name) for name in names} != set(EMPTY):
            return None
        values = pd.DataFrame({name: frames.by_replicate(part, named[fold][name])["mean"] for name in names})
        of_kind = values.T.groupby(kind_of).max().T  # of two other tasks, those that a seed has
        largest = of_kind.max(axis=1, skipna=False)
        own = frames.by_replicate(part, frames.figures(part["key"].drop_duplicates(), metric, fold))
        gaps.append((own["mean"] - largest).dropna())
        counts.append(own["count"])
        variances.append(_query_variance(frames, part, names, metric, fold))
    means = pd.concat(gaps, axis=1).dropna().mean(axis=1)
    used = min(int(count.reindex(means.index).sum()) for count in counts)
    return estimate(means, used=used, query_variance=sum(variances) / len(variances) ** 2)


def _query_variance(frames: Frames, terms: pd.DataFrame, names: Sequence[str], metric: str, fold: str) -> float:
    """Return the queries' share of the variance of a figure less the largest of some contexts', from above: as if the two did not go together over queries, as they do.

    A context's figures are kept by layer, without those of each query: the variance of a mean over layers, and over draws, is at most the mean of theirs.
    """
    if metric not in frames.examples.columns:
        return 0.0
    own = frames.per_query(terms, metric, fold)
    rows = frames.controls[frames.controls["cell"].isin(terms["key"]) & frames.controls["control"].isin(names)]
    rows = frames.counted(rows[rows["metric"].eq(metric) & rows["fold"].eq(fold) & rows["mean"].notna() & rows["sd"].notna()], "cell", metric)
    table = pd.DataFrame({"name": rows["control"].astype(str), "share": rows["sd"] ** 2 / rows["n"]})
    table["weight"] = rows["cell"].astype(str).map(terms.groupby("key")["weight"].mean())
    of_names = [np.average(part["share"], weights=part["weight"]) for _, part in table.groupby("name")]
    return (float(own.var(ddof=1)) / len(own) if len(own) > 1 else 0.0) + float(max(of_names, default=0.0))


def by_name(frames: Frames, of_setting: pd.DataFrame, keys: pd.Series, metric: str, fold: str) -> dict[str, pd.Series]:
    """Return the cells' figures of each control, by key, in the order of MEANING; the draws of random weights as one."""
    rows = of_setting[of_setting["cell"].isin(keys)]
    values = frames.measured(rows, metric, fold)
    if metric == "update_ratio":  # random weights that did not come within 5 % of the cell's have theirs, and no similarity
        values = values[frames.measured(rows, METRICS[0], fold).reindex(values.index).notna()]
    names = values.index.get_level_values("control").astype(str).str.replace(rf"^{RANDOM_DELTA}_\d+$", RANDOM_DELTA, regex=True)
    means = values.groupby([names, values.index.get_level_values("cell").astype(str)]).mean()
    return {name: means[name] for name in sorted(set(names), key=_rank)}


def contexts(frames: Frames, settings: Iterable[Setting]) -> list[str]:
    """Return the kinds of control contexts that some settings were held against."""
    keys = [key for setting in settings for key in (*setting.icl["key"], *setting.finetuned["key"])]
    names = frames.controls.loc[frames.controls["cell"].isin(keys), "control"].unique()
    return [name for name in get_args(Context) if name in set(map(kind_of, names))]


def kind_of(name: str) -> str:
    """Return what kind of control it is: other_task:trec is an other_task."""
    return name.partition(":")[0]


def _rank(name: str) -> tuple[int, str]:
    names = list(MEANING)
    return names.index(kind_of(name)) if kind_of(name) in names else len(names), name


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return the table of a setting: what is compared, ICL's own change, each method at its two learning rates."""
    if rows.empty:
        return []
    shown = rows[rows["metric"] == METRICS[0]]
    columns = shown[["method", "choice", "learning_rates", "is_edge"]].drop_duplicates().to_dict("records")
    at = {(row["method"], row["choice"], row["against"]): row for row in shown.to_dict("records")}
    body = []
    for name in ("R", *sorted(shown["against"].unique(), key=_rank)):
        found = [at.get((column["method"], column["choice"], ICL if name == "R" else name), {}) for column in columns]
        if name in ("R", RANDOM_DELTA):
            what = "size of the change, to ICL's" if name == "R" else "its R, to be within 5 % of R"
            body.append([name, *(number(row.get("R"), 2) for row in found), what])
        if name != "R":
            body.append([name, *map(entry, found), MEANING.get(kind_of(name), "")])
    headers = ["in-context" if not c["choice"] else f"{c['method']} {c['choice']} {marked(c)}" for c in columns]
    note = f"{setting.caption} {NOTE}{EDGE_NOTE}{descriptive(shown)}"
    return [Grid(f"{TITLE}: {setting.title}", ("compared with", *headers, "what it is"), body, note)]


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
