"""Figures of neighbouring work that a whole model has: next-token distributions beside ICL's, and whether finetuning in an order is closest to ICL in it."""

from __future__ import annotations

import pandas as pd

from .chosen import choices
from .intervals import descriptive
from .load import Frames, load
from .setting import Setting
from .text import Grid, entry, show, stores

GROUPS = {
    "outputs": ("Next tokens beside ICL's", ("top10_overlap", "top10_cosine", "kl_output", "tv_output")),
    "orders": (
        "Orders crossed",
        ("sim_aou_same_order", "sim_aou_other_order", "order_match_sim_aou", "sim_am_delta_same_order", "sim_am_delta_other_order", "order_match_sim_am_delta"),
    ),
}
MEANING = {
    "top10_overlap": "share of ICL's 10 most likely next tokens among finetuning's",
    "top10_cosine": "cosine of the two probabilities over the tokens in both tens",
    "kl_output": "KL(ICL, finetuned) of the next-token distributions [nats]",
    "tv_output": "their total variation",
    "sim_aou_same_order": "sim_aou with ICL in the order trained on",
    "sim_aou_other_order": "sim_aou with ICL in the other orders of the seed, mean",
    "order_match_sim_aou": "the first less the second: above 0 where finetuning in an order is closest to ICL in that order",
    "sim_am_delta_same_order": "sim_am_delta with ICL in the order trained on",
    "sim_am_delta_other_order": "sim_am_delta with ICL in the other orders of the seed, mean",
    "order_match_sim_am_delta": "the first less the second",
}
NOTE = (
    "At the largest step. Selected: the learning rate with the smallest nll_label on fold A, on fold B; nearest R*: the learning rate whose R is nearest R*, all "
    "queries. Brackets: 95 % interval over seeds, without the queries' share. n/N: draws used of draws planned."
)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per group, metric, method and learning rate; nothing where the store has no such figures of the setting."""
    own = frames.extras[frames.extras["group"].isin(GROUPS) & frames.extras["cell"].isin(setting.finetuned["key"])]
    rows = []
    for chosen in choices(frames, setting) if len(own) else ():
        for group, (_, metrics) in GROUPS.items():
            for metric in metrics:
                part = own[(own["group"] == group) & own["cell"].isin(chosen.cells["key"])]
                values = frames.measured(part, metric, chosen.fold).droplevel("group")
                if len(values):
                    values.index = values.index.astype(str)
                    named = setting.named | {"group": group, "metric": metric, "choice": chosen.name, "method": chosen.method, "fold": chosen.fold}
                    named |= {"learning_rate": chosen.learning_rate, "R": chosen.R, "title": chosen.title, "num_planned": setting.num_draws}
                    rows.append(named | frames.estimate(chosen.cells, metric, values=values).columns)
    return pd.DataFrame(rows)


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
        found.append(Grid(f"{GROUPS[str(group)][0]}: {setting.title}", headers, body, f"{setting.caption} {NOTE}{descriptive(part)}"))
    return found


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
