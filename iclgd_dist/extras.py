"""Figures of neighbouring work on a cell's captures, where [measures] asks for them: rows of kind `extra` of the nested `measures` column.

Knows captures, the baseline and the columns of a measure. Knows nothing of training or files. Groups (`name`): calibration, outputs, weights, change,
geometry; `supervised_icl` and `orders` are made elsewhere.
"""

# N lanes  L layers  Q queries  D width  R dimension of a subspace

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import Tensor

from iclgd_dist import calibration, geometry, metrics, outputs, spectra
from iclgd_dist.axes import Measures
from iclgd_dist.comparison import Baseline
from iclgd_dist.measures import measure_rows
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel
from iclgd_dist.rows import Row
from iclgd_dist.schema import CALIBRATED

# The groups that each kind of cell has, by the switch of [measures] that asks for them.
GROUPS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "zero_shot": {"calibration": ("calibration",), "geometry": ("geometry",)},
    "icl": {"calibration": ("calibration",), "spectra": ("change",), "geometry": ("geometry",)},
    "finetuned": {
        "calibration": ("calibration",),
        "outputs": ("outputs",),
        "spectra": ("weights", "change"),
        "geometry": ("geometry",),
        "supervised_icl": ("supervised_icl",),
    },
}


def groups_of(kind: str, measured: Measures) -> set[str]:
    """Return the groups that a cell of some kind has where the sweep asks for these measures."""
    return {group for switch, groups in GROUPS[kind].items() if getattr(measured, switch) for group in groups}


class Extras:
    """What a block's cells are measured by beside the papers' figures; what is the same for all of them is made once."""

    def __init__(self, lm: LanguageModel, baseline: Baseline, measured: Measures) -> None:
        self.lm, self.baseline, self.measured = lm, baseline, measured

    def of_zero_shot(self) -> list[Row]:
        return self._of_state(self.baseline.zero_shot)

    def of_icl(self) -> list[Row]:
        rows = self._of_state(self.baseline.in_context.capture)
        return rows + (self._of_layers("change", [_ranks(change_QD) for change_QD in self._icl_changes]) if self.measured.spectra else [])

    def of_finetuned(self, captures: Sequence[Capture], ranks: Sequence[Sequence[Mapping[str, float]]]) -> list[list[Row]]:
        """Return the rows of each lane; `ranks`: per lane and layer, what is known of the weights that training added."""
        compared = self._outputs(captures) if self.measured.outputs and captures else [list[Row]() for _ in captures]
        found = []
        for capture, of_lane, rows in zip(captures, ranks, compared, strict=True):
            rows += self._of_state(capture)
            if self.measured.spectra:
                rows += self._of_weights(of_lane) + self._of_layers("change", [self._change(layer, capture) for layer in range(len(self._icl_changes))])
            found.append(rows)
        return found

    def _of_state(self, capture: Capture) -> list[Row]:
        rows: list[Row] = []
        if self.measured.calibration:
            rows += _contextual(self.baseline, capture)
        if self.measured.geometry:
            rows += self._of_layers("geometry", [_geometry(layer_QD) for layer_QD in capture.attention_LQD])
        return rows

    def _outputs(self, captures: Sequence[Capture]) -> list[list[Row]]:
        in_context = self.baseline.in_context.capture.output_QD
        states = [capture.output_QD for capture in captures if capture.output_QD is not None]
        assert in_context is not None and len(states) == len(captures), "what the output head reads was not recorded"
        with self.lm.head() as head:
            found = outputs.compare_states(head, in_context, states)
        masks = self.baseline.fold_masks
        return [measure_rows("extra", "outputs", {name: values_NQ[lane] for name, values_NQ in found.items()}, masks) for lane in range(len(states))]

    @cached_property
    def _icl_changes(self) -> list[Tensor]:
        return [self._moved(layer, self.baseline.in_context.capture) for layer in range(len(self.baseline.zero_shot.attention_LQD))]

    @cached_property
    def _icl_subspaces(self) -> list[Tensor]:
        return [spectra.top_subspace(change_QD) for change_QD in self._icl_changes]

    def _moved(self, layer: int, capture: Capture) -> Tensor:
        """Return how a state's attention output (Q, D) differs from zero-shot's; zeros where that is at most 10 x the noise floor on average."""
        change_QD = capture.attention_LQD[layer].double() - self.baseline.zero_shot.attention_LQD[layer].double()
        is_moved = metrics.is_above_floor(change_QD.norm(dim=1).mean(), self.baseline.noise.attention_L[layer])
        return change_QD * is_moved

    def _change(self, layer: int, capture: Capture) -> dict[str, float]:
        """Return the ranks of finetuning's change of the attention output, and what of it is ICL's and of ICL's is its.

        Source: Chavan et al. 2024 (arXiv 2405.13039) for the eigenvalues of the change over queries.
        """
        icl_QD, own_QD, icl_DR = self._icl_changes[layer], self._moved(layer, capture), self._icl_subspaces[layer]
        own_DR = spectra.top_subspace(own_QD)
        cosines = spectra.principal_cosines(icl_DR, own_DR)
        return _ranks(own_QD) | {
            "icl_share_in_ft": spectra.share_inside(icl_QD, own_DR),
            "ft_share_in_icl": spectra.share_inside(own_QD, icl_DR),
            "principal_cosine": float(cosines.mean()) if len(cosines) else math.nan,
            "cka": spectra.linear_cka(icl_QD, own_QD),
        }

    def _of_weights(self, of_layers: Sequence[Mapping[str, float]]) -> list[Row]:
        return [_row("weights", metric, layer, "all", None, value) for layer, figures in enumerate(of_layers) for metric, value in figures.items()]

    def _of_layers(self, name: str, of_layers: Sequence[Mapping[str, float]]) -> list[Row]:
        """Return figures that all queries of a layer have together."""
        num_queries = len(self.baseline.gold_Q)
        return [_row(name, metric, layer, "all", num_queries, value) for layer, figures in enumerate(of_layers) for metric, value in figures.items()]


