"""Spectra of updates and of the changes they make: how many directions they have, and which of them two changes share. Pure functions in float64.

Knows matrices. Knows nothing of models, folds or tables. What has no direction (a matrix of zeros) is NaN.
"""

# Q queries  D width  S singular values, in descending order  R the dimension of a subspace

from __future__ import annotations

import math

import torch
from torch import Tensor

TOP = 8  # directions of a subspace, unless there are fewer


def squared_singular_values(matrix: Tensor) -> Tensor:
    """Return the squared singular values (..., S) of matrices (..., m, n) in descending order, from the smaller of their two Gram matrices.

    Those below 1e-13 of the largest are lost in rounding, and are 0. A matrix that is not finite has none: NaN.
    """
    matrix = matrix.double()
    small = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    gram = small @ small.mT
    is_finite = gram.isfinite().flatten(-2).all(-1)[..., None]
    squares = torch.linalg.eigvalsh(torch.where(is_finite[..., None], gram, 0.0)).flip(-1)
    squares = torch.where(squares > 1e-13 * squares[..., :1], squares, 0.0)
    return torch.where(is_finite, squares, math.nan)


def stable_rank(squares_S: Tensor) -> Tensor:
    """Return sum of squares / largest square of singular values: 1 for one direction, S for S equal ones.

    Source: Rudelson and Vershynin 2007; of updates: Chavan et al. 2024 (arXiv 2405.13039).
    """
    return squares_S.sum(-1) / torch.where(squares_S[..., 0] > 0, squares_S[..., 0], math.nan)


def effective_rank(squares_S: Tensor) -> Tensor:
    """Return exp of the entropy of the singular values' shares. Source: Roy and Vetterli 2007."""
    values_S = squares_S.sqrt()
    shares_S = values_S / torch.where(values_S.sum(-1, keepdim=True) > 0, values_S.sum(-1, keepdim=True), math.nan)
    return torch.special.entr(shares_S).sum(-1).exp()


def participation_ratio(squares_S: Tensor) -> Tensor:
    """Return (sum of eigenvalues)^2 / sum of their squares, of a covariance whose eigenvalues are the squared singular values."""
    total = squares_S.sum(-1).square()
    return total / torch.where(total > 0, squares_S.square().sum(-1), math.nan)


def top_subspace(change_QD: Tensor, rank: int = TOP) -> Tensor:
    """Return an orthonormal basis (D, R) of the directions in which a change is largest over the queries; R <= the change's rank.

    The change is not centred: what all queries share is part of it.
    """
    change_QD = change_QD.double()
    gram_QQ = change_QD @ change_QD.mT
    squares_Q, vectors_QQ = torch.linalg.eigh(gram_QQ)
    squares_Q, vectors_QQ = squares_Q.flip(0), vectors_QQ.flip(1)
    count = min(rank, int((squares_Q > squares_Q[0].clamp_min(0.0) * 1e-12).sum())) if squares_Q[0] > 0 else 0
    basis_DR = change_QD.mT @ vectors_QQ[:, :count]
    return torch.linalg.qr(basis_DR)[0]


def share_inside(change_QD: Tensor, basis_DR: Tensor) -> float:
    """Return the share of a change's squared length that lies in a subspace [0..1]; NaN of no change, or of no subspace."""
    change_QD = change_QD.double()
    total = change_QD.square().sum()
    if not total > 0 or not basis_DR.shape[1]:
        return math.nan
    return float((change_QD @ basis_DR).square().sum() / total)


def principal_cosines(a_DR: Tensor, b_DR: Tensor) -> Tensor:
    """Return the cosines of the principal angles between two subspaces, descending, as many as the smaller one has dimensions. Source: Bjorck and Golub 1973."""
    return torch.linalg.svdvals(a_DR.mT @ b_DR).clamp(0.0, 1.0)


def linear_cka(a_QD: Tensor, b_QD: Tensor) -> float:
    """Return linear centred kernel alignment of two sets of vectors of the same queries [0..1]; NaN where either is constant.

    Source: Kornblith et al. 2019 (arXiv 1905.00414).
    """
    a_QD, b_QD = (values.double() - values.double().mean(0) for values in (a_QD, b_QD))
    gram_a, gram_b = a_QD @ a_QD.mT, b_QD @ b_QD.mT
    norm = gram_a.norm() * gram_b.norm()
    return float((gram_a * gram_b).sum() / norm) if norm > 0 else math.nan
