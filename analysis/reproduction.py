"""Does a store hold the published figures? Ours, theirs and the difference, for each of the 72 per-seed figures, and per layer.

`published.csv` holds every figure; kinds other than per_seed and per_layer are there to be read. Exit code 0 only if all 72 lie within .02.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from .load import Frames, load
from .setting import protocol_name
from .text import Grid, number, rate, show, stores

TOLERANCE = 0.02
PUBLISHED_MODEL = "fairseq-dense-1.3B"  # what the source of the published model ends with: a hub id or a directory
NUM_LAYERS, NUM_DEMONSTRATIONS, NUM_STEPS = 24, 32, 32
RUN = ["task", "method", "seed", "order", "learning_rate"]
METRICS = ("sim_aou_norm", "sim_am_delta")
NOTE = f"Means over {NUM_LAYERS} layers; protocol reference, k = {NUM_DEMONSTRATIONS}, step {NUM_STEPS}. The published model is fairseq dense 1.3B."
PROFILE_NOTE = "Means over tasks and seeds. Cells: how many of ours the mean is over, of those published."


def published(kind: str) -> pd.DataFrame:
    """Return the published figures of one kind: per_seed, per_layer, table_1, table_2 or accuracy."""
    table = pd.read_csv(Path(__file__).with_name("published.csv"))
    return table[table["kind"] == kind].rename(columns={"value": "theirs"}).reset_index(drop=True)


def compare(frames: Frames) -> pd.DataFrame:
    """Return the per-seed figures: RUN, metric, theirs, ours, difference and state (within, off, missing, diverged or undefined: not at all layers).

    Errors: ValueError if several cells match a run, as those of two models do.
    """
    cells, layers = _cells(frames), _layers(frames)
    table = published("per_seed")[[*RUN, "metric", "theirs"]].merge(cells[[*RUN, "key", "status"]], on=RUN, how="left")
    table = table.merge(layers.groupby(["key", "metric"])["value"].agg(ours="mean", num_layers="count").reset_index(), on=["key", "metric"], how="left")
    is_whole = table["num_layers"] == NUM_LAYERS
    table["ours"] = table["ours"].where(is_whole)
    table["difference"] = table["ours"] - table["theirs"]
    is_within = table["difference"].abs() <= TOLERANCE + 1e-9  # both are decimal fractions: .13 - .11 is a little more than .02
    why = [table["key"].isna(), table["status"] == "diverged", ~is_whole, is_within]
    return table.assign(state=np.select(why, ["missing", "diverged", "undefined", "within"], "off"))


def profile(frames: Frames) -> pd.DataFrame:
    """Return method, metric, layer, theirs, ours, difference and num_cells."""
    ours = _layers(frames).groupby(["method", "metric", "layer"])["value"].agg(ours="mean", num_cells="count").reset_index()
    table = published("per_layer")[["method", "metric", "layer", "theirs"]].merge(ours, on=["method", "metric", "layer"], how="left")
    return table.assign(difference=table["ours"] - table["theirs"], num_cells=table["num_cells"].fillna(0).astype(int))


def _cells(frames: Frames) -> pd.DataFrame:
    """Return the finetuned cells that the published runs are compared with, one each."""
    cells = frames.finetuned
    is_plain = (cells["init"] == "trained") & (cells["train_on"] == "true") & cells["method_options"].isna()
    is_plain &= (cells["num_demonstrations"] == NUM_DEMONSTRATIONS) & (cells["step"] == NUM_STEPS)
    is_plain &= cells["protocol"].map(protocol_name).eq("reference")
    found = cells[is_plain].merge(published("per_seed")[RUN].drop_duplicates(), on=RUN)
    if twice := found[found.duplicated(RUN, keep=False)].to_dict("records"):
        names = sorted({f"{cell['model']} in {cell['compute_dtype']}, {cell['num_queries']} queries" for cell in twice})
        raise ValueError(
            f"one cell for each run is required, got {len(twice)} for {len(found[RUN].drop_duplicates())} runs ({'; '.join(names)}); give one model a store"
        )
    return found


def _layers(frames: Frames) -> pd.DataFrame:
    """Return their figures: key, method, layer, metric, value; undefined ones are left out."""
    cells = _cells(frames)[["key", "method"]]
    layers = frames.layers[(frames.layers["fold"] == "all") & frames.layers["key"].isin(cells["key"])]
    return cells.merge(layers[["key", "layer", *METRICS]], on="key").melt(["key", "method", "layer"], list(METRICS), "metric").dropna(subset=["value"])


def grids(table: pd.DataFrame, layers: pd.DataFrame) -> list[Grid]:
    """Return the table of runs and the table of layers."""
    runs = []
    for row in table.to_dict("records"):
        named = [row["task"], row["method"], f"{row['seed']:.0f}", f"{row['order']:.0f}", rate(row["learning_rate"]), row["metric"]]
        runs.append([*named, *(number(row[name], 4) for name in ("ours", "theirs", "difference")), row["state"]])
    profiles = []
    for row in layers.to_dict("records"):
        values = [number(row[name]) for name in ("ours", "theirs", "difference")]
        profiles.append([row["method"], row["metric"], f"{row['layer']:.0f}", *values, f"{row['num_cells']} of {len(table) // 4}"])
    compared = ("ours", "theirs", "difference")
    return [
        Grid("Published figures per layer", ("method", "metric", "layer", *compared, "cells"), profiles, PROFILE_NOTE),
        Grid("Published figures per seed", ("task", "method", "seed", "order", "lr", "metric", *compared, "state"), runs, NOTE),
    ]


def verdict(table: pd.DataFrame) -> str:
    """Return how many figures are within, which fail, and which are missing."""
    lines = [f"{(table['state'] == 'within').sum()} of {len(table)} within {TOLERANCE:g}".replace(" 0.", " .")]
    for state, rows in table[table["state"] != "within"].groupby("state", sort=False):
        names = [f"{row.task} {row.method} ({row.seed:.0f}, {row.order:.0f}) {row.metric}" for row in rows.itertuples()]
        lines.append(f"{len(names)} {state}: {', '.join(names)}")
    return "\n".join(lines)


def main() -> int:
    """Print both tables and the verdict; return 0 if every figure is within, 1 if not, 2 if the store does not say which cells are meant."""
    frames = load(*stores())
    try:
        table = compare(frames)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    show(grids(table, profile(frames)))
    if others := sorted(set(_cells(frames)["model"]) - {PUBLISHED_MODEL}):
        print(
            f"the published figures are of {PUBLISHED_MODEL}, these of {', '.join(others)}: a difference says something of this system only if that is the same model"
        )
    print(verdict(table))
    return 0 if (table["state"] == "within").all() else 1


if __name__ == "__main__":
    sys.exit(main())
