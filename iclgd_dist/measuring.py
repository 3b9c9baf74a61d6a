"""Which measures the cells of a sweep lack, and those that kept captures can give without a model.

Knows plans, results and captures. Knows nothing of Ray. The rest becomes blocks that train just those cells again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from iclgd_dist import captures, measured
from iclgd_dist import store as stores
from iclgd_dist.blocks import Block, Cell, RandomTarget
from iclgd_dist.comparison import Baseline, make_baseline
from iclgd_dist.encoding import Encoded
from iclgd_dist.extras import groups_of
from iclgd_dist.families import family_of
from iclgd_dist.measures import MetricError, metric_measures
from iclgd_dist.metrics import Capture, NoiseFloor
from iclgd_dist.random_deltas import NUM_DRAWS
from iclgd_dist.store import Results, Store

OF_CONTEXTS = ("other_query", "centred")  # controls that come with any context


class Missing:
    """What is there, what a block lacks of it, and what of that kept captures can give."""

    def __init__(self, results: Results) -> None:
        cells = results.cells.select(["key", "status", "capture_sha256"]).to_pylist()
        self.done = {cell["key"] for cell in cells if cell["status"] == "done"}
        self.kept = {cell["key"]: cell["capture_sha256"] for cell in cells if cell["capture_sha256"] is not None}
        self.known: set[tuple[str, str, str]] = set()  # (key of the cell, kind, name)
        for kind, table in (("control", results.controls), ("pair", results.pairs), ("metric", results.metrics), ("extra", results.extras)):
            named = pa.table([table[0].cast(pa.string()), table[1]], names=["key", "name"]).group_by(["key", "name"]).aggregate([])
            self.known |= {(key, kind, name) for key, name in zip(named["key"].to_pylist(), named["name"].to_pylist(), strict=True)}

    def of_block(self, block: Block, encoded: Encoded) -> dict[Cell, set[tuple[str, str]]]:
        """Return (kind, name) of the measures that the committed cells of a block lack; a pair is lacking at its second cell.

        Cells of two methods are a pair where they agree in learning rate and step; at the last step of each whatever their learning rates.
        """
        finetuned = [cell for cell in block.cells if cell.kind == "finetuned" and cell.key in self.done]
        wanted = {cell: {("metric", spec.version) for spec in block.metrics} for cell in finetuned}
        for cell in block.cells:
            if cell.key in self.done and (groups := groups_of(cell.kind, block.measured)):
                wanted.setdefault(cell, set()).update(("extra", group) for group in groups)
        contexts = set(encoded.control_contexts)
        if "shifted" in block.controls.contexts and not family_of(block.model.model_type).has_relative_positions:
            contexts.add("shifted")
        for cell in [*finetuned, *(cell for cell in block.cells if cell.kind == "icl" and cell.key in self.done)]:
            others = set(OF_CONTEXTS) if contexts and cell.kind == "finetuned" else set()
            wanted.setdefault(cell, set()).update(("control", name) for name in contexts | others)
        points = {cell.key: cell.point for cell in finetuned}
        for number, cell in enumerate(finetuned):
            for other in finetuned[:number]:
                is_pair = other.method != cell.method and points[other.key] == points[cell.key]
                if is_pair and (other.key, "pair", cell.key) not in self.known:
                    wanted[cell].add(("pair", other.key))
        return {
            cell: lacking for cell, names in wanted.items() if (lacking := {(kind, name) for kind, name in names if (cell.key, kind, name) not in self.known})
        }

    def to_train(self, block: Block, encoded: Encoded) -> tuple[Cell, ...]:
        """Return the cells that must be computed again: those that lack something, and their partners in pairs."""
        lacking = self.of_block(block, encoded)
        partners = {name for names in lacking.values() for kind, name in names if kind == "pair"}
        return tuple(cell for cell in block.cells if cell in lacking or cell.key in partners)


def measure_kept(store: Store, block: Block, missing: Missing, encoded: Encoded) -> int:
    """Compute the metrics that a block's cells lack from kept captures, where these are there, and return how many cells were measured.

    Errors: SweepError for a metric that fails; StoreError for a capture that is damaged.
    """
    keys = {cell.kind: cell.key for cell in block.cells if cell.kind != "finetuned"}
    if not {keys["zero_shot"], keys["icl"]} <= missing.kept.keys():
        return 0
    lacking = {cell: {name for kind, name in names if kind == "metric"} for cell, names in missing.of_block(block, encoded).items()}
    found = {key: captures.recall(store, key, missing.kept[key]) for key in (keys["zero_shot"], keys["icl"])}
    zero_shot, in_context = found[keys["zero_shot"]], found[keys["icl"]]
    if zero_shot is None or in_context is None:
        return 0
    baseline, rows, num_measured = kept_baseline(block, zero_shot, in_context), list[dict[str, Any]](), 0
    for cell, versions in lacking.items():
        capture = captures.recall(store, cell.key, missing.kept[cell.key]) if versions and cell.key in missing.kept else None
        if capture is not None:
            specs = [spec for spec in block.metrics if spec.version in versions]
            found_rows, problems = metric_measures(baseline, specs, capture)
            if problems:
                raise MetricError(problems[0])
            rows += [{"key": cell.key, **row} for row in found_rows]
            num_measured += 1
    measured.commit(store.root, rows, reach=stores.fault_point)
    missing.known |= {(row["key"], row["kind"], row["name"]) for row in rows}
    return num_measured


def kept_baseline(block: Block, zero_shot: Capture, in_context: Capture, *, noise: NoiseFloor | None = None) -> Baseline:
    """Return the baseline of kept captures. Without `noise`, no change lies below its floor: metrics of one's own have none."""
    num_layers, _, num_heads, _ = zero_shot.scores_LQHT.shape
    queries = block.draw.queries
    return make_baseline(
        zero_shot=zero_shot,
        in_context=in_context,
        noise=noise or NoiseFloor(torch.zeros(num_layers), torch.zeros(num_layers, num_heads)),
        gold_Q=[query.label for query in queries],
        folds_Q=[query.fold for query in queries],
        query_ids=[query.id for query in queries],
        label_words=block.draw.label_words,
        is_first_layer_still=family_of(block.model.model_type).has_relative_positions,
        counts_first_layer=block.protocol.first_layer == "count",
        has_eps=block.protocol.undefined == "eps",
    )


