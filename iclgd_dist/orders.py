"""Orders crossed: each finetuned cell against ICL in every order of its seed's demonstrations, from kept captures and without a model.

Knows blocks, captures and the columns of a measure. Knows nothing of training. If gradient descent takes the demonstrations one after the other as
in-context learning does, finetuning in one order is closest to ICL in the same order.
"""

# L layers  Q queries

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from iclgd_dist import captures, measured
from iclgd_dist import store as stores
from iclgd_dist.blocks import Block
from iclgd_dist.comparison import Baseline
from iclgd_dist.measures import similarities_of
from iclgd_dist.measuring import Missing, kept_baseline
from iclgd_dist.metrics import Capture, NoiseFloor
from iclgd_dist.store import Results, Store

METRICS = ("sim_aou", "sim_am_delta")


def cross_orders(store: Store, results: Results, blocks: Sequence[Block]) -> tuple[int, int]:
    """Compare the kept captures of whole blocks that differ in order only, and commit what is new.

    Returns how many cells were measured, and how many could not be for want of a capture that the sweep asks for: their own, zero-shot's or ICL's.
    Errors: StoreError for a capture that is damaged.
    """
    missing, num_measured, num_without = Missing(results), 0, 0
    groups: dict[tuple[str, int, int], list[Block]] = defaultdict(list)
    for block in blocks:
        groups[block.cells[0].key, block.num_demonstrations, block.seed].append(block)
    for group in groups.values():
        baselines: dict[int, Baseline | None] | None = None
        rows: list[dict[str, Any]] = []
        for block in group:
            shown = {block.order: block.draw.demonstrations}  # the first demonstrations may come out in the same order twice
            for other in group:
                if other.draw.demonstrations not in shown.values():
                    shown[other.order] = other.draw.demonstrations
            for cell in block.cells:
                is_asked = cell.is_kept or cell.key in missing.kept  # keep = "final_step" asks for no capture of earlier ones
                if cell.kind != "finetuned" or cell.key not in missing.done or not is_asked or len(shown) < 2:
                    continue
                lacking = [order for order in shown if (cell.key, "extra", f"order:{order}") not in missing.known]
                if not lacking:
                    continue
                baselines = baselines or _baselines(store, results, missing, group)
                there = {order: baseline for order in lacking if (baseline := baselines[order]) is not None}
                capture = captures.recall(store, cell.key, missing.kept[cell.key]) if there and cell.key in missing.kept else None
                num_without += capture is None or len(there) < len(lacking)
                if capture is not None:
                    rows += [{"key": cell.key, **row} for row in order_rows(there, capture)]
                    num_measured += 1
        measured.commit(store.root, rows, reach=stores.fault_point)
    return num_measured, num_without


def _baselines(store: Store, results: Results, missing: Missing, group: Sequence[Block]) -> dict[int, Baseline | None]:
    """Return the baseline of each order; None where a capture is missing."""
    (zero_shot,) = {cell.key for block in group for cell in block.cells if cell.kind == "zero_shot"}
    capture = captures.recall(store, zero_shot, missing.kept[zero_shot]) if zero_shot in missing.kept else None
    noise, found = _noise(results, zero_shot), dict[int, Baseline | None]()
    for block in group:
        (key,) = [cell.key for cell in block.cells if cell.kind == "icl"]
        icl = captures.recall(store, key, missing.kept[key]) if key in missing.kept else None
        found[block.order] = None if capture is None or icl is None else kept_baseline(block, capture, icl, noise=noise)
    return found


def _noise(results: Results, zero_shot: str) -> NoiseFloor:
    """Return the noise floors that were found with a zero-shot cell."""
    rows = results.layers.filter(pc.and_(pc.equal(results.layers["key"].cast(pa.string()), zero_shot), pc.equal(results.layers["fold"], "all")))
    layers = rows.select(["layer", "noise_floor", "noise_floor_scores"]).sort_by("layer").to_pylist()
    floors = [torch.tensor([row[name] for row in layers], dtype=torch.float64) for name in ("noise_floor", "noise_floor_scores")]
    return NoiseFloor(*floors)


def order_rows(baselines: Mapping[int, Baseline], finetuned: Capture) -> list[dict[str, Any]]:
    """Return the similarities of a finetuned state with ICL in each order: means over layers of means over queries."""
    rows = []
    for order, baseline in baselines.items():
        figures = similarities_of(baseline, finetuned)
        for metric in METRICS:
            skips = metric == "sim_am_delta" and not baseline.counts_first_layer
            values_LQ = figures[metric][1:] if skips else figures[metric]
            for fold, mask_Q in baseline.fold_masks.items():
                of_fold = values_LQ[:, mask_Q]
                n = int(of_fold.isfinite().any(0).sum())
                row: dict[str, Any] = {"kind": "extra", "name": f"order:{order}", "metric": metric, "layer": None, "fold": fold, "n": n}
                rows.append(row | {"mean": float(of_fold.nanmean(1).nanmean()) if n else None, "sd": None})
    return rows
