"""Figures of neighbouring work that a whole model has: next-token distributions beside ICL's, and whether finetuning in an order is closest to ICL in it."""

from __future__ import annotations

import pandas as pd

from .crossing import crossfit, picks
from .intervals import descriptive
from .load import Frames, load
from .setting import Setting
from .text import Grid, entry, show, stores

OUTPUTS, ORDERS, ORDER = "outputs", "orders", "order:"
TITLES = {OUTPUTS: "Next tokens beside ICL's", ORDERS: "Orders crossed"}
CROSSED = ("sim_aou", "sim_am_delta")
MEANING = {
    "top10_overlap": "share of ICL's 10 most likely next tokens among finetuning's",
    "top10_cosine": "cosine of the two probabilities over the tokens in both tens",
    "kl_output": "KL(ICL, finetuned) of the next-token distributions [nats]",
    "tv_output": "their total variation",
    **{f"{metric}, same order": f"{metric} with ICL in the order trained on" for metric in CROSSED},
    **{f"{metric}, other orders": f"{metric} with ICL in the other orders of the seed, mean" for metric in CROSSED},
    **{f"order_match of {metric}": "the first less the second: above 0 where finetuning in an order is closest to ICL in that order" for metric in CROSSED},
}
NOTE = (
    "At the largest step. Selected: the learning rate with the smallest nll_label on one fold, shown on the other, folds swapped and averaged; nearest R*: the learning rate whose R is nearest R*, all "
    "queries. Brackets: 95 % interval over seeds, without the queries' share. n/N: draws used of draws planned."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per group, metric, method and learning rate; nothing where the store has no such figures of the setting."""
    is_wanted = frames.extras["group"].astype(str).str.startswith((OUTPUTS, ORDER)) & frames.extras["cell"].isin(setting.finetuned["key"])
    own = frames.extras[is_wanted].astype({"cell": str, "group": str, "metric": str})
    rows = []
    for pick in picks(frames, setting) if len(own) else ():
        named = setting.named | {"choice": pick.name, "method": pick.method, "fold": pick.fold, "learning_rates": pick.rates, "R": pick.R}
        named |= {"title": pick.title, "num_planned": setting.num_draws}
        found: dict[tuple[str, str], dict[str, pd.Series]] = {}
        for fold, terms in pick.terms.items():
            part = own[own["cell"].isin(terms["key"]) & (own["fold"] == fold)]
            for metric, of_metric in part[part["group"] == OUTPUTS].groupby("metric", sort=False):
                found.setdefault((OUTPUTS, str(metric)), {})[fold] = of_metric.set_index("cell")["mean"]
            for metric, values in _crossed(part, setting.finetuned).items():
                found.setdefault((ORDERS, metric), {})[fold] = values
        for (group, metric), figures in found.items():
            if figures.keys() == pick.terms.keys():
                rows.append(named | {"group": group, "metric": metric} | crossfit(frames, pick.terms, metric, figures=figures).columns)
    return pd.DataFrame(rows)


def _crossed(part: pd.DataFrame, cells: pd.DataFrame) -> dict[str, pd.Series]:
    """Return what each cell has in common with ICL in its own order, in the others (mean), and the difference."""
    part = part[part["group"].str.startswith(ORDER)]
    of_order = part.assign(order=part["group"].str.removeprefix(ORDER).astype(int))
    own_order = cells.set_index("key")["order"]
    found: dict[str, pd.Series] = {}
    for metric in CROSSED if len(part) else ():
        table = of_order[of_order["metric"] == metric].pivot(index="cell", columns="order", values="mean")
        is_own = pd.DataFrame({order: own_order.reindex(table.index) == order for order in table.columns})
        same, other = table.where(is_own).mean(axis=1), table.where(~is_own).mean(axis=1)
        found |= {f"{metric}, same order": same, f"{metric}, other orders": other, f"order_match of {metric}": same - other}
    return found


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return a table per group: a line per metric, a column per method and learning rate."""
    found = []
    for group, part in rows.groupby("group", sort=False) if len(rows) else ():
        columns = part[["choice", "title"]].drop_duplicates().to_dict("records")
        at = {(row["metric"], row["choice"], row["title"]): row for row in part.to_dict("records")}
        body = [
            [metric, *(entry(at.get((metric, column["choice"], column["title"]), {})) for column in columns), MEANING[metric]]
            for metric in dict.fromkeys(part["metric"])
        ]
        headers = ("figure", *(f"{column['choice']}: {column['title']}" for column in columns), "what it is")
        found.append(Grid(f"{TITLES[str(group)]}: {setting.title}", headers, body, f"{setting.caption} {NOTE}{descriptive(part)}"))
    return found


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
