"""Self-ensembles from stored cells: what several draws, orders or protocols say together, by majority, mean and largest probability.

Source: Li et al. 2023 (arXiv 2312.13772). Nothing is run again. Knows label probabilities and which cells answer the same queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from .calibration import FOLD, State, bin_of, states
from .load import SETTING, Frames, load
from .setting import Setting
from .text import BASELINES, Grid, number, rate, show, stores

RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "majority": lambda said_MQC: np.eye(said_MQC.shape[2])[said_MQC.argmax(2)].mean(0),
    "mean": lambda said_MQC: said_MQC.mean(0),
    "max": lambda said_MQC: said_MQC.max(0) / said_MQC.max(0).sum(1, keepdims=True),
}
METRICS = ("balanced_accuracy", "ece", "brier")
TITLE = "Self-ensembles"
NOTE = (
    "On fold B. Draws: one order of each seed together. Orders: the orders of a seed together, mean over seeds. Protocols: a draw under each protocol together, mean over "
    "draws. Majority: share of members that predict a label; mean: of their probabilities; max: the largest that any gives, normalised. Alone: mean of the "
    "members. Methods at the learning rate that fold A selects in each setting, at the largest step."
)


def data(frames: Frames) -> pd.DataFrame:
    """Return one row per setting, state, what is put together, rule and metric: the ensemble's figure, the members' mean, how many members and ensembles."""
    rows: list[dict[str, Any]] = []
    of_protocols: dict[tuple[str, ...], list[tuple[Setting, list[State]]]] = defaultdict(list)
    for setting in frames.settings():
        found = list(states(frames, setting))
        place = (*setting.first[[name for name in SETTING if name != "protocol"]].astype(str), setting.train_on)
        of_protocols[place].append((setting, found))
        for state in found:
            if state.name != "zero_shot":
                members = state.cells[["key", "init_seed", "seed", "order"]]
                of_seed = members.groupby(["init_seed", "seed"], dropna=False)
                firsts = members[members["order"] == of_seed["order"].transform("min")]
                draws = [part["key"] for _, part in firsts.groupby("init_seed", dropna=False)]  # random weights of another seed are another model
                rows += _rows(frames, setting, state, {"draws": draws, "orders": [part["key"] for _, part in of_seed]})
    for together in of_protocols.values():
        if len(together) > 1:
            for name in dict.fromkeys(state.name for _, found in together for state in found):
                by_draw = defaultdict(list)
                same = [(setting, state) for setting, found in together for state in found if state.name == name]
                for _, state in same:
                    for key, draw in zip(state.cells["key"], state.cells["draw"], strict=True):
                        by_draw[draw].append(key)
                rates = {state.learning_rate for _, state in same}
                state = replace(same[0][1], learning_rate=rates.pop() if len(rates) == 1 else None)  # each protocol has selected its own
                rows += _rows(frames, same[0][0], state, {"protocols": by_draw.values()}, protocol="all")
    return pd.DataFrame(rows)


def _rows(frames: Frames, setting: Setting, state: State, groups: Mapping[str, Iterable[Sequence[str]]], **changed: Any) -> list[dict[str, Any]]:
    rows = []
    for over, each in groups.items():
        alike = [list(keys) for keys in each if len({frames.asked(key, FOLD) for key in keys}) == 1]  # other queries cannot be answered together
        together = [[frames.probabilities(key, FOLD) for key in keys] for keys in alike if len(keys) > 1 and frames.asked(keys[0], FOLD)]
        if not together:
            continue
        for metric in METRICS:
            alone = float(np.mean([_figure(metric, said, gold) for found in together for said, gold in found]))
            for rule, combine in RULES.items():
                value = float(np.mean([_figure(metric, combine(np.stack([said for said, _ in found])), found[0][1]) for found in together]))
                named = setting.named | changed | {"method": state.name, "learning_rate": state.learning_rate, "over": over, "rule": rule, "metric": metric}
                size = sorted({len(found) for found in together})
                rows.append(
                    named
                    | {
                        "value": value,
                        "alone": alone,
                        "num_members": " or ".join(map(str, size)),
                        "num_ensembles": len(together),
                        "fold": FOLD,
                        "num_used": sum(map(len, together)),
                        "num_planned": setting.num_draws,
                    }
                )
    return rows


def _figure(metric: str, said: np.ndarray, gold: np.ndarray) -> float:
    right = said.argmax(1) == gold
    if metric == "balanced_accuracy":
        return float(np.mean([right[gold == label].mean() for label in np.unique(gold)]))
    if metric == "brier":
        return float(((said - np.eye(said.shape[1])[gold]) ** 2).sum(1).mean())
    confidence = said.max(1)
    place = bin_of(confidence)
    return float(sum(abs(right[place == n].mean() - confidence[place == n].mean()) * (place == n).mean() for n in np.unique(place)))


def grids(rows: pd.DataFrame) -> list[Grid]:
    """Return a table per setting: a line per state and what is put together, each rule beside the members alone."""
    found = []
    for (task, model, k, train_on, init, protocol), part in (
        rows.groupby(["task", "model", "k", "train_on", "init", "protocol"], sort=False) if len(rows) else ()
    ):
        body = []
        lines = part.assign(learning_rate=part["learning_rate"].astype(float).fillna(-1.0)).groupby(["over", "method", "learning_rate"], sort=False)
        for (over, method, learning_rate), line in lines:
            entries = []
            for metric in METRICS:
                of_rule = line[line["metric"] == metric].set_index("rule")
                entries += [number(of_rule["alone"].iloc[0]), *(number(of_rule["value"][rule]) for rule in RULES)]
            named = [BASELINES.get(method, method), rate(learning_rate) if learning_rate >= 0 else "", over]
            first = line.iloc[0]
            of = f"; {first['num_used']} of {first['num_planned']} draws" if over == "orders" else ""
            body.append([*named, *entries, f"{first['num_ensembles']} of {first['num_members']} members{of}"])
        headers = ("method", "lr", "over", *(f"{metric} {rule}" for metric in METRICS for rule in ("alone", *RULES)), "ensembles")
        title = f"{TITLE}: {task}, {model}, k = {k}" + ("" if init == "trained" else f", random weights: {init}")
        title += {"clean": "", "all": ", protocols together"}.get(protocol, f", protocol {protocol}") + (
            "" if train_on == "true" else f", trained on {train_on}"
        )
        found.append(Grid(title, headers, body, NOTE))
    return found


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
