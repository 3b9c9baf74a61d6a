"""Clusters, neighbours and dimensions against scikit-learn, plain loops and sets whose dimension is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.neighbors import KNeighborsClassifier

from iclgd_dist import geometry


def points(seed: int, count: int = 90, width: int = 6) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(5))
def test_clusters_are_those_of_scikit_learn_from_the_same_beginning(seed: int) -> None:
    values = points(seed)
    first = values[geometry._far_apart(values, 10)].numpy()
    theirs = KMeans(10, init=first, n_init=1, algorithm="lloyd", tol=0, max_iter=geometry.MOST_ROUNDS).fit(values.numpy()).labels_
    assert np.array_equal(geometry.kmeans(values), theirs)


def test_the_first_centres_are_far_apart() -> None:
    values = points(11)
    chosen = [0]
    for _ in range(9):
        nearest = [min(float((value - values[c]).norm()) for c in chosen) for value in values]
        chosen.append(int(np.argmax(nearest)))
    assert geometry._far_apart(values, 10) == chosen
    assert geometry._far_apart(torch.ones(8, 3), 10) == [0], "the same vector again and again is one"


def test_learnability_is_scikit_learns_leave_one_out() -> None:
    values = points(12)
    labels = geometry.kmeans(values).numpy()
    right = []
    for n in range(len(values)):
        others = np.arange(len(values)) != n
        learner = KNeighborsClassifier(geometry.NUM_NEIGHBOURS, algorithm="brute").fit(values.numpy()[others], labels[others])
        right.append(learner.predict(values.numpy()[n : n + 1])[0] == labels[n])
    assert geometry.learnability(values) == pytest.approx(np.mean(right), abs=1e-12)


def test_clusters_that_lie_apart_are_learned_and_few_vectors_say_nothing() -> None:
    apart = torch.cat([points(n, 12) / 100 + 40 * n for n in range(10)])
    assert geometry.learnability(apart) == 1.0
    assert math.isnan(geometry.learnability(points(1, 19))) and not math.isnan(geometry.learnability(points(1, 20)))


def test_the_dimension_is_that_of_a_plain_loop() -> None:
    values = points(13, 60, 4)
    ratios = []
    for value in values:
        _, first, second, *_ = sorted(float((value - other).norm()) for other in values)  # itself comes first
        ratios.append(second / first)
    logs = np.log(np.sort(ratios))[:54]
    heights = -np.log(1 - np.arange(1, 55) / 60)
    assert geometry.two_nn(values) == pytest.approx((logs * heights).sum() / (logs**2).sum(), abs=1e-9)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_the_dimension_of_a_cube_in_a_wide_space_is_found(dimension: int) -> None:
    draw = torch.Generator().manual_seed(dimension)
    cube = torch.rand(2000, dimension, generator=draw, dtype=torch.float64)
    wide = cube @ torch.linalg.qr(torch.randn(40, dimension, generator=draw, dtype=torch.float64))[0].mT
    assert geometry.two_nn(wide) == pytest.approx(dimension, rel=0.1)
    assert geometry.two_nn(torch.cat([wide[:50], wide[:50]])) == pytest.approx(geometry.two_nn(wide[:50]))
    assert math.isnan(geometry.two_nn(torch.ones(9, 4)))
