"""Methods at equal size of update: at R*, between two learning rates, on trained and on random weights."""

from __future__ import annotations

import pandas as pd

from .chosen import REASONS, difference, matched
from .intervals import descriptive, with_all_tasks
from .load import SETTING, Frames, load, of_most_queries
from .text import Grid, entry, number, show, stores

METRICS = ("sim_aou", "sim_aou_norm", "sim_am_delta")
TITLE = "Equal size of update: trained and random weights"
NOTE = (
    "sim_aou of each method where its R crosses R* along the learning rates (linear in log R in each draw, largest step, no extrapolation); difference: method "
    "minus vanilla, paired by draw. On random weights the replicate is the seed of the weights. Brackets: 95 % interval; n/N: draws used of draws planned. "
    f"The last column counts, over both methods, the draws that never come up to R*: {'; '.join(f'{name}: {why}' for name, why in REASONS.items())}. "
    "Model, position, sink, separator, queries and seeds stand under each task's own tables."
)


def data(frames: Frames) -> pd.DataFrame:
    """Return one row per metric, weights, method other than vanilla, and task (and all tasks): both values at R*, their difference, counts, reasons; nothing without random weights."""
    settings, rows = of_most_queries(frames.settings()), []
    for setting in settings if any(setting.is_random for setting in settings) else ():
        if setting.train_on != "true" or "vanilla" not in setting.methods:
            continue
        base = matched(setting, "vanilla")
        for method in setting.methods[1:]:
            other = matched(setting, method)
            gap = difference(other.terms, base.terms)
            both = [terms[terms["draw"].isin(gap["draw"])] for terms in (base.terms, other.terms)]
            named = setting.named | {"method": method, "matched_ratio": setting.matched_ratio, "num_planned": setting.num_draws}
            named |= {"reasons": base.reasons + other.reasons}
            for metric in METRICS:
                group = (*setting.first[[name for name in SETTING if name not in ("task", "num_queries")]].astype(str), method, metric)
                rows.append((group, named | {"metric": metric}, [frames.contrast(terms, metric) for terms in (*both, gap)]))
    made = [named | {"vanilla": vanilla.mean, "value": other.mean} | gap.columns for named, (vanilla, other, gap) in with_all_tasks(rows)]
    return pd.DataFrame([row | {"reasons": ", ".join(f"{name} {row['reasons'][name]}" for name in REASONS if row["reasons"][name])} for row in made])


def grids(rows: pd.DataFrame) -> list[Grid]:
    """Return a table per model and k trained weights first."""
    if rows.empty:
        return []
    found = []
    for (model, k), part in rows[rows["metric"] == METRICS[0]].groupby(["model", "k"]):
        body = []
        for row in part.sort_values("init", key=lambda init: init != "trained", kind="stable").to_dict("records"):
            weights = "trained" if row["init"] == "trained" else f"random: {row['init']}"
            body.append(
                [
                    weights,
                    row["protocol"],
                    row["task"],
                    row["method"],
                    number(row["vanilla"]),
                    number(row["value"]),
                    entry(row),
                    "; ".join(filter(None, (row["signs"], row["reasons"]))),
                ]
            )
        headers = ("weights", "protocol", "task", "method", "vanilla", "method's", "difference", "signs, or draws without")
        found.append(Grid(f"{TITLE}: {model}, k = {k}", headers, body, f"R* = {part['matched_ratio'].iloc[0]:g}. {NOTE}{descriptive(part)}"))
    return found


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
