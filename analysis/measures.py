"""Figures that a sweep file adds (metrics of one's own) and comparisons of two finetuned cells of one learning rate, as tables."""

from __future__ import annotations

import pandas as pd

from .intervals import descriptive
from .load import Frames, load
from .setting import Setting
from .text import Grid, entry, rate, show, stores

NOTE = (
    "Mean over layers, mean over draws at the largest step. Brackets: 95 % interval over seeds, without the queries' share. n/N: draws used of draws planned."
)
AT = ["method", "learning_rate"]


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per metric, version (empty for a comparison of two cells), method and learning rate at the largest step; for two cells, of both."""
    cells = pd.concat([setting.at_last_step(method) for method in setting.methods] or [setting.finetuned])
    places = cells.set_index("key")[AT]
    rows = []
    for table in (frames.metrics, frames.pairs):
        cell, other = table.columns[:2]
        here = table[table[cell].isin(places.index) & (table["fold"] == "all")]
        for metric in here["metric"].unique():
            values = frames.measured(here, metric).rename("value").reset_index().join(places, on=cell)
            if other == "version":
                values["learning_rates"] = values["learning_rate"].map(rate)
            else:
                values = values.join(places, on=other, rsuffix="_b", how="inner").assign(version="")
                values = values[values["learning_rate"] == values["learning_rate_b"]]  # of different ones there is only alpha, which has a table of its own
                columns = zip(values["method"], values["learning_rate"], values["method_b"], values["learning_rate_b"], strict=True)
                both = [sorted([(a, rate_a), (b, rate_b)], key=lambda one: (one[0] != "vanilla", *one)) for a, rate_a, b, rate_b in columns]
                values["method"] = [f"{one[0]} and {second[0]}" for one, second in both]  # whichever of the two holds the row
                values["learning_rate"] = [one[1] for one, _ in both]
                values["learning_rates"] = [", ".join(dict.fromkeys((rate(one[1]), rate(second[1])))) for one, second in both]
            by = ["version", *AT, "learning_rates"]
            for at, part in values.groupby(by, observed=True):
                once = cells[cells["key"].isin(part[cell])].drop_duplicates("draw")
                found = frames.estimate(once, metric, values=part.set_index(cell)["value"])
                rows.append(setting.named | {"metric": metric} | dict(zip(by, at, strict=True)) | found.columns | {"num_planned": setting.num_draws})
    return pd.DataFrame(rows)


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return one table per metric and version: method, learning rate, mean."""
    found = []
    for (metric, version), part in rows.groupby(["metric", "version"], sort=False) if len(rows) else ():
        body = [[row["method"], row["learning_rates"], entry(row)] for row in part.to_dict("records")]
        name = f"{metric}, version {version}" if version else f"{metric} of two methods"
        found.append(Grid(f"{name}: {setting.title}", ("method", "lr", "mean"), body, f"{setting.caption} {NOTE}{descriptive(part)}"))
    return found


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
