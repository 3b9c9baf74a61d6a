"""How much answers depend on the order of the demonstrations: spread of label probabilities and changed predictions, beside the spread over draws.

Source: Shen et al. 2024 (arXiv 2310.08540), who take the standard deviation over orders. Knows label probabilities and orders.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from .chosen import choices
from .intervals import descriptive, estimate
from .load import Frames, load
from .setting import Setting
from .text import BASELINES, Grid, entry, rate, show, stores

METRICS = ("sd_orders", "changed", "sd_draws")
TITLE = "Sensitivity to the order of the demonstrations"
NOTE = (
    "sd_orders: standard deviation over the orders of a seed of the gold label's probability, mean over queries, then over seeds. changed: share of queries whose "
    "prediction is not the same in all orders of a seed. sd_draws: the standard deviation over seeds, orders as drawn, for comparison. In-context on the same fold as "
    "what it stands beside. Selected: on fold B; nearest R*: all queries. Brackets: 95 % interval over seeds."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per state and metric; nothing where no seed has two orders."""
    counts = setting.icl.groupby("seed")["order"].nunique()
    if len(counts) == 0 or counts.max() < 2:
        return pd.DataFrame()
    rows = []
    places: list[tuple[str, str, float | None, str, pd.DataFrame]] = [("icl", "", None, fold, setting.icl) for fold in ("B", "all")]
    places += [(chosen.method, chosen.name, chosen.learning_rate, chosen.fold, chosen.cells) for chosen in choices(frames, setting)]
    for method, choice, learning_rate, fold, cells in places:
        named: dict[str, Any] = setting.named | {"method": method, "choice": choice, "learning_rate": learning_rate, "fold": fold}
        for metric, found in _sensitivity(frames, cells[cells["status"] == "done"], fold).items():
            rows.append(named | {"metric": metric} | found | {"num_planned": len(setting.replicates)})
    return pd.DataFrame(rows)


def _sensitivity(frames: Frames, cells: pd.DataFrame, fold: str) -> dict[str, dict[str, float]]:
    said: dict[tuple[int, int], np.ndarray] = {}
    predicted: dict[tuple[int, int], np.ndarray] = {}
    for key, seed, order in cells[["key", "seed", "order"]].itertuples(index=False):
        chances, gold = frames.probabilities(key, fold)
        if len(gold):
            said[seed, order], predicted[seed, order] = chances[np.arange(len(gold)), gold], chances.argmax(1)
    seeds = sorted({seed for seed, _ in said})
    of_seed = {seed: [place for place in said if place[0] == seed] for seed in seeds}
    several = {seed: places for seed, places in of_seed.items() if len(places) > 1}
    sd = pd.Series({seed: np.stack([said[place] for place in places]).std(0, ddof=1).mean() for seed, places in several.items()}, dtype=float)
    changed = {seed: np.stack([predicted[place] for place in places]) for seed, places in several.items()}
    moved = pd.Series({seed: (found != found[0]).any(0).mean() for seed, found in changed.items()}, dtype=float)
    found = {"sd_orders": estimate(sd, used=len(sd)).columns, "changed": estimate(moved, used=len(moved)).columns}
    firsts = [said[min(places, key=lambda place: place[1])] for places in of_seed.values()]
    if len(firsts) > 1:
        spread = float(np.stack(firsts).std(0, ddof=1).mean())
        nothing = {"lower": np.nan, "upper": np.nan}
        found["sd_draws"] = {"mean": spread, **nothing, "num_used": len(firsts), "num_replicates": len(firsts)}
    return found


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return the table of a setting."""
    if rows.empty:
        return []
    body = []
    for (method, choice, fold), part in rows.groupby(["method", "choice", "fold"], sort=False):
        of_metric = {row["metric"]: row for row in part.to_dict("records")}
        learning_rate = part["learning_rate"].iloc[0]
        where = ", ".join(filter(None, (choice, f"fold {fold}" if fold != "all" else "all queries")))
        body.append(
            [
                BASELINES.get(method, method),
                "" if pd.isna(learning_rate) else rate(learning_rate),
                *(entry(of_metric.get(metric, {})) for metric in METRICS),
                where,
            ]
        )
    return [Grid(f"{TITLE}: {setting.title}", ("method", "lr", *METRICS, "on"), body, f"{setting.caption} {NOTE}{descriptive(rows)}")]


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
