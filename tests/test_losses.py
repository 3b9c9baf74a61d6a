"""The loss of a part of the vocabulary after the other equals the plain one, and no table of tokens x vocabulary is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from iclgd_dist import cost, losses
from iclgd_dist.losses import lane_losses
from tests.tiny import VOCABULARY, WIDTH, ids, tiny

NUM_LANES, NUM_TOKENS = 3, 7


class MostLogits(TorchDispatchMode):
    """Notes the most numbers in a table with a row per token that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, torch.Tensor) and each.dim() == 2 and len(each) == NUM_LANES * NUM_TOKENS:
                self.numbers = max(self.numbers, each.numel())
        return made


def states(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(NUM_LANES, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("words", [1, 40, VOCABULARY, 100_000])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "opt_projected"])
def test_loss_and_gradient_in_parts_equal_those_of_all_logits_at_once(family: str, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "WORDS", {"cpu": words})
    lm, hidden_NTD, target_T = tiny(family), states(), torch.tensor(ids(NUM_TOKENS, seed=1))
    loss_N = lane_losses(lm, hidden_NTD, target_T)
    weight_N = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # lanes do not all count alike; powers of two: norms round to float32
    (gradient,) = torch.autograd.grad(loss_N @ weight_N, hidden_NTD)
    plain_N = torch.stack([cross_entropy(lm.early_exit(hidden_TD), target_T) for hidden_TD in hidden_NTD])
    (expected,) = torch.autograd.grad(plain_N @ weight_N, hidden_NTD)
    assert torch.allclose(loss_N, plain_N, rtol=1e-12)
    assert float((gradient - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def test_no_more_logits_than_a_part_of_the_vocabulary_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, hidden_NTD, target_T = tiny("llama"), states(), torch.tensor(ids(NUM_TOKENS, seed=1))
    monkeypatch.setattr(losses, "WORDS", {"cpu": WIDTH + 2})
    with MostLogits() as most:
        torch.autograd.grad(lane_losses(lm, hidden_NTD, target_T).sum(), hidden_NTD)
    assert most.numbers == (WIDTH + 2) * NUM_LANES * NUM_TOKENS
    monkeypatch.undo()
    with MostLogits() as most:
        lane_losses(lm, hidden_NTD, target_T)
    assert most.numbers == VOCABULARY * NUM_LANES * NUM_TOKENS, "the test would not see a table that is too large"


@pytest.mark.parametrize("words", [7, 100_000])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_chances_of_words_are_those_of_the_softmax(family: str, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "WORDS", {"cpu": words})
    lm, hidden_XD = tiny(family), states().detach().flatten(0, 1)
    at_Y, word_Y = torch.tensor([0, 5, 5, 20]), torch.tensor([3, 0, VOCABULARY - 1, 17])
    expected_Y = lm.early_exit(hidden_XD).log_softmax(1)[at_Y, word_Y]
    assert torch.allclose(losses.log_chances(lm, lm.normed(hidden_XD), at_Y, word_Y), expected_Y, rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_the_gradient_keeps_its_digits_where_the_model_is_sure(dtype: torch.dtype, tolerance: float) -> None:
    lm, word_X = tiny("llama", dtype), torch.tensor([5, 17])
    head_VD = lm.model.lm_head.weight.double()
    sure_XD = (head_VD[word_X] * 12 / head_VD[word_X].square().sum(1, keepdim=True)).to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(losses._TokenLosses.apply(sure_XD, word_X, lm).sum(), sure_XD)
    exact_XD = sure_XD.detach().double().requires_grad_()
    loss_X = cross_entropy(exact_XD @ head_VD.T, word_X, reduction="none")
    (expected,) = torch.autograd.grad(loss_X.sum(), exact_XD)
    assert (loss_X < 0.01).all(), "the model must be sure for the test to see anything"
    assert float((gradient.double() - expected).norm() / expected.norm()) < tolerance


def test_a_state_that_is_not_finite_spoils_its_own_lane_only() -> None:
    lm, hidden_NTD, target_T = tiny("llama"), states(), torch.tensor(ids(NUM_TOKENS, seed=1))
    spoilt_NTD = hidden_NTD.detach().clone()
    spoilt_NTD[1, 2] = torch.nan
    spoilt_NTD.requires_grad_()
    loss_N, spoilt_N = lane_losses(lm, hidden_NTD, target_T), lane_losses(lm, spoilt_NTD, target_T)
    (gradient,), (spoilt,) = torch.autograd.grad(loss_N.sum(), hidden_NTD), torch.autograd.grad(spoilt_N.sum(), spoilt_NTD)
    assert spoilt_N.isnan().tolist() == [False, True, False]
    assert all(torch.equal(spoilt_N[n], loss_N[n]) and torch.equal(spoilt[n], gradient[n]) for n in (0, 2))
    assert spoilt[1, 2].isnan().all()


def test_the_plan_counts_as_many_logits_as_there_are_at_most() -> None:
    assert (max(losses.WORDS.values()), max(losses.LOGITS.values())) == (cost.MOST_WORDS, cost.MOST_LOGITS)


def test_without_a_gradient_no_graph_is_made() -> None:
    loss_N = lane_losses(tiny("llama"), states().detach(), torch.tensor(ids(NUM_TOKENS, seed=1)))
    assert loss_N.grad_fn is None


@pytest.mark.parametrize("num_targets", [3, 7, 13])
def test_the_number_of_targets_is_no_learning_rate_in_half_precision(num_targets: int) -> None:
    lm, target_T = tiny("llama", torch.bfloat16), torch.tensor(ids(num_targets, seed=1))
    normed_XD = torch.randn(num_targets, WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    (summed,) = torch.autograd.grad(losses._TokenLosses.apply(normed_XD, target_T, lm).sum(), normed_XD)
    (mean,) = torch.autograd.grad(losses._TokenLosses.apply(normed_XD, target_T, lm).mean(), normed_XD)
    along = float((mean.double() * summed.double()).sum() / summed.double().square().sum()) * num_targets
    assert along == pytest.approx(1, abs=5e-4)  # the factor alone, in bfloat16, is off by up to 3e-3


def test_fewer_words_at_once_of_very_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, hidden_NTD, target_T = tiny("llama"), states(), torch.tensor(ids(NUM_TOKENS, seed=1))
    expected_N = lane_losses(lm, hidden_NTD, target_T)
    monkeypatch.setattr(losses, "LOGITS", {"cpu": (WIDTH + 2) * NUM_LANES * NUM_TOKENS})
    with MostLogits() as most:
        assert torch.allclose(lane_losses(lm, hidden_NTD, target_T), expected_N, rtol=1e-12)
    assert most.numbers == (WIDTH + 2) * NUM_LANES * NUM_TOKENS


def test_many_words_that_are_alike_do_not_leave_the_range_of_float16() -> None:
    lm = tiny("llama", torch.float16)
    lm.model.lm_head.weight = torch.nn.Parameter(torch.full((60_000, WIDTH), 40.0, dtype=torch.float16), requires_grad=False)
    normed_XD = torch.zeros(2, WIDTH, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad(losses._TokenLosses.apply(normed_XD, torch.tensor([3, 59_999]), lm).sum(), normed_XD)
    assert gradient.abs().max() < 0.01  # all words pull alike


def test_a_word_beyond_the_vocabulary_has_no_chance() -> None:
    lm = tiny("llama")
    assert losses.log_chances(lm, lm.normed(states().detach().flatten(0, 1)), torch.tensor([0]), torch.tensor([VOCABULARY])).isnan().all()


def test_half_precision_states_are_scored_in_float32() -> None:
    lm, target_T = tiny("llama", torch.bfloat16), torch.tensor(ids(NUM_TOKENS, seed=1))
    hidden_NTD = states(torch.bfloat16)
    loss_N = lane_losses(lm, hidden_NTD, target_T)
    assert loss_N.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss_N.sum(), hidden_NTD)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()
