"""How much answers depend on the order of the demonstrations: spread of label probabilities and changed predictions, beside the spread over draws.

Source: Shen et al. 2024 (arXiv 2310.08540), who take the standard deviation over orders. Knows label probabilities and orders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from .crossing import FOLDS, picks
from .intervals import Estimate, descriptive, estimate
from .load import Frames, each, load
from .setting import Setting
from .text import BASELINES, EDGE_NOTE, Grid, entry, marked, show, stores

METRICS = ("sd_orders", "changed", "sd_draws")
SEED = ["init_seed", "seed"]  # orders of the same weights and the same demonstrations
TITLE = "Sensitivity to the order of the demonstrations"
NOTE = (
    "sd_orders: standard deviation over the orders of a seed of the gold label's probability, mean over queries, then over seeds. changed: share of queries whose "
    "prediction is not the same in all orders of a seed. sd_draws: the standard deviation over seeds, orders as drawn, for comparison. Selected: at the learning rate with the "
    "smallest nll_label on one fold, on the other, folds swapped and averaged; nearest R*: all queries; in-context in both ways. Brackets: 95 % interval over seeds. n/N: draws used of draws planned."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per state and metric; nothing where no seed has two orders that differ."""
    distinct = _distinct(setting.icl)
    if not distinct.duplicated(SEED).any():
        return pd.DataFrame()
    rows = []
    places: list[tuple[str, str, str, bool, Mapping[str, pd.DataFrame]]] = [
        ("icl", "", "", False, {fold: each(setting.icl) for fold in folds}) for folds in (FOLDS, ("all",))
    ]
    places += [(pick.method, pick.name, pick.rates, pick.is_edge, pick.terms) for pick in picks(frames, setting)]
    every = pd.concat([setting.icl, setting.finetuned])
    done = every[every["draw"].isin(distinct["draw"]) & (every["status"] == "done")]
    for method, choice, rates, is_edge, terms in places:
        named: dict[str, Any] = setting.named | {"method": method, "choice": choice, "learning_rates": rates, "fold": " and ".join(sorted(terms))}
        for metric, found in _sensitivity(frames, {fold: done[done["key"].isin(part["key"])] for fold, part in terms.items()}).items():
            planned = setting.num_first_orders if metric == "sd_draws" else setting.num_draws
            rows.append(named | {"metric": metric, "is_edge": is_edge} | found.columns | {"num_planned": planned})
    return pd.DataFrame(rows)


def _distinct(icl: pd.DataFrame) -> pd.DataFrame:
    """Return the in-context cells without those whose order shows the demonstrations as an earlier one does: few demonstrations have few orders."""
    if len(icl) and int(icl["num_demonstrations"].iloc[0]) < 2:
        return icl.iloc[:0]
    shown = icl["demonstrations"].map(lambda texts: None if texts is None or isinstance(texts, float) else "\0".join(texts))  # None: not kept
    ordered = icl.assign(shown=shown.where(shown.notna(), icl["draw"])).sort_values("order", kind="stable")
    return ordered[~ordered.duplicated([*SEED, "shown"])]


def _sensitivity(frames: Frames, cells: Mapping[str, pd.DataFrame]) -> dict[str, Estimate]:
    """Return the estimates by metric, the folds averaged; answers to other queries than the rest's are left out."""
    spreads, moved, firsts = dict[float, list[float]](), dict[float, list[float]](), dict[Any, list[tuple[tuple[int, ...], np.ndarray]]]()
    used = set[str]()
    of_seeds = [(fold, seeds, part) for fold, some in cells.items() for seeds, part in some.sort_values("order", kind="stable").groupby(SEED, dropna=False)]
    for fold, (init_seed, _), part in of_seeds:
        keys = part["key"].tolist()
        asked = [frames.asked(key, fold) for key in keys]
        said = [frames.probabilities(key, fold) for key in keys]
        if not asked[0] or len(set(asked)) > 1:
            continue
        gold = said[0][1]
        chances = np.stack([of_order[np.arange(len(gold)), gold] for of_order, _ in said])
        firsts.setdefault((fold, None if pd.isna(init_seed) else init_seed), []).append((asked[0], chances[0]))
        if len(keys) > 1:
            predicted = np.stack([of_order.argmax(1) for of_order, _ in said])
            replicate = part["replicate"].iloc[0]
            spreads.setdefault(replicate, []).append(float(chances.std(0, ddof=1).mean()))
            moved.setdefault(replicate, []).append(float((predicted != predicted[0]).any(0).mean()))
            used |= set(part["draw"])
    found = {}
    for metric, values in (("sd_orders", spreads), ("changed", moved)):
        found[metric] = estimate(pd.Series({replicate: np.mean(some) for replicate, some in values.items()}, dtype=float), used=len(used))
    between = [np.stack([each for _, each in of_weights]) for of_weights in firsts.values() if len(of_weights) > 1 and len({a for a, _ in of_weights}) == 1]
    if between:
        mean = float(np.mean([each.std(0, ddof=1).mean() for each in between]))
        found["sd_draws"] = Estimate(mean, used=sum(map(len, between)) // len(cells), replicates=max(map(len, between)))
    return found


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return the table of a setting."""
    if rows.empty:
        return []
    body = []
    for (method, choice, fold), part in rows.groupby(["method", "choice", "fold"], sort=False):
        of_metric = {row["metric"]: row for row in part.to_dict("records")}
        where = ", ".join(filter(None, (choice, f"folds {fold}" if fold != "all" else "all queries")))
        body.append(
            [
                BASELINES.get(method, method),
                marked(part.iloc[0]),
                *(entry(of_metric.get(metric, {})) for metric in METRICS),
                where,
            ]
        )
    return [Grid(f"{TITLE}: {setting.title}", ("method", "lr", *METRICS, "on"), body, f"{setting.caption} {NOTE}{EDGE_NOTE}{descriptive(rows)}")]


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