def _row(name: str, metric: str, layer: int | None, fold: str, n: int | None, value: float) -> Row:
    is_defined = math.isfinite(value)
    return {
        "kind": "extra",
        "name": name,
        "metric": metric,
        "layer": layer,
        "fold": fold,
        "n": n if is_defined or n is None else 0,
        "mean": value if is_defined else None,
        "sd": None,
    }


def _contextual(baseline: Baseline, capture: Capture) -> list[Row]:
    if capture.blank_scores_KC is None:  # none is as short as a query
        return _accuracy_rows("calibration", capture.label_scores_QC * math.nan, baseline)
    log_QC = calibration.contextual_calibrated(capture.label_scores_QC, capture.blank_scores_KC)
    return _accuracy_rows("calibration", log_QC, baseline)


def supervised_rows(label_scores_QC: Tensor, baseline: Baseline) -> list[Row]:
    """Return what a finetuned model says with the demonstrations in the prompt; undefined where that is not finite."""
    return _accuracy_rows("supervised_icl", label_scores_QC.log_softmax(1), baseline)


def _accuracy_rows(name: str, log_QC: Tensor, baseline: Baseline) -> list[Row]:
    """Return accuracy, loss and calibration of log-probabilities (Q, C), for each fold that has queries."""
    rows = []
    for fold, mask_Q in baseline.fold_masks.items():
        if n := int(mask_Q.sum()):
            is_finite = bool(log_QC.isfinite().all())
            found = calibration.of_calibrated(log_QC[mask_Q], baseline.gold_Q[mask_Q]) if is_finite else dict.fromkeys(CALIBRATED, math.nan)
            rows += [_row(name, metric, None, fold, n, value) for metric, value in found.items()]
    return rows


def _ranks(change_QD: Tensor) -> dict[str, float]:
    squares_S = spectra.squared_singular_values(change_QD)
    found = {"stable_rank": spectra.stable_rank, "effective_rank": spectra.effective_rank, "participation_ratio": spectra.participation_ratio}
    return {name: float(rank(squares_S)) for name, rank in found.items()}


def _geometry(values_QD: Tensor) -> dict[str, float]:
    return {"learnability": geometry.learnability(values_QD), "intrinsic_dimension": geometry.two_nn(values_QD)}
