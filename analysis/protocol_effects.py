"""How far similarities move when the protocol changes: `reference`, and each single switch, against `clean`, paired by seed."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from .chosen import difference
from .intervals import ALL_TASKS, descriptive, with_all_tasks
from .load import SETTING, Frames, each, load, of_most_queries
from .setting import CLEAN, Setting, called
from .text import Grid, entry, number, rate, show, stores

PLACE = ["method", "learning_rate", "step"]
METRICS = ("sim_aou_norm", "sim_am_delta", "sim_aou")
TITLE = "What the protocol moves"
NOTE = (
    "Clean: the mean under clean; difference: the other protocol minus clean, at the largest step, paired by seed, method, learning rate and step. Brackets: 95 % "
    "interval. n/N: pairs of cells used of draws planned. Mean over layers as each protocol defines it: with first_layer = count, layer 0 is in sim_am_delta. "
    "Model, position, sink, queries and seeds stand under each task's own tables."
)


def data(frames: Frames) -> pd.DataFrame:
    """Return one row per protocol other than clean, task (and all tasks), method, learning rate, step and metric: clean's mean and the difference."""
    rows = []
    settings = frames.settings()
    of_clean = {_group(setting): setting for setting in settings if setting.named["protocol"] == CLEAN}
    for setting in of_most_queries(setting for setting in settings if setting.named["protocol"] != CLEAN and _group(setting) in of_clean):
        clean = of_clean[_group(setting)]
        theirs = dict(iter(clean.finetuned.groupby(PLACE)))
        for place, cells in setting.finetuned.groupby(PLACE):
            if place not in theirs:
                continue
            base = each(theirs[place])
            gap = difference(each(cells), base)
            named = setting.named | dict(zip(PLACE, place, strict=True)) | {"is_last_step": place[2] == setting.last_step_of(place[0])}
            for metric in METRICS:
                group = (*_group(setting, but=("task", "num_queries")), setting.named["protocol"], place, metric)
                found = [frames.contrast(terms, metric) for terms in (base[base["draw"].isin(gap["draw"])], gap)]
                rows.append((group, named | {"metric": metric, "num_planned": max(setting.num_draws, clean.num_draws)}, found))
    return pd.DataFrame([named | {CLEAN: base.mean} | gap.columns for named, (base, gap) in with_all_tasks(rows)])


def grids(rows: pd.DataFrame) -> list[Grid]:
    """Return a table per model, weights, k and task of the largest step."""
    if rows.empty:
        return []
    found = []
    for (*_, task), part in rows[rows["is_last_step"]].groupby(["model", "init", "k", "train_on", "variant", "task"], sort=False):
        body = []
        for row in part.sort_values(["protocol", "method", "learning_rate"], kind="stable").to_dict("records"):
            named = [row["protocol"], row["method"], rate(row["learning_rate"]), row["metric"]]
            body.append([*named, number(row[CLEAN]), entry(row), row["signs"]])
        headers = ("protocol", "method", "lr", "metric", CLEAN, "difference", "signs" if task == ALL_TASKS else "")
        found.append(Grid(f"{TITLE}: {task}, {called(part.iloc[0].drop('protocol'))}", headers, body, NOTE + descriptive(part)))
    return found


def _group(setting: Setting, but: Sequence[str] = ()) -> tuple[str, ...]:
    return (*setting.first[[name for name in SETTING if name not in ("protocol", *but)]].astype(str), setting.train_on)


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
