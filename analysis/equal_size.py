"""Methods at equal size of update: at R* and other sizes, between two learning rates, on trained and on random weights."""

from __future__ import annotations

from itertools import product

import pandas as pd

from .chosen import REASONS, difference, matched, paired
from .intervals import ALL_TASKS, MIN_SEEDS_OF_P, descriptive, holm, with_all_tasks
from .load import SETTING, Frames, load, of_most_queries
from .setting import called
from .text import Grid, entry, number, show, stores

METRICS = ("sim_aou", "sim_aou_norm", "sim_am_delta")
RATIOS = (0.125, 0.25, 0.5, 1.0)  # of R, beside the sweep file's own R*
BASE, METHOD = "vanilla", "layer_causal"
TITLE = "Equal size of update"
NOTE = (
    "sim_aou of each method where its R crosses a size (R* and others) along the learning rates (linear in log R in each draw, largest step, no "
    "extrapolation), over the draws that both have; difference: method minus vanilla, paired by draw. On random weights the replicate is the seed of the weights. Brackets: 95 % interval; "
    f"n/N: draws used of draws planned. p: two-sided, from {MIN_SEEDS_OF_P} seeds on; that of the primary contrast (sim_aou of layer_causal, trained weights, R*, "
    f"all tasks) as it is, the others Holm's within a protocol and metric. The last column counts, over both methods, the draws that have no such point: "
    f"{'; '.join(f'{name}: {why}' for name, why in REASONS.items())}. Model, position, sink, separator, queries and seeds stand under each task's own tables."
)


def data(frames: Frames) -> pd.DataFrame:
    """Return one row per metric, weights, size, method other than vanilla, and task (and all tasks): both values, their difference, counts, reasons, p."""
    rows = []
    for setting in of_most_queries(frames.settings()):
        if setting.train_on != "true" or BASE not in setting.methods:
            continue
        for at, method in product(sorted({*RATIOS, setting.matched_ratio}), setting.methods[1:]):
            base, other = matched(setting, BASE, at), matched(setting, method, at)
            both = (*paired(base.terms, other.terms), difference(other.terms, base.terms))
            is_primary = at == setting.matched_ratio and method == METHOD and not setting.is_random
            named = setting.named | {"method": method, "matched_ratio": at, "is_star": at == setting.matched_ratio}
            named |= {"num_planned": setting.num_draws, "reasons": base.reasons + other.reasons}
            for metric in METRICS:
                group = (
                    *setting.first[[name for name in SETTING if name not in ("task", "num_queries")]].astype(str),
                    method,
                    metric,
                    at,
                    setting.matched_ratio,
                )
                is_first = {"metric": metric, "is_primary": is_primary and metric == METRICS[0]}
                rows.append((group, named | is_first, [frames.contrast(terms, metric) for terms in both]))
    made = [named | {"vanilla": vanilla.mean, "value": other.mean} | gap.columns | {"p": gap.p} for named, (vanilla, other, gap) in with_all_tasks(rows)]
    table = pd.DataFrame([row | {"reasons": ", ".join(f"{name} {row['reasons'][name]}" for name in REASONS if row["reasons"][name])} for row in made])
    if table.empty:
        return table
    of_table = ["model", "k", "protocol", "variant", "metric"]
    is_mean = table["is_primary"] & table["task"].eq(ALL_TASKS)
    table["is_primary"] &= is_mean | ~is_mean.groupby([table[name] for name in of_table]).transform("any")
    rest = table["p"].mask(table["is_primary"])
    table["p"] = rest.groupby([table[name] for name in of_table]).transform(holm).where(~table["is_primary"], table["p"])
    return table


def grids(rows: pd.DataFrame) -> list[Grid]:
    """Return a table per model and k, trained weights first; sizes that no draw comes up to are left out, but for R*."""
    if rows.empty:
        return []
    found = []
    shown = rows[(rows["metric"] == METRICS[0]) & (rows["is_star"] | rows["num_used"].gt(0))]
    for _, part in shown.groupby(["model", "k", "variant"]):
        body = []
        for row in part.sort_values("init", key=lambda init: init != "trained", kind="stable").to_dict("records"):
            weights = "trained" if row["init"] == "trained" else f"random: {row['init']}"
            size = f"{row['matched_ratio']:g}{' (primary)' if row['is_primary'] else ''}"
            names = [weights, row["protocol"], row["task"], row["method"], size]
            why = "; ".join(filter(None, (row["signs"], row["reasons"])))
            body.append([*names, number(row["vanilla"]), number(row["value"]), entry(row), number(row["p"]), why])
        headers = ("weights", "protocol", "task", "method", "R", "vanilla", "method's", "difference", "p", "signs, or draws without")
        found.append(Grid(f"{TITLE}: {called(part.iloc[0].drop(['init', 'protocol']))}", headers, body, f"{NOTE}{descriptive(part)}"))
    return found


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
