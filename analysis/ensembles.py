"""Self-ensembles from stored cells: what several draws, orders or protocols say together, by majority, mean and largest probability.

Source: Li et al. 2023 (arXiv 2312.13772). Nothing is run again. Knows label probabilities and which cells answer the same queries.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from .calibration import State, bin_of, states
from .intervals import descriptive
from .load import SETTING, Frames, load
from .setting import Setting, called
from .text import BASELINES, EDGE_NOTE, Grid, marked, number, show, stores

RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "majority": lambda said_MQC: np.eye(said_MQC.shape[2])[said_MQC.argmax(2)].mean(0),
    "mean": lambda said_MQC: said_MQC.mean(0),
    "max": lambda said_MQC: said_MQC.max(0) / said_MQC.max(0).sum(1, keepdims=True),
}
METRICS = ("balanced_accuracy", "ece", "brier")
Group = tuple[str, list[str]]  # fold, keys of the cells that answer together
TITLE = "Self-ensembles"
NOTE = (
    "Means of both folds. Draws: one order of each seed together. Orders: the orders of a seed together, mean over seeds. Protocols: a draw under each protocol together, mean over "
    "draws. Majority: share of members that predict a label; mean: of their probabilities; max: the largest that any gives, normalised. Alone: mean of the "
    "members. Methods at the largest step, on each fold at the learning rate that the other selects in each setting. Draws that diverged are no members. "
    "Model, position, sink, separator, queries and seeds stand under each task's own tables."
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
            groups: dict[str, list[Group]] = {"draws": [], "orders": []}
            for fold, keys in _answered(frames, state).items() if state.name != "zero_shot" else ():
                members = frames.cells.loc[frames.cells["key"].isin(keys), ["key", "init_seed", "seed", "order"]]
                of_seed = members.groupby(["init_seed", "seed"], dropna=False)
                firsts = members[members["order"] == of_seed["order"].transform("min")]
                groups["draws"] += [(fold, [*part["key"]]) for _, part in firsts.groupby("init_seed", dropna=False)]  # other random weights are another model
                groups["orders"] += [(fold, [*part["key"]]) for _, part in of_seed]
            rows += _rows(frames, setting, state, groups)
    for together in of_protocols.values():
        if len(together) > 1:
            for name in dict.fromkeys(state.name for _, found in together for state in found):
                by_draw = defaultdict[tuple[str, str], list[str]](list)
                same = [(setting, state) for setting, found in together for state in found if state.name == name]
                for _, state in same:
                    for fold, keys in _answered(frames, state).items():
                        for key, draw in frames.cells.loc[frames.cells["key"].isin(keys), ["key", "draw"]].itertuples(index=False):
                            by_draw[fold, draw].append(key)
                rates = {state.rates for _, state in same}
                # Each protocol has selected its own.
                state = replace(same[0][1], rates=rates.pop() if len(rates) == 1 else "", is_edge=any(one.is_edge for _, one in same))
                rows += _rows(frames, same[0][0], state, {"protocols": [(fold, keys) for (fold, _), keys in by_draw.items()]}, protocol="all")
    return pd.DataFrame(rows)


def _answered(frames: Frames, state: State) -> dict[str, list[str]]:
    """Return by fold the keys of the cells that did not diverge."""
    return {fold: [key for key in terms["key"] if len(frames.positions(key))] for fold, terms in state.terms.items()}


def _rows(frames: Frames, setting: Setting, state: State, groups: Mapping[str, Sequence[Group]], **changed: Any) -> list[dict[str, Any]]:
    rows, num_folds, replicates = [], len(state.terms), frames.cells.set_index("key")["replicate"]
    for over, of_over in groups.items():
        alike = [(fold, keys) for fold, keys in of_over if len({frames.asked(key, fold) for key in keys}) == 1]  # other queries cannot be answered together
        together = [(fold, keys) for fold, keys in alike if len(keys) > 1 and frames.asked(keys[0], fold)]
        if not together:
            continue
        said = [[frames.probabilities(key, fold) for key in keys] for fold, keys in together]
        for metric in METRICS:
            alone = float(np.mean([_figure(metric, each, gold) for found in said for each, gold in found]))
            for rule, combine in RULES.items():
                value = float(np.mean([_figure(metric, combine(np.stack([each for each, _ in found])), found[0][1]) for found in said]))
                named = setting.named | changed
                title = f"{named['task']}, {called(named)}" if changed else setting.title
                named |= {
                    "title": title,
                    "method": state.name,
                    "learning_rates": state.rates,
                    "is_edge": state.is_edge,
                    "over": over,
                    "rule": rule,
                    "metric": metric,
                }
                size = sorted({len(keys) for _, keys in together})
                rows.append(
                    named
                    | {
                        "value": value,
                        "alone": alone,
                        "num_members": " or ".join(map(str, size)),
                        "num_ensembles": len(together) // num_folds,
                        "num_used": sum(len(keys) for _, keys in together) // num_folds,
                        "num_planned": setting.num_first_orders if over == "draws" else setting.num_draws,
                        "num_replicates": len({replicates[key] for _, keys in together for key in keys}),
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
    for _, part in rows.groupby(["task", "model", "k", "train_on", "init", "protocol", "variant", "num_queries"], sort=False) if len(rows) else ():
        body = []
        for (over, method, _), line in part.groupby(["over", "method", "learning_rates"], sort=False):
            entries = []
            for metric in METRICS:
                of_rule = line[line["metric"] == metric].set_index("rule")
                entries += [number(of_rule["alone"].iloc[0]), *(number(of_rule["value"][rule]) for rule in RULES)]
            first = line.iloc[0]
            named = [BASELINES.get(method, method), marked(first), over]
            of = f"; {first['num_used']} of {first['num_planned']} draws" if over != "protocols" else ""
            body.append([*named, *entries, f"{first['num_ensembles']} of {first['num_members']} members{of}"])
        headers = ("method", "lr", "over", *(f"{metric} {rule}" for metric in METRICS for rule in ("alone", *RULES)), "ensembles")
        found.append(Grid(f"{TITLE}: {part['title'].iloc[0]}", headers, body, NOTE + EDGE_NOTE + descriptive(part)))
    return found


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
