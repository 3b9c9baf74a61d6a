"""How far the labels' probabilities can be believed: zero-shot, in-context and each method, as they are and once the labels' bias is divided out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .chosen import SELECTED, choices
from .intervals import descriptive
from .load import Frames, load
from .setting import Setting
from .text import BASELINES, Grid, entry, rate, show, stores

FOLD = "B"  # learning rates are selected on A
METRICS = ("balanced_accuracy", "nll_label", "ece", "ece_mass", "brier", "entropy")
FORMS = {
    "": "as it is",
    "batch": "batch calibration: each label's mean probability over the fold divided out",
    "contextual": "contextual calibration: the labels' mean probabilities after prompts without content divided out",
    "supervised_icl": "supervised ICL: finetuned, and the demonstrations in the prompt",
}
GROUPS = {"contextual": "calibration", "supervised_icl": "supervised_icl"}  # of the extras
TITLE = "Calibration"
NOTE = (
    "On fold B; methods at the learning rate with the smallest nll_label on fold A, at the largest step. ECE: expected calibration error of the label-normalised "
    "probabilities, 10 bins of equal width; ece_mass: of equal number. Brackets: 95 % interval over seeds, with the queries' share where a figure has a value "
    "per query. n/N: draws used of draws planned. A calibrated row has no entropy and no ece_mass."
)


NUM_BINS = 10


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Return which of 10 bins of equal width a probability falls into; an edge belongs to the bin below it."""
    return np.searchsorted(np.arange(1, NUM_BINS) / NUM_BINS, confidence)


@dataclass(frozen=True)
class State:
    """What answers: a baseline, or a method at its selected learning rate."""

    name: str
    learning_rate: float | None
    cells: pd.DataFrame

    @property
    def title(self) -> str:
        return BASELINES.get(self.name, self.name) + ("" if self.learning_rate is None else f" {rate(self.learning_rate)}")


def states(frames: Frames, setting: Setting) -> Iterator[State]:
    """Yield zero-shot, in-context and each method at the learning rate that fold A selects, cells that are done only."""
    yield State("zero_shot", None, setting.zero_shot)
    yield State("icl", None, setting.icl)
    for chosen in choices(frames, setting):
        if chosen.name == SELECTED:
            yield State(chosen.method, chosen.learning_rate, chosen.cells[chosen.cells["status"] == "done"])


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per state, form and metric on fold B; nothing for a store that is older than the figures."""
    if "ece" not in frames.folds or frames.folds["ece"].isna().all():
        return pd.DataFrame()
    rows, keys = [], pd.concat([setting.zero_shot, setting.icl, setting.finetuned])["key"]
    own = frames.extras[frames.extras["group"].isin(set(GROUPS.values())) & frames.extras["cell"].isin(keys)]
    for state in states(frames, setting):
        named: dict[str, Any] = setting.named | {"method": state.name, "learning_rate": state.learning_rate}
        named["num_planned"] = setting.num_planned(state.name)
        for form in FORMS:
            for metric in METRICS:
                values = None
                if form in GROUPS:
                    of_group = own[(own["group"] == GROUPS[form]) & own["cell"].isin(state.cells["key"])]
                    values = frames.measured(of_group, metric, FOLD).droplevel("group")
                    values.index = values.index.astype(str)
                column = f"{metric}_{form}" if form == "batch" else metric
                if (column in frames.folds) if values is None else len(values):
                    found = frames.estimate(state.cells, column, fold=FOLD, values=values)
                    rows.append(named | {"form": form, "metric": metric, "fold": FOLD} | found.columns)
    return pd.DataFrame(rows)


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return the table of a setting: a line per state and form."""
    if rows.empty:
        return []
    body = []
    lines = rows.assign(learning_rate=rows["learning_rate"].astype(float).fillna(-1.0)).groupby(["form", "method", "learning_rate"], sort=False)
    for form in FORMS:
        for (this, method, learning_rate), part in lines:
            if this == form:
                of_metric = {row["metric"]: row for row in part.to_dict("records")}
                named = [BASELINES.get(method, method), rate(learning_rate) if learning_rate >= 0 else ""]
                body.append([*named, *(entry(of_metric.get(metric, {})) for metric in METRICS), FORMS[form]])
    return [Grid(f"{TITLE}: {setting.title}", ("method", "lr", *METRICS, "form"), body, f"{setting.caption} {NOTE}{descriptive(rows)}")]


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
