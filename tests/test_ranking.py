"""Rankings against scipy, plain loops and small tables made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from iclgd_dist import ranking
from iclgd_dist.ranking import attention_over_items, compare_attention, kendall_tau_b, random_attention, summed_per_example, topk_recall
from iclgd_dist.schema import SIMILARITIES, TOP_EXAMPLES, TOP_TOKENS

ITEMS = [(0, 20), (20, 50), (50, 62), (62, 90), (90, 120), (120, 130)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def maps(seed: int, num_items: int, num_values: int | None = None) -> Tensor:
    """Return 20 maps; of `num_values` different numbers, so that there are ties."""
    draw = generator(seed)
    return torch.randn(20, num_items, generator=draw).double() if num_values is None else torch.randint(num_values, (20, num_items), generator=draw).double()


@pytest.mark.parametrize("num_items", [2, 3, 7, 15, 16, 17, 50, 256, 300])
@pytest.mark.parametrize("num_values", [None, 2, 5, 60])
def test_kendall_equals_scipy_with_and_without_ties(num_items: int, num_values: int | None) -> None:
    a = maps(1, num_items, num_values)
    for b in (maps(2, num_items, num_values), maps(3, num_items), a + maps(4, num_items, num_values)):
        expected = [kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
        assert torch.allclose(kendall_tau_b(a, b), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14, equal_nan=True)


@pytest.mark.parametrize("num_items", [512, 1000, 1024, 5000])
def test_kendall_of_long_contexts_equals_scipy_however_many_maps_are_counted_at_once(num_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = maps(1, num_items)[:3], maps(2, num_items, 900)[:3]
    expected = [kendalltau(x, y).statistic for x, y in zip(a, b, strict=True)]
    for at_once in (ranking.NUMBERS_AT_ONCE, 1):
        monkeypatch.setattr(ranking, "NUMBERS_AT_ONCE", at_once)
        assert kendall_tau_b(a, b).tolist() == pytest.approx(expected, rel=0, abs=1e-14)


@pytest.mark.parametrize("num_values", [None, 5])
def test_lanes_are_each_compared_with_the_same_map(num_values: int | None) -> None:
    a, lanes = maps(1, 130, num_values), torch.stack([maps(2, 130, num_values), maps(3, 130)])
    together = compare_attention(a, lanes, ITEMS)
    for lane, b in enumerate(lanes):
        assert {name: values.tolist() for name, values in compare_attention(a, b, ITEMS).items()} == {n: v[lane].tolist() for n, v in together.items()}
    assert torch.equal(kendall_tau_b(a, lanes)[1], kendall_tau_b(a, lanes[1]))


def test_kendall_is_1_with_itself_minus_1_with_the_reverse_and_undefined_with_a_constant() -> None:
    a = maps(1, 40)
    assert torch.allclose(kendall_tau_b(a, a.exp()), torch.ones(20).double(), rtol=0, atol=1e-15)
    assert torch.allclose(kendall_tau_b(a, -a), -torch.ones(20).double(), rtol=0, atol=1e-15)
    constant = torch.full_like(a, 3.0)
    for pair in ((a, constant), (constant, a), (constant, constant), (a[:, :1], a[:, :1])):
        assert kendall_tau_b(*pair).isnan().all()


def test_topk_recall_of_a_table_made_by_hand() -> None:
    a = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1], [1, 1, 1, 1, 1]])
    b = torch.tensor([[1.0, 9, 8, 2, 3], [0, 0, 0, 7, 8], [0, 0, 2, 1, 1]])  # best two: 1 and 2; 3 and 4; 2 and 3
    assert topk_recall(a, b, 2).tolist() == [0.5, 0.0, 0.0]  # the last map's best two are items 0 and 1: the lowest of equals
    assert topk_recall(a, b, 3).tolist() == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert topk_recall(a, b, 5).tolist() == [1, 1, 1]


def test_topk_recall_of_fewer_items_than_k_is_undefined() -> None:
    assert topk_recall(maps(1, 4), maps(2, 4), 5).isnan().all()


def test_the_mass_of_the_demonstrations_is_the_softmax_over_all_their_tokens_summed() -> None:
    scores = torch.tensor([[0.0, math.log(3), math.log(2), math.log(4)]])
    mass = summed_per_example(attention_over_items(scores), [(0, 1), (1, 3), (3, 4)])
    assert torch.allclose(mass, torch.tensor([[0.1, 0.5, 0.4]]).double(), atol=1e-7)  # the scores are float32


def test_attention_is_compared_at_both_levels_under_the_names_of_the_columns() -> None:
    icl, ft = maps(1, 130), maps(2, 130)
    found = compare_attention(icl, ft, ITEMS)
    assert set(found) == {name for name in SIMILARITIES if name.startswith(("kendall", "topk")) and not name.endswith("_random")}
    assert all(value.shape == (20,) and value.dtype == torch.float64 for value in found.values())
    for query in range(20):
        p, q = (torch.tensor([math.exp(score) for score in state[query].tolist()]) for state in (icl, ft))  # shares of a sum rank as the sums do
        mass_p, mass_q = ([float(weights[start:end].sum()) for start, end in ITEMS] for weights in (p, q))
        best = [sorted(range(130), key=lambda item, state=state: -state[query, item])[:TOP_TOKENS] for state in (icl, ft)]
        best_demonstrations = [sorted(range(6), key=lambda item, mass=mass: -mass[item])[:TOP_EXAMPLES] for mass in (mass_p, mass_q)]
        assert float(found["kendall_tokens"][query]) == pytest.approx(kendalltau(p, q).statistic)
        assert float(found["kendall_examples"][query]) == pytest.approx(kendalltau(mass_p, mass_q).statistic)
        assert float(found["topk_recall_tokens"][query]) == pytest.approx(len(set(best[0]) & set(best[1])) / TOP_TOKENS)
        assert float(found["topk_recall_examples"][query]) == pytest.approx(len(set(best_demonstrations[0]) & set(best_demonstrations[1])) / TOP_EXAMPLES)


def test_random_baselines_come_from_the_generator_alone_and_rank_nothing() -> None:
    many = torch.randn(400, 130, generator=generator(7)).double()
    found = compare_attention(many, many, ITEMS) | random_attention(many, ITEMS, generator=generator(5))
    assert (found["kendall_tokens"] > 1 - 1e-15).all() and (found["topk_recall_examples"] == 1).all()
    assert float(found["kendall_tokens_random"].mean()) == pytest.approx(0, abs=0.02)  # sd of one is .06
    assert float(found["kendall_examples_random"].mean()) == pytest.approx(0, abs=0.1)  # sd of one is .38
    assert float(found["topk_recall_tokens_random"].mean()) == pytest.approx(100 / 130, abs=0.01)
    assert float(found["topk_recall_examples_random"].mean()) == pytest.approx(5 / 6, abs=0.03)
    again = random_attention(many, ITEMS, generator=generator(5))
    assert all(torch.equal(again[name], value) for name, value in found.items() if name.endswith("_random")) and len(again) == 4
    other = random_attention(many, ITEMS, generator=generator(6))
    assert not torch.equal(other["kendall_tokens_random"], found["kendall_tokens_random"])
