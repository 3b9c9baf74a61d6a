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
from torch import Tensor

from iclgd_dist import captures, measured
from iclgd_dist import store as stores
from iclgd_dist.blocks import Block
from iclgd_dist.comparison import Baseline
from iclgd_dist.measures import similarities_of
from iclgd_dist.measuring import Missing, kept_baseline
from iclgd_dist.metrics import Capture, NoiseFloor
from iclgd_dist.store import Results, Store

METRICS = ("sim_aou", "sim_am_delta")


def cross_orders(store: Store, results: Results, blocks: Sequence[Block]) -> int:
    """Compare the kept captures of whole blocks that differ in order only, commit what is new, and return how many cells were measured.

    Errors: StoreError for a capture that is damaged.
    """
    missing, num_measured = Missing(results), 0
    groups: dict[tuple[str, int, int], list[Block]] = defaultdict(list)
    for block in blocks:
        groups[block.cells[0].key, block.num_demonstrations, block.seed].append(block)
    for group in groups.values():
        lacking = {cell.key: block.order for block in group for cell in block.cells if cell.kind == "finetuned" and _lacks(cell.key, missing)}
        if len(group) < 2 or not lacking:
            continue
        baselines = {block.order: found for block in group if (found := _baseline(store, results, missing, block)) is not None}
        rows: list[dict[str, Any]] = []
        for key, order in lacking.items():
            capture = captures.recall(store, key, missing.kept[key]) if len(baselines) > 1 and order in baselines else None
            if capture is not None:
                rows += [{"key": key, **row} for row in order_rows(baselines, order, capture)]
                num_measured += 1
        measured.commit(store.root, rows, reach=stores.fault_point)
    return num_measured


def _lacks(key: str, missing: Missing) -> bool:
    return key in missing.done and key in missing.kept and (key, "extra", "orders") not in missing.known


def _baseline(store: Store, results: Results, missing: Missing, block: Block) -> Baseline | None:
    found: dict[str, Capture] = {}
    for cell in block.cells:
        if cell.kind != "finetuned" and cell.key in missing.kept and (capture := captures.recall(store, cell.key, missing.kept[cell.key])) is not None:
            found[cell.kind] = capture
    if found.keys() != {"zero_shot", "icl"}:
        return None
    return kept_baseline(block, found["zero_shot"], found["icl"], noise=_noise(results, block.cells[0].key))


def _noise(results: Results, zero_shot: str) -> NoiseFloor:
    """Return the noise floors that were found with a zero-shot cell."""
    rows = results.layers.filter(pc.and_(pc.equal(results.layers["key"].cast(pa.string()), zero_shot), pc.equal(results.layers["fold"], "all")))
    layers = rows.select(["layer", "noise_floor", "noise_floor_scores"]).sort_by("layer").to_pylist()
    floors = [torch.tensor([row[name] for row in layers], dtype=torch.float64) for name in ("noise_floor", "noise_floor_scores")]
    return NoiseFloor(*floors)


def order_rows(baselines: Mapping[int, Baseline], order: int, finetuned: Capture) -> list[dict[str, Any]]:
    """Return the similarity of a finetuned state with ICL in its own order, the mean over the other orders, and the first less the second (order_match)."""
    found = {each: similarities_of(baseline, finetuned) for each, baseline in baselines.items()}
    rows, baseline = [], baselines[order]
    for metric in METRICS:
        for fold, mask_Q in baseline.fold_masks.items():
            of_order = {each: _over_layers(figures[metric], metric, mask_Q, baseline) for each, figures in found.items()}
            others = torch.stack([value for each, value in of_order.items() if each != order])
            values = {f"{metric}_same_order": of_order[order], f"{metric}_other_order": others.mean(), f"order_match_{metric}": of_order[order] - others.mean()}
            for name, value in values.items():
                is_defined = bool(value.isfinite())
                n = int(mask_Q.sum()) if is_defined else 0
                row: dict[str, Any] = {"kind": "extra", "name": "orders", "metric": name, "layer": None, "fold": fold, "n": n}
                rows.append(row | {"mean": float(value) if is_defined else None, "sd": None})
    return rows


def _over_layers(similarity_LQ: Tensor, metric: str, mask_Q: Tensor, baseline: Baseline) -> Tensor:
    of_fold = similarity_LQ[:, mask_Q]
    if metric == "sim_am_delta" and not baseline.counts_first_layer:
        of_fold = of_fold[1:]
    return of_fold.nanmean(1).nanmean()
