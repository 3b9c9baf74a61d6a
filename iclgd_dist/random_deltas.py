"""Random weights of the same effect: gaussian deltas as large, matrix by matrix, as a trained cell's, times one factor that makes them move the states as far.

Knows deltas, passes of queries and the columns of a measure. Knows nothing of training. Matching the size of the weights alone is no control: random
deltas of the trained size move outputs 30 to 90 times less.
"""

# Shapes: N lanes  L layers  Q queries  I inputs  O outputs

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iclgd_dist import metrics
from iclgd_dist.baselines import queries_of
from iclgd_dist.blocks import Block, RandomTarget
from iclgd_dist.comparison import Baseline
from iclgd_dist.deltas import ALL_PARTS, Delta
from iclgd_dist.encoding import Encoded
from iclgd_dist.measures import measure_rows, similarities_of
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel
from iclgd_dist.rows import Row, whole_ratio
from iclgd_dist.sites import Site, sites

NUM_DRAWS = 3
NUM_SEARCH_QUERIES = 32
TOLERANCE = 0.05  # of R
MAX_ROUNDS = 12


@dataclass
class _Lane:
    """One draw for one trained cell, and what is known of how far a factor moves the states."""

    target: RandomTarget
    draw: int
    factor: float = 50.0  # random deltas move outputs 30 to 90 times less than trained ones of their size
    seen: tuple[float, float] | None = None  # the factor before and the ratio that it gave

    def learn(self, ratio: float) -> None:
        """Choose the next factor: a secant in logarithms, at first with slope 1."""
        log_ratio, log_target = math.log(ratio), math.log(self.target.update_ratio)
        slope = 1.0
        if self.seen is not None and self.seen[0] != self.factor:
            slope = (log_ratio - math.log(self.seen[1])) / (math.log(self.factor) - math.log(self.seen[0]))
        self.seen, step = (self.factor, ratio), (log_target - log_ratio) / (slope if slope > 0.2 else 1.0)
        self.factor *= math.exp(max(-2.0, min(2.0, step)))

    def is_near(self, ratio: float) -> bool:
        return math.isfinite(ratio) and abs(ratio / self.target.update_ratio - 1) <= TOLERANCE


def random_measures(lm: LanguageModel, block: Block, encoded: Encoded, baseline: Baseline) -> Iterator[tuple[str, list[Row]]]:
    """Yield (stage, rows of measures with their cell's key) for three draws of each target, until all are found or given up.

    A draw whose R does not come within 5 % of the cell's has its own R and no similarity.
    """
    lanes = [_Lane(target, draw) for target in block.random_targets for draw in range(NUM_DRAWS)]
    numbers = range(min(NUM_SEARCH_QUERIES, len(encoded.queries)))
    searching = lanes
    for attempt in range(1, MAX_ROUNDS + 1):
        ratios = [_ratio(baseline, capture, list(numbers)) for capture in _captured(lm, block, encoded, searching, numbers)]
        still = []
        for lane, ratio in zip(searching, ratios, strict=True):
            if not math.isfinite(ratio):
                lane.factor *= 0.25  # too far: the states are not finite
            elif ratio <= 0:
                lane.factor *= 4.0  # within the noise
            else:
                lane.learn(ratio)  # also where it is near: then the better guess need not be tried on these queries again
                if lane.is_near(ratio):
                    continue
            still.append(lane)
        searching = still
        yield f"search {attempt}: {len(lanes) - len(still)} of {len(lanes)} found", []
        if not still:
            break
    everything, searching = range(len(encoded.queries)), lanes
    for lane in lanes:
        lane.seen = None  # on all queries R is another: one or two more steps settle it
    rows: list[Row] = []
    for attempt in range(1, 4):
        off = []
        for lane, capture in zip(searching, _captured(lm, block, encoded, searching, everything), strict=True):
            ratio = _ratio(baseline, capture, list(everything))
            if attempt < 3 and not lane.is_near(ratio) and math.isfinite(ratio) and ratio > 0:
                lane.learn(ratio)
                off.append(lane)
            else:
                rows += [{"key": lane.target.key, **row} for row in _rows(baseline, lane, capture, ratio)]
        searching = off
        yield f"{len(lanes) - len(off)} of {len(lanes)} compared", [] if off else rows
        if not off:
            break


