"""What the cells of a search score on a fold. Reads the store; knows nothing of samplers or rungs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields

import pyarrow as pa
import pyarrow.compute as pc

from iclgd_dist.store import Results, Store, read_results

from .load import frames


def fold_figures(store: Store, keys: Sequence[str], metrics: Sequence[str], *, fold: str) -> dict[str, dict[str, float | None]]:
    """Return the figures of cells on a fold, by key and metric, None = undefined; nothing for a cell that is not there."""
    results, wanted = read_results(store), pa.array(keys, pa.string())
    tables = {each.name: getattr(results, each.name) for each in fields(Results)}
    kept = {name: table if name == "attempts" else table.filter(pc.is_in(table[0].cast(pa.string()), wanted)) for name, table in tables.items()}
    found = frames(Results(**kept), with_search=True)
    there = found.cells["key"]
    columns = {metric: found.figures(there, metric, fold) for metric in metrics}
    return {key: {metric: None if math.isnan(column[key]) else float(column[key]) for metric, column in columns.items()} for key in there}
