"""How far the probabilities of the labels can be believed, and what is left of their bias. Pure functions in float64.

Knows label scores and gold labels. Knows nothing of models, folds or tables.
"""

# Q queries  C labels  K prompts without content

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from iclgd_dist.metrics import balanced_accuracy, label_nll, predictions

NUM_BINS = 10


@dataclass(frozen=True)
class Reliability:
    """What is said and what holds in each bin of confidence; NaN in an empty one."""

    count_B: Tensor
    confidence_B: Tensor  # mean probability of the predicted label
    accuracy_B: Tensor

    @property
    def error(self) -> float:
        """Expected calibration error: mean over queries of |accuracy - confidence| of their bin; NaN of no queries."""
        gap_B = (self.accuracy_B - self.confidence_B).abs().nan_to_num(0.0)
        return float((self.count_B * gap_B).sum() / self.count_B.sum())


def probabilities(label_scores_QC: Tensor) -> Tensor:
    """Return the label-normalised probabilities: softmax over the labels' scores."""
    return label_scores_QC.double().softmax(-1)


def reliability(probabilities_QC: Tensor, gold_Q: Tensor, *, equal_mass: bool = False) -> Reliability:
    """Sort queries by the probability of their predicted label into 10 bins of equal width, each with its upper end, or of equal number.

    The lowest of several labels with the same probability is the predicted one.
    Source: Guo et al. 2017; Li et al. 2023 (arXiv 2312.13772) for in-context learning.
    """
    confidence_Q = probabilities_QC.double().amax(1)
    right_Q = (predictions(probabilities_QC)[0] == gold_Q).double()
    if equal_mass:
        order_Q = confidence_Q.argsort(stable=True)
        bin_Q = torch.empty_like(order_Q)
        for number, members in enumerate(order_Q.tensor_split(NUM_BINS)):
            bin_Q[members] = number
    else:
        edges = torch.arange(1, NUM_BINS, dtype=torch.float64) / NUM_BINS
        bin_Q = torch.bucketize(confidence_Q, edges)  # an edge belongs to the bin below it
    count_B = bin_Q.bincount(minlength=NUM_BINS).double()
    sums = [torch.zeros(NUM_BINS, dtype=torch.float64).index_add_(0, bin_Q, values) for values in (confidence_Q, right_Q)]
    confidence_B, accuracy_B = (torch.where(count_B > 0, total / count_B, math.nan) for total in sums)
    return Reliability(count_B, confidence_B, accuracy_B)


def brier(probabilities_QC: Tensor, gold_Q: Tensor) -> float:
    """Return the mean over queries of the squared distance to the gold label's vertex: 0 for certain and right, 2 for certain and wrong."""
    vertex_QC = torch.nn.functional.one_hot(gold_Q, probabilities_QC.shape[1]).double()
    return float((probabilities_QC.double() - vertex_QC).square().sum(1).mean())


def entropy(probabilities_QC: Tensor) -> float:
    """Return the mean entropy of the labels' probabilities [nats]."""
    return float(torch.special.entr(probabilities_QC.double()).sum(1).mean())


def batch_calibrated(label_scores_QC: Tensor) -> Tensor:
    """Return the log-probabilities (Q, C) once each label's mean probability over the queries is divided out; needs no gold labels.

    Source: Zhou et al. 2024 (arXiv 2309.17249), batch calibration. It takes the labels to be equally frequent among the queries.
    """
    log_QC = label_scores_QC.double().log_softmax(1)
    return (log_QC - _log_mean(log_QC)).log_softmax(1)


def contextual_calibrated(label_scores_QC: Tensor, content_free_KC: Tensor) -> Tensor:
    """Return the log-probabilities (Q, C) once what the labels have after prompts without content is divided out.

    Source: Zhao et al. 2021 (arXiv 2102.09690), contextual calibration with the mean over several inputs without content.
    """
    log_QC = label_scores_QC.double().log_softmax(1)
    return (log_QC - _log_mean(content_free_KC.double().log_softmax(1))).log_softmax(1)


def figures(label_scores_QC: Tensor, gold_Q: Tensor) -> dict[str, float]:
    """Return the figures of calibration of some queries, as they are and by batch; nothing of no queries."""
    if not len(gold_Q):
        return {}
    said_QC = probabilities(label_scores_QC)
    found = {"ece": reliability(said_QC, gold_Q).error, "ece_mass": reliability(said_QC, gold_Q, equal_mass=True).error}
    found |= {"brier": brier(said_QC, gold_Q), "entropy": entropy(said_QC)}
    return found | {f"{name}_batch": value for name, value in of_calibrated(batch_calibrated(label_scores_QC), gold_Q).items()}


def of_calibrated(log_QC: Tensor, gold_Q: Tensor) -> dict[str, float]:
    """Return accuracy, loss and calibration of log-probabilities (Q, C) whose bias was divided out."""
    said_QC = log_QC.exp()
    right = {"balanced_accuracy": balanced_accuracy(predictions(log_QC)[0], gold_Q), "nll_label": float(label_nll(log_QC, gold_Q).mean())}
    return right | {"ece": reliability(said_QC, gold_Q).error, "brier": brier(said_QC, gold_Q)}


def _log_mean(log_KC: Tensor) -> Tensor:
    return log_KC.logsumexp(0) - math.log(len(log_KC))
