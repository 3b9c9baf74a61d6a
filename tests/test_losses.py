"""The chunked loss equals the plain one, and no table of all tokens x vocabulary is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from iclgd_dist import losses
from iclgd_dist.losses import lane_losses
from tests.tiny import VOCABULARY, WIDTH, ids, tiny

NUM_LANES, NUM_TOKENS = 3, 7


class MostLogits(TorchDispatchMode):
    """Notes the most rows of a table of (rows x vocabulary) that any operation makes; the output head turned round is none."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if func is not torch.ops.aten.t.default and isinstance(each, torch.Tensor) and each.dim() and each.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, each.numel() // VOCABULARY)
        return made


def states(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(NUM_LANES, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype).requires_grad_()


@pytest.mark.parametrize("chunk", [1, 4, NUM_TOKENS, 1000])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "opt_projected"])
def test_loss_and_gradient_in_chunks_equal_those_of_all_logits_at_once(family: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "tokens_per_chunk", lambda *_: chunk)
    lm, hidden_NTD, target_T = tiny(family), states(), torch.tensor(ids(NUM_TOKENS, seed=1))
    loss_N = lane_losses(lm, hidden_NTD, target_T)
    weight_N = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)  # lanes do not all count alike; powers of two: norms round to float32
    (gradient,) = torch.autograd.grad(loss_N @ weight_N, hidden_NTD)
    plain_N = torch.stack([cross_entropy(lm.early_exit(hidden_TD), target_T) for hidden_TD in hidden_NTD])
    (expected,) = torch.autograd.grad(plain_N @ weight_N, hidden_NTD)
    assert torch.allclose(loss_N, plain_N, rtol=1e-12)
    assert float((gradient - expected).abs().max()) <= 1e-12 * float(expected.abs().max())


def test_no_more_logits_than_a_chunk_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "MIB_PER_CHUNK", {"cpu": 2 * VOCABULARY * 8 / 2**20, "cuda": 0})  # two rows of float64
    lm, hidden_NTD, target_T = tiny("llama"), states(), torch.tensor(ids(NUM_TOKENS, seed=1))
    with MostLogits() as most:
        torch.autograd.grad(lane_losses(lm, hidden_NTD, target_T).sum(), hidden_NTD)
    assert most.rows == 2
    monkeypatch.undo()
    with MostLogits() as most:
        lane_losses(lm, hidden_NTD, target_T)
    assert most.rows == NUM_LANES * NUM_TOKENS, "the test would not see a table that is too large"


def test_without_a_gradient_no_graph_is_made() -> None:
    loss_N = lane_losses(tiny("llama"), states().detach(), torch.tensor(ids(NUM_TOKENS, seed=1)))
    assert loss_N.grad_fn is None


def test_half_precision_states_are_scored_in_float32() -> None:
    lm, target_T = tiny("llama", torch.bfloat16), torch.tensor(ids(NUM_TOKENS, seed=1))
    hidden_NTD = states(torch.bfloat16)
    loss_N = lane_losses(lm, hidden_NTD, target_T)
    assert loss_N.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss_N.sum(), hidden_NTD)
    assert gradient.dtype == torch.bfloat16
    assert gradient.isfinite().all()
