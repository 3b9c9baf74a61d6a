"""Calibration against plain loops and scikit-learn, and by algebra."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from iclgd_dist import calibration
from iclgd_dist.metrics import label_nll

Q, C = 203, 4


def scores(seed: int, *shape: int) -> torch.Tensor:
    return 3 * torch.randn(*(shape or (Q, C)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gold(seed: int) -> torch.Tensor:
    return torch.randint(C, (Q,), generator=torch.Generator().manual_seed(seed))


def slow_error(probabilities: np.ndarray, right: np.ndarray, bins: list[list[int]]) -> float:
    return sum(len(bin) / len(right) * abs(right[bin].mean() - probabilities[bin].mean()) for bin in bins if bin)


def test_the_expected_calibration_error_is_that_of_a_plain_loop() -> None:
    said, truth = calibration.probabilities(scores(1)), gold(2)
    confidence, right = said.numpy().max(1), (said.numpy().argmax(1) == truth.numpy()).astype(float)
    by_width = [[n for n, c in enumerate(confidence) if b / 10 < c <= (b + 1) / 10] for b in range(10)]
    by_mass = [list(part) for part in np.array_split(np.argsort(confidence, kind="stable"), 10)]
    assert calibration.reliability(said, truth).error == pytest.approx(slow_error(confidence, right, by_width), abs=1e-12)
    assert calibration.reliability(said, truth, equal_mass=True).error == pytest.approx(slow_error(confidence, right, by_mass), abs=1e-12)


def test_the_reliability_diagram_is_scikit_learns() -> None:
    said, truth = calibration.probabilities(scores(3)), gold(4)
    found = calibration.reliability(said, truth)
    right = said.argmax(1) == truth
    accuracy, confidence = calibration_curve(right.numpy(), said.amax(1).numpy(), n_bins=10)
    kept = found.count_B > 0
    assert np.allclose(found.accuracy_B[kept], accuracy, atol=1e-12) and np.allclose(found.confidence_B[kept], confidence, atol=1e-12)
    assert found.count_B.sum() == Q and found.accuracy_B[~kept].isnan().all()


def test_an_edge_belongs_to_the_bin_below_it_and_ties_go_to_the_lowest_label() -> None:
    said = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.0, 1.0]], dtype=torch.float64)
    found = calibration.reliability(said, torch.tensor([0, 1, 1]))
    assert found.count_B.tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert found.accuracy_B[[4, 5, 9]].tolist() == [1.0, 0.0, 1.0] and found.error == pytest.approx((0.5 + 0.6 + 0.0) / 3)


def test_brier_and_entropy() -> None:
    said, truth = calibration.probabilities(scores(5)), gold(6)
    assert calibration.brier(said, truth) == pytest.approx(brier_score_loss(truth, said, labels=range(C), scale_by_half=False), abs=1e-12)
    assert label_nll(scores(5), truth).mean().item() == pytest.approx(log_loss(truth, said, labels=range(C)), abs=1e-12)
    assert calibration.entropy(said) == pytest.approx(np.mean([-sum(p * np.log(p) for p in row) for row in said.numpy()]), abs=1e-12)
    certain = torch.eye(C, dtype=torch.float64)
    assert calibration.brier(certain, torch.arange(C)) == 0 and calibration.brier(certain, torch.arange(C).roll(1)) == 2 and calibration.entropy(certain) == 0


def test_batch_calibration_takes_a_labels_advantage_away() -> None:
    """What adds a constant to a label's score for all queries is divided out, to first order; where every query says the same, nothing is left."""
    flat = torch.zeros(Q, C, dtype=torch.float64)
    biased = flat + torch.tensor([2.0, 0.0, -1.0, 0.5])
    assert torch.allclose(calibration.batch_calibrated(biased), flat - np.log(C), atol=1e-12)
    said = np.exp(scores(7).numpy()) / np.exp(scores(7).numpy()).sum(1, keepdims=True)
    divided = said / said.mean(0)
    assert np.allclose(calibration.batch_calibrated(scores(7)).exp(), divided / divided.sum(1, keepdims=True), atol=1e-12)


def test_contextual_calibration_divides_by_what_is_said_without_content() -> None:
    said, free = (np.exp(s) / np.exp(s).sum(1, keepdims=True) for s in (scores(8).numpy(), scores(9, 3, C).numpy()))
    divided = said / free.mean(0)
    found = calibration.contextual_calibrated(scores(8), scores(9, 3, C)).exp()
    assert np.allclose(found, divided / divided.sum(1, keepdims=True), atol=1e-12)
    assert torch.allclose(calibration.contextual_calibrated(scores(8)[:1], scores(8)[:1]).exp(), torch.full((1, C), 1 / C, dtype=torch.float64), atol=1e-12)
