"""How far the labels' probabilities can be believed: zero-shot, in-context and each method, as they are and once the labels' bias is divided out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from .chosen import SELECTED
from .crossing import FOLDS, crossfit, picks
from .intervals import descriptive
from .load import Frames, each, load
from .setting import Setting
from .text import BASELINES, EDGE, EDGE_NOTE, Grid, entry, marked, show, stores

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
    "Means of both folds; methods at the largest step, on each fold at the learning rate with the smallest nll_label on the other. ECE: expected calibration error of the label-normalised "
    "probabilities, 10 bins of equal width; ece_mass: of equal number. Brackets: 95 % interval over seeds, with the queries' share where a figure has a value "
    "per query. n/N: draws used of draws planned. A calibrated row has no entropy and no ece_mass."
)


NUM_BINS = 10


def bin_of(confidence: np.ndarray) -> np.ndarray:
    """Return which of 10 bins of equal width a probability falls into; an edge belongs to the bin below it."""
    return np.searchsorted(np.arange(1, NUM_BINS) / NUM_BINS, confidence)


@dataclass(frozen=True)
class State:
    """What answers: a baseline, or a method at its selected learning rates."""

    name: str
    rates: str  # empty for a baseline
    terms: Mapping[str, pd.DataFrame]  # fold that reports -> key, weight, draw, replicate
    is_edge: bool = False  # a selected learning rate is the smallest or largest of its grid

    @property
    def title(self) -> str:
        return f"{BASELINES.get(self.name, self.name)} {self.rates}".strip() + (EDGE if self.is_edge else "")

    @property
    def cells(self) -> pd.DataFrame:
        """Key, draw and replicate of every cell, once."""
        return pd.concat(self.terms.values()).drop_duplicates("key")


def states(frames: Frames, setting: Setting) -> Iterator[State]:
    """Yield zero-shot, in-context and each method at the learning rates that the folds select."""
    for name, cells in (("zero_shot", setting.zero_shot), ("icl", setting.icl)):
        yield State(name, "", {fold: each(cells) for fold in FOLDS})
    for pick in picks(frames, setting):
        if pick.name == SELECTED:
            yield State(pick.method, pick.rates, pick.terms, pick.is_edge)


def data(frames: Frames, setting: Setting) -> pd.DataFrame:
    """Return one row per state, form and metric; nothing for a store that is older than the figures."""
    if "ece" not in frames.folds or frames.folds["ece"].isna().all():
        return pd.DataFrame()
    rows, keys = [], pd.concat([setting.zero_shot, setting.icl, setting.finetuned])["key"]
    own = frames.extras[frames.extras["group"].isin(set(GROUPS.values())) & frames.extras["cell"].isin(keys)]
    for state in states(frames, setting):
        named: dict[str, Any] = setting.named | {"method": state.name, "learning_rates": state.rates, "is_edge": state.is_edge}
        named["num_planned"] = setting.num_planned(state.name)
        for form in FORMS:
            for metric in METRICS:
                figures = None
                if form in GROUPS:
                    of_group = own[(own["group"] == GROUPS[form]) & own["cell"].isin(state.cells["key"])]
                    figures = {fold: frames.measured(of_group, metric, fold).droplevel("group").rename(index=str) for fold in state.terms}
                column = f"{metric}_{form}" if form == "batch" else metric
                if (column in frames.folds) if figures is None else any(map(len, figures.values())):
                    rows.append(named | {"form": form, "metric": metric} | crossfit(frames, state.terms, column, figures=figures).columns)
    return pd.DataFrame(rows)


def grids(setting: Setting, rows: pd.DataFrame) -> list[Grid]:
    """Return the table of a setting: a line per state and form."""
    if rows.empty:
        return []
    body = []
    lines = rows.groupby(["form", "method", "learning_rates"], sort=False)
    for form in FORMS:
        for (this, method, _), part in lines:
            if this == form:
                of_metric = {row["metric"]: row for row in part.to_dict("records")}
                named = [BASELINES.get(method, method), marked(part.iloc[0])]
                body.append([*named, *(entry(of_metric.get(metric, {})) for metric in METRICS), FORMS[form]])
    return [
        Grid(
            f"{TITLE}: {setting.title}",
            ("method", "lr", *METRICS, "form"),
            body,
            f"{setting.caption} {NOTE}{EDGE_NOTE}{descriptive(rows[rows['method'] != 'zero_shot'])}",
        )
    ]


if __name__ == "__main__":
    frames = load(*stores())
    show(grid for setting in frames.settings() for grid in grids(setting, data(frames, setting)))