def random_targets(results: Results, keys: Collection[str], missing: Missing) -> dict[str, RandomTarget]:
    """Return, for those of the cells that lack their random weights, what these have to match."""
    wanted = [key for key in keys if any((key, "control", f"random_delta_{draw}") not in missing.known for draw in range(NUM_DRAWS))]
    ratios = dict(zip(*(results.cells[name].to_pylist() for name in ("key", "update_ratio")), strict=True))
    norms: dict[str, dict[str, list[float | None]]] = {}
    columns = ["key", "layer", "fold", *(f"delta_norm_{part}" for part in ("q", "k", "v", "o", "mlp"))]
    for row in _of_keys(results, columns, set(wanted)):
        for part in ("q", "k", "v", "o", "mlp"):
            norms.setdefault(row["key"], {}).setdefault(part, []).append(row[f"delta_norm_{part}"])
    return {
        key: RandomTarget(key, ratios[key], {part: tuple(values) for part, values in norms[key].items() if any(values)})
        for key in wanted
        if key in missing.done and ratios.get(key)
    }


def _of_keys(results: Results, columns: list[str], keys: set[str]) -> Iterator[Mapping[str, Any]]:
    table = results.layers.select(columns)
    chosen = pc.and_(pc.is_in(table["key"].cast(pa.string()), pa.array(sorted(keys), pa.string())), pc.equal(table["fold"], "all"))
    return iter(table.filter(chosen).sort_by([("layer", "ascending")]).to_pylist())


def with_targets(block: Block, targets: Mapping[str, RandomTarget], with_cells: Callable[[tuple[Cell, ...]], Block]) -> Block | None:
    """Return the block that makes the random weights of its cells, or None where none of them is a target."""
    cells = tuple(cell for cell in block.cells if cell.key in targets)
    return replace(with_cells(cells), is_measuring=True, random_targets=tuple(targets[cell.key] for cell in cells)) if cells else None
