"""Implicit patterns: what zero-shot, in-context and each method score with the pattern and without it, by the number of demonstrations.

Source: Yin et al. 2024 (arXiv 2410.04691). Knows the generated pairs of tasks and accuracies.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from iclgd_dist.patterns import KINDS

from .crossing import crossfit, selected
from .intervals import Estimate, descriptive
from .load import SETTING, Frames, load, of_most_queries
from .setting import Setting, called
from .text import BASELINES, EDGE_NOTE, Grid, entry, marked, rate, show, stores

METRIC = "balanced_accuracy"
TITLE = "Implicit patterns"
NOTE = (
    "Balanced accuracy with the pattern, without it, and the difference of the two means, which is of different queries and has no interval. Zero-shot stands at k = 0. "
    "Methods at the largest step, learning rate selected on one fold, scored on the other, mean of both. Brackets: 95 % interval over seeds with the queries' share. "
    "n/N: draws used of draws planned. Model, position, sink, separator, queries and seeds stand under each task's own tables."
)


def data(frames: Frames) -> pd.DataFrame:
    """Return one row per kind, k, method and form (pattern, plain)."""
    rows: list[dict[str, Any]] = []
    for setting in of_most_queries(frames.settings()):
        kind, _, form = setting.named["task"].rpartition("_")
        if kind not in KINDS or form not in ("pattern", "plain") or setting.train_on != "true":
            continue
        place = "|".join(map(str, setting.first[[name for name in SETTING if name not in ("task", "num_demonstrations", "num_queries")]]))
        for method in ("zero_shot", "icl", *setting.methods):
            k = 0 if method == "zero_shot" else setting.named["k"]
            named = setting.named | {"place": place, "kind": kind, "form": form, "k": k, "method": method}
            one, rates, is_edge = _estimate(frames, setting, method)
            rows.append(named | {"learning_rates": rates, "is_edge": is_edge} | one.columns | {"num_planned": setting.num_planned(method)})
    table = pd.DataFrame(rows)
    return table.drop_duplicates(["place", "kind", "form", "k", "method"]) if len(table) else table


def _estimate(frames: Frames, setting: Setting, method: str) -> tuple[Estimate, str, bool]:
    """Return the balanced accuracy, the learning rates that the folds select, and whether one is at the edge of its grid."""
    if method in BASELINES:
        return frames.estimate(setting.zero_shot if method == "zero_shot" else setting.icl, METRIC), "", False
    picked = selected(frames, setting, method)
    terms, rates = {fold: part for fold, (_, part) in picked.items()}, {one.learning_rate for one, _ in picked.values()}
    one = crossfit(frames, terms, METRIC) if terms else Estimate()
    return one, " or ".join(map(rate, sorted(rates))), any(each.is_edge for each, _ in picked.values())


def grids(rows: pd.DataFrame) -> list[Grid]:
    """Return a table per model and kind: a line per k and method."""
    found = []
    for (_, kind), part in rows.groupby(["place", "kind"], sort=False) if len(rows) else ():
        body = []
        for (k, method), line in part.sort_values("k", kind="stable").groupby(["k", "method"], sort=False):
            of_form = {row["form"]: row for row in line.to_dict("records")}
            gap = of_form["pattern"]["mean"] - of_form["plain"]["mean"] if len(of_form) == 2 else float("nan")
            difference = f"{gap:+.3f}".replace("-", "\N{MINUS SIGN}") if gap == gap else ""
            scored = [
                entry(row) + (f" at {marked(row)}" if row.get("learning_rates") else "") for row in (of_form.get(form, {}) for form in ("pattern", "plain"))
            ]
            body.append([str(k), BASELINES.get(method, method), *scored, difference])
        first = part.iloc[0]
        title = f"{TITLE}: {kind}, {called(first.drop('k'))}"
        note = f"With: {KINDS[kind].with_pattern}; without: {KINDS[kind].without}. {NOTE}{EDGE_NOTE}{descriptive(part[part['method'] != 'zero_shot'])}"
        found.append(Grid(title, ("k", "method", "with the pattern", "without", "difference"), body, note))
    return found


if __name__ == "__main__":
    show(grids(data(load(*stores()))))