def _rows(baseline: Baseline, lane: _Lane, capture: Capture, ratio: float) -> list[Row]:
    name = f"random_delta_{lane.draw}"
    found: dict[str, Tensor] = {}
    if lane.is_near(ratio) and capture.is_finite():
        found = similarities_of(baseline, capture)
        right_Q = (metrics.predictions(capture.label_scores_QC)[0] == baseline.gold_Q).double()
        found["accuracy"] = right_Q
    else:
        nothing_LQ = torch.full_like(baseline.in_context.norm_LQ, math.nan)
        found = dict.fromkeys(("sim_aou", "sim_aou_norm", "sim_am_delta"), nothing_LQ)
    rows = measure_rows("control", name, found, baseline.fold_masks)
    if not capture.is_finite():
        return rows
    norm_LQ = _norms(baseline, capture, list(range(len(baseline.gold_Q))))
    floor_L = torch.stack([baseline.floors(layer)[0] for layer in range(len(norm_LQ))])
    for fold, mask_Q in baseline.fold_masks.items():
        ratio_L = metrics.update_ratio(norm_LQ[:, mask_Q], baseline.in_context.norm_LQ[:, mask_Q])
        ratio_L = metrics.defined_where(metrics.is_above_floor(norm_LQ[:, mask_Q].mean(1), floor_L), ratio_L)  # as in R
        shared = {"kind": "control", "name": name, "metric": "update_ratio", "fold": fold, "n": int(mask_Q.sum()), "sd": None}
        rows += [shared | {"layer": layer, "mean": float(value) if value.isfinite() else None} for layer, value in enumerate(ratio_L)]
    return rows


def _ratio(baseline: Baseline, capture: Capture, numbers: Sequence[int]) -> float:
    """Return R over some queries: the geometric mean over layers of the update ratio; NaN where a state is not finite."""
    if not capture.is_finite():
        return math.nan
    norm_LQ = _norms(baseline, capture, numbers)
    return whole_ratio(baseline, metrics.update_ratio(norm_LQ, baseline.in_context.norm_LQ[:, list(numbers)]), norm_LQ)


def _norms(baseline: Baseline, capture: Capture, numbers: Sequence[int]) -> Tensor:
    change_LQD = capture.attention_LQD.double() - baseline.zero_shot.attention_LQD[:, list(numbers)].double()
    return torch.linalg.vector_norm(change_LQD, dim=-1)


@torch.no_grad()
def _captured(lm: LanguageModel, block: Block, encoded: Encoded, lanes: Sequence[_Lane], numbers: range) -> list[Capture]:
    query_pass = queries_of(lm, block, encoded, num_lanes=len(lanes), numbers=numbers)
    for index in range(lm.num_layers):
        with lm.resident(index) as layer:
            query_pass.climb(layer, index, _deltas(lm, index, lanes))
    captures: list[Capture] = query_pass.captures()
    return captures


def _deltas(lm: LanguageModel, index: int, lanes: Sequence[_Lane]) -> dict[str, Delta]:
    """Return the deltas of one layer for all lanes; drawn anew at each use, so that those of a whole model never exist at once."""
    by_part: dict[str, list[Site]] = {}
    for site in sites(lm, index, ALL_PARTS).values():
        part = site.part.partition(".")[0]
        if any(_norm(lane.target.norms, part, index) for lane in lanes):
            by_part.setdefault(part, []).append(site)
    made: dict[str, list[Tensor]] = {}
    for lane in lanes:
        for part, of_part in by_part.items():
            norm = _norm(lane.target.norms, part, index)
            drawn = [_gaussian(lane, site) for site in of_part]
            total = math.sqrt(sum(float(tensor.square().sum()) for tensor in drawn))
            for site, tensor in zip(of_part, drawn, strict=True):
                made.setdefault(site.name, []).append(tensor * (lane.factor * norm / total))
    device, dtype = lm.device_of(lm.layers[index]), lm.delta_dtype
    found = {}
    for of_part in by_part.values():
        for site in of_part:
            stacked = torch.stack(made[site.name]).to(device, dtype)
            found[site.name] = Delta(stacked[:, : site.num_inputs], stacked[:, site.num_inputs] if site.has_bias else None)
    return found


def _norm(norms: Mapping[str, Sequence[float | None]], part: str, index: int) -> float:
    return (norms[part][index] or 0.0) if part in norms else 0.0


def _gaussian(lane: _Lane, site: Site) -> Tensor:
    """Return a gaussian matrix with the bias as its last row, drawn from the cell, the draw and the site alone."""
    seed = int(hashlib.sha256(f"{lane.target.key}:{lane.draw}:{site.name}".encode()).hexdigest()[:15], 16)
    shape = (site.num_inputs + (1 if site.has_bias else 0), site.num_outputs)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
