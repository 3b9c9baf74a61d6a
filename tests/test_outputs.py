"""Next-token distributions against scipy and a plain loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import torch

from iclgd_dist import outputs
from iclgd_dist.head import Head

N, Q, D, V = 3, 7, 6, 41


def draw(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slowly(icl: np.ndarray, finetuned: np.ndarray) -> dict[str, float]:
    p, q = (scipy.special.softmax(logits.astype(float)) for logits in (icl, finetuned))
    ours, theirs = (set(np.argsort(-values)[:10].tolist()) for values in (p, q))
    both = sorted(ours & theirs)
    cosine = p[both] @ q[both] / np.linalg.norm(p[both]) / np.linalg.norm(q[both]) if both else math.nan
    return {"top10_overlap": len(both) / 10, "top10_cosine": cosine, "kl_output": scipy.special.rel_entr(p, q).sum(), "tv_output": abs(p - q).sum() / 2}


@pytest.mark.parametrize("most", [outputs.MOST_LOGITS, 2 * (N + 1) * V, 1])
def test_each_query_of_each_lane_is_that_of_a_plain_loop(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many queries are at it at once."""
    monkeypatch.setattr(outputs, "MOST_LOGITS", most)
    weights, icl, lanes = draw(1, V, D), draw(2, Q, D), draw(3, N, Q, D)
    found = outputs.compare_states(Head(weights), icl, list(lanes))
    for lane in range(N):
        for query in range(Q):
            expected = slowly((icl[query] @ weights.T).numpy(), (lanes[lane, query] @ weights.T).numpy())
            assert {name: float(values[lane, query]) for name, values in found.items()} == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_the_same_state_says_the_same_and_strangers_share_no_token() -> None:
    same = outputs.compare_logits(draw(4, Q, V), draw(4, Q, V)[None])
    assert [float(same[name].mean()) for name in ("top10_overlap", "top10_cosine", "kl_output", "tv_output")] == pytest.approx([1, 1, 0, 0], abs=1e-12)
    ours, theirs = torch.full((1, 40), -50.0), torch.full((1, 1, 40), -50.0)
    ours[0, :10], theirs[0, 0, 30:] = 0.0, 0.0
    apart = outputs.compare_logits(ours, theirs)
    assert float(apart["top10_overlap"]) == 0 and math.isnan(apart["top10_cosine"]) and float(apart["tv_output"]) == pytest.approx(1.0)


def test_softly_capped_logits_are_compared() -> None:
    head = Head(draw(5, V, D), how="cap", number=1.5)
    capped = torch.tanh(draw(6, Q, D) @ head.weight_VD.T / 1.5) * 1.5
    expected = outputs.compare_logits(capped, capped.roll(1, 0)[None])
    found = outputs.compare_states(head, draw(6, Q, D), [draw(6, Q, D).roll(1, 0)])
    assert all(torch.allclose(found[name], expected[name], atol=1e-6, equal_nan=True) for name in expected)
