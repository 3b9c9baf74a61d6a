"""Whether another procedure's figures of a cell are those in the store, within what float32 allows. Not a test.

Knows rows and tensors. Knows nothing of models. The same products in another order differ in the last bits, and a cosine of two small changes by more.
"""

# Shapes: L layers  Q queries  H heads  C labels

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from iclgd_dist.schema import FLOOR_FACTOR
from iclgd_dist.store import Store, read_results

TOLERANCE = {"label_scores": 1e-3, "delta_norms": 1e-3, "cosine": 1e-3}  # a learning rate off by 1 % moves the delta norms by 1 %
Key = tuple[str | None, float | None, int | None]  # method, learning rate, step; the kind and None for a baseline


class Stored:
    """The cells of one block in a store."""

    def __init__(self, store: Store) -> None:
        results = read_results(store)
        layers, examples = defaultdict(list), defaultdict(list)
        for table, found in ((results.layers, layers), (results.examples, examples)):
            for row in table.to_pylist():
                if row["fold"] == "all" or table is results.examples:
                    found[row["key"]].append(row)
        self.cells: dict[Key, dict[str, Any]] = {}
        for row in results.cells.to_pylist():
            key = (row["method"] or row["kind"], row["learning_rate"], row["step"])
            self.cells[key] = row | {"layers": layers[row["key"]], "examples": examples[row["key"]]}

    def errors(self, key: Key, found: Mapping[str, Tensor], queries: Sequence[int] | None = None) -> dict[str, float]:
        """Return the largest difference of each figure. `queries`: which of them were computed, if not all.

        Errors: AssertionError naming the cell and the figure that is not the same.
        """
        row = self.cells[key]
        is_finite = all(bool(figure.isfinite().all()) for name, figure in found.items() if name in ("label_scores", "delta_norms"))
        assert is_finite == (row["status"] == "done"), f"{key}: only one of the two procedures diverged"
        if not is_finite:
            return {}
        chosen = [row["examples"][n] for n in queries] if queries is not None else row["examples"]
        errors = {"label_scores": _largest(found["label_scores"] - torch.tensor([each["label_scores"] for each in chosen], dtype=torch.float64))}
        predicted = found["label_scores"].argmax(1).tolist()
        for query, (mine, each) in enumerate(zip(predicted, chosen, strict=True)):
            first, second = sorted(each["label_scores"], reverse=True)[:2]
            assert mine == each["prediction"] or first - second <= 2 * TOLERANCE["label_scores"], f"{key}, query {query}: another label is predicted"
        if "delta_norms" in found:
            norms = torch.tensor([[layer["delta_norm_k"], layer["delta_norm_v"]] for layer in row["layers"]])
            # In units of the largest layer's: where little is learnt, weights written in float32 are rounded by as much.
            errors["delta_norms"] = _largest(found["delta_norms"] - norms) / float(norms.max())
        floors = {"sim_aou": torch.tensor([layer["noise_floor"] for layer in row["layers"]])[:, None, None]}
        floors["sim_am_delta"] = torch.tensor([layer["noise_floor_scores"] for layer in row["layers"]])[:, None, :]
        floors["sim_am_delta"][0] = torch.inf  # the first layer does not count
        for name in (name for name in found if f"{name}_norms" in found):
            mean_Q, unsure_Q = _mean(found[name], found[f"{name}_norms"], FLOOR_FACTOR * floors[name.removesuffix("_prefix")])
            stored_Q = torch.tensor([torch.nan if each[name] is None else each[name] for each in chosen], dtype=torch.float64)
            is_undefined = mean_Q.isnan() & stored_Q.isnan()
            errors[name] = _largest(((mean_Q - stored_Q).abs() - unsure_Q).where(~is_undefined, 0.0).clamp(min=0))
        for name, error in errors.items():
            allowed = TOLERANCE.get(name, TOLERANCE["cosine"])
            assert error <= allowed, f"{key}: {name} differs by {error:.1e}, {allowed:.0e} is allowed"
        return errors


def _mean(cosine: Tensor, norms: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over heads and layers of cosines whose changes both exceed the threshold, and what those at its edge may add or take (Q,)."""
    cosine, smaller = (values if values.dim() == 3 else values[..., None] for values in (cosine, norms.amin(0)))
    counts, is_edge = smaller > threshold, (smaller / threshold - 1).abs() < 0.1
    by_layer = torch.where(counts, cosine, torch.nan).nanmean(-1)
    unsure = is_edge.sum(-1) / (counts | is_edge).sum(-1)
    return by_layer.nanmean(0), 2 * unsure.nansum(0) / (~unsure.isnan()).sum(0).clamp(min=1)


def _largest(difference: Tensor) -> float:
    return float(difference.abs().nan_to_num(torch.inf).max())
