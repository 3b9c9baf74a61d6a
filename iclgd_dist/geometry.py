"""How a set of hidden states lies in space: whether its clusters can be learned from neighbours, and how many dimensions it has. Pure functions in float64.

Knows vectors. Knows nothing of models, folds or tables.
"""

# Q vectors  D width  K clusters

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_CLUSTERS, NUM_NEIGHBOURS = 10, 5
MOST_ROUNDS = 100  # of Lloyd's algorithm
DISCARDED = 0.1  # share of the largest ratios that two_nn leaves out


def squared_distances(a_QD: Tensor, b_KD: Tensor) -> Tensor:
    """Return |a - b|^2 (Q, K)."""
    return torch.cdist(a_QD.double(), b_KD.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def kmeans(values_QD: Tensor, num_clusters: int = NUM_CLUSTERS) -> Tensor:
    """Return the cluster (Q,) of each vector by Lloyd's algorithm, which begins with the first vector and, again and again, the one farthest from all so far.

    Nothing is drawn: the same vectors have the same clusters. Of two centres at the same distance the first one wins; a cluster that loses all keeps its centre.
    """
    values_QD = values_QD.double()
    centres_KD = values_QD[_far_apart(values_QD, num_clusters)]
    labels_Q = torch.full((len(values_QD),), -1)
    for _ in range(MOST_ROUNDS):
        before_Q, labels_Q = labels_Q, squared_distances(values_QD, centres_KD).argmin(1)
        if torch.equal(before_Q, labels_Q):
            break
        counts_K = labels_Q.bincount(minlength=len(centres_KD)).double()[:, None]
        sums_KD = torch.zeros_like(centres_KD).index_add_(0, labels_Q, values_QD)
        centres_KD = torch.where(counts_K > 0, sums_KD / counts_K.clamp_min(1.0), centres_KD)
    return labels_Q


def _far_apart(values_QD: Tensor, count: int) -> list[int]:
    chosen, nearest_Q = [0], squared_distances(values_QD, values_QD[:1])[:, 0]
    while len(chosen) < min(count, len(values_QD)) and nearest_Q.max() > 0:
        chosen.append(int(nearest_Q.argmax()))
        nearest_Q = torch.minimum(nearest_Q, squared_distances(values_QD, values_QD[chosen[-1:]])[:, 0])
    return chosen


def learnability(values_QD: Tensor, *, num_clusters: int = NUM_CLUSTERS, num_neighbours: int = NUM_NEIGHBOURS) -> float:
    """Return the share of vectors whose k-means cluster most of their nearest neighbours have: 1 = clusters that any learner finds.

    A vector is not its own neighbour; of clusters with as many votes the lowest wins. NaN of fewer vectors than neighbours + 1, or than two for each
    cluster: most would be a cluster of their own.
    Units: [0..1]; chance is the sum of the clusters' squared shares.
    Source: the learnability of representations of arXiv 2206.01251, with k-nearest neighbours as the learner.
    """
    if len(values_QD) < max(num_neighbours + 1, 2 * num_clusters):
        return math.nan
    labels_Q = kmeans(values_QD, num_clusters)
    distances_QQ = squared_distances(values_QD, values_QD).fill_diagonal_(math.inf)
    neighbours_QN = distances_QQ.argsort(dim=1, stable=True)[:, :num_neighbours]
    votes_QK = torch.nn.functional.one_hot(labels_Q[neighbours_QN], int(labels_Q.max()) + 1).sum(1)
    return float((votes_QK.argmax(1) == labels_Q).double().mean())


def two_nn(values_QD: Tensor) -> float:
    """Return the intrinsic dimension from the ratio of the distances to the second and the first neighbour.

    The slope through 0 of -log(1 - F) over log(ratio), the largest tenth of the ratios left out. Vectors that are there twice count once; NaN of fewer than 3.
    Source: Facco et al. 2017, TwoNN.
    """
    values_QD = torch.unique(values_QD.double(), dim=0)
    if len(values_QD) < 3:
        return math.nan
    distances_QQ = squared_distances(values_QD, values_QD).sqrt().fill_diagonal_(math.inf)
    first_Q, second_Q = distances_QQ.topk(2, dim=1, largest=False).values.T
    logs_Q = (second_Q / first_Q).log().sort().values
    kept = int(len(logs_Q) * (1 - DISCARDED))
    heights = -(1 - torch.arange(1, kept + 1, dtype=torch.float64) / len(logs_Q)).log()
    norm = logs_Q[:kept].square().sum()
    return float((logs_Q[:kept] * heights).sum() / norm) if norm > 0 else math.nan
