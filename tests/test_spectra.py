"""Spectra against scipy and by algebra."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from iclgd_dist import spectra


def matrix(seed: int, rows: int = 30, columns: int = 12, *, rank: int | None = None) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(rows, columns, generator=draw, dtype=torch.float64)
    return torch.randn(rows, rank, generator=draw, dtype=torch.float64) @ torch.randn(rank, columns, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (7, 7)])
def test_ranks_are_those_of_scipys_singular_values(shape: tuple[int, int]) -> None:
    a = matrix(1, *shape)
    values = scipy.linalg.svdvals(a.numpy())
    squares = spectra.squared_singular_values(a)
    assert np.allclose(squares, values**2, rtol=1e-10)
    assert spectra.stable_rank(squares).item() == pytest.approx((values**2).sum() / values[0] ** 2, abs=1e-10)
    assert spectra.effective_rank(squares).item() == pytest.approx(np.exp(scipy.stats.entropy(values)), abs=1e-10)
    assert spectra.participation_ratio(squares).item() == pytest.approx((values**2).sum() ** 2 / (values**4).sum(), abs=1e-10)


def test_equal_directions_count_fully_one_counts_once_and_none_is_undefined() -> None:
    for squares, expected in ((torch.ones(5, dtype=torch.float64), 5.0), (torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64), 1.0)):
        assert [f(squares).item() for f in (spectra.stable_rank, spectra.effective_rank, spectra.participation_ratio)] == pytest.approx([expected] * 3)
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    assert all(f(nothing).isnan().all() for f in (spectra.stable_rank, spectra.effective_rank, spectra.participation_ratio))
    assert spectra.effective_rank(spectra.squared_singular_values(matrix(2, rank=3))).item() < 3.001, "a product of thin matrices"


def test_the_top_subspace_is_that_of_scipys_right_singular_vectors() -> None:
    change = matrix(3, 20, 40)
    basis = spectra.top_subspace(change, 5)
    right = scipy.linalg.svd(change.numpy(), full_matrices=False)[2][:5]
    assert np.allclose(basis.mT @ basis, np.eye(5), atol=1e-12)
    assert np.allclose(basis @ basis.mT, right.T @ right, atol=1e-9), "the same projection"
    values = scipy.linalg.svdvals(change.numpy())
    assert spectra.share_inside(change, basis) == pytest.approx((values[:5] ** 2).sum() / (values**2).sum(), abs=1e-10)
    assert spectra.top_subspace(matrix(4, rank=2), 8).shape[1] == 2, "no more directions than there are"
    assert spectra.top_subspace(torch.zeros(4, 6)).shape == (6, 0) and math.isnan(spectra.share_inside(change, torch.zeros(40, 0)))


def test_principal_angles_are_scipys() -> None:
    a, b = spectra.top_subspace(matrix(5, 20, 40), 6), spectra.top_subspace(matrix(6, 20, 40), 4)
    assert np.allclose(spectra.principal_cosines(a, b), np.sort(np.cos(scipy.linalg.subspace_angles(a.numpy(), b.numpy())))[::-1], atol=1e-10)
    assert np.allclose(spectra.principal_cosines(a, a), 1.0)


def test_cka_is_that_of_the_features_and_does_not_see_rotations_and_scales() -> None:
    a, b = matrix(7), matrix(8, 30, 9)
    centred_a, centred_b = a.numpy() - a.numpy().mean(0), b.numpy() - b.numpy().mean(0)
    norms = [np.linalg.norm(c.T @ c) for c in (centred_a, centred_b)]
    assert spectra.linear_cka(a, b) == pytest.approx(np.linalg.norm(centred_b.T @ centred_a) ** 2 / norms[0] / norms[1], abs=1e-12)
    rotation = torch.linalg.qr(matrix(9, 12, 12))[0]
    assert spectra.linear_cka(a, 3 * a @ rotation + 1) == pytest.approx(1.0) and math.isnan(spectra.linear_cka(a, torch.ones(30, 2)))
