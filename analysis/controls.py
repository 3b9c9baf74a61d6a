"""What unrelated contexts, trainings and weights score: each stands beside ICL, for ICL itself and for each method.

A similarity says something of the task only where it exceeds that of changes that know nothing of it.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from .chosen import Choice, choices
from .intervals import descriptive, estimate, geometric_mean
from .load import SETTING, Frames, each, like, load
from .setting import Setting
from .text import Grid, entry, number, rate, show, stores

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
TITLE, EDGE = "Controls", " (edge of the grid: extend the grid)"
NOTE = (
    "Cosine (sim_aou) of a change with the change that each context makes, mean over layers, mean over draws at the largest step. In-context: ICL's own "
    "change. Selected: the learning rate with the smallest nll_label on fold A, on fold B; nearest R*: all queries. Brackets: 95 % interval over seeds, with "
    "the queries' share where a figure has a value per query (in-context, trained on). n/N: draws used of draws planned. The other similarities stand in figures/controls.csv."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per metric, method (icl: ICL's own change) and what its change is compared with; nothing if the store has no controls of the setting."""
    of_setting = frames.controls[frames.controls["cell"].isin([*setting.icl["key"], *setting.finetuned["key"]])]
    variants = like(frames.finetuned, setting.first, SETTING)
    if setting.train_on != "true" or (of_setting.empty and (variants["train_on"] == "true").all()):  # the variants stand beside the true one
        return pd.DataFrame()
    rows: list[dict[str, Any]] = []
    for metric in METRICS:
        for name, values in by_name(frames, of_setting, setting.icl["key"], metric, "all").items():
            rows.append({"method": "icl", "fold": "all", "metric": metric, "against": name} | frames.estimate(setting.icl, metric, values=values).columns)
    for choice in choices(frames, setting):
        named = {"choice": choice.name, "method": choice.method, "learning_rate": choice.learning_rate, "is_edge": choice.is_edge, "fold": choice.fold}
        same = variants[
            (variants["method"] == choice.method)
            & (variants["learning_rate"] == choice.learning_rate)
            & (variants["step"] == setting.last_step_of(choice.method))
        ]
        for metric in METRICS:
            rows += [named | {"metric": metric} | row for row in _finetuned(frames, of_setting, choice, same, metric)]
    return pd.DataFrame([setting.named | row | {"num_planned": setting.num_draws} for row in rows])


def _finetuned(frames: Frames, of_setting: pd.DataFrame, choice: Choice, variants: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    cells, named = choice.cells, by_name(frames, of_setting, choice.cells["key"], metric, choice.fold)
    found = {ICL: frames.estimate(cells, metric, fold=choice.fold)}
    found |= {name: frames.estimate(cells, metric, values=values) for name, values in named.items()}
    for train_on, part in variants[variants["train_on"] != "true"].groupby("train_on"):
        found[f"{TRAINED_ON}{train_on}"] = frames.estimate(part, metric, fold=choice.fold)
    teach_nothing = [name for name in named if kind_of(name) in EMPTY]
    if set(EMPTY) <= {kind_of(name) for name in teach_nothing}:
        empty = pd.DataFrame({name: frames.by_replicate(each(cells), named[name])["mean"] for name in teach_nothing}).max(axis=1, skipna=False)
        own = frames.by_replicate(each(cells), frames.figures(cells["key"], metric, choice.fold))
        found[TASK_SPECIFIC] = estimate(own["mean"] - empty, used=int(own["count"].reindex(empty.dropna().index).sum()))
    random_R = geometric_mean(by_name(frames, of_setting, cells["key"], "update_ratio", choice.fold).get(RANDOM_DELTA, pd.Series(dtype=float)))
    return [{"against": name, "R": random_R if name == RANDOM_DELTA else choice.R} | value.columns for name, value in found.items()]


def by_name(frames: Frames, of_setting: pd.DataFrame, keys: pd.Series, metric: str, fold: str) -> dict[str, pd.Series]:
    """Return the cells' figures of each control, by key, in the order of MEANING; the draws of random weights as one."""
    values = frames.measured(of_setting[of_setting["cell"].isin(keys)], metric, fold)
    names = values.index.get_level_values("control").astype(str).str.replace(rf"^{RANDOM_DELTA}_\d+$", RANDOM_DELTA, regex=True)
    means = values.groupby([names, values.index.get_level_values("cell").astype(str)]).mean()
    return {name: means[name] for name in sorted(set(names), key=_rank)}


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
    shown = rows[rows["metric"] == METRICS[0]].fillna({"choice": "", "learning_rate": 0.0, "is_edge": False})
    columns = shown[["method", "choice", "learning_rate", "is_edge"]].drop_duplicates().to_dict("records")
    at = {(row["method"], row["choice"], row["against"]): row for row in shown.to_dict("records")}
    body = []
    for name in ("R", *sorted(shown["against"].unique(), key=_rank)):
        found = [at.get((column["method"], column["choice"], ICL if name == "R" else name), {}) for column in columns]
        if name in ("R", RANDOM_DELTA):
            what = "size of the change, to ICL's" if name == "R" else "its R, to be within 5 % of R"
            body.append([name, *(number(row.get("R"), 2) for row in found), what])
        if name != "R":
            body.append([name, *map(entry, found), MEANING.get(kind_of(name), "")])
    headers = ["in-context" if not c["choice"] else f"{c['method']} {c['choice']} {rate(c['learning_rate'])}{EDGE if c['is_edge'] else ''}" for c in columns]
    note = f"{setting.caption} {NOTE}{descriptive(shown)}"
    return [Grid(f"{TITLE}: {setting.title}", ("compared with", *headers, "what it is"), body, note)]


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
