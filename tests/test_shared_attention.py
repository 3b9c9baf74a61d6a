"""Attention in two parts equals attention to everything at once, is taken where it is right and pays, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from iclgd_dist import model, shared_attention
from iclgd_dist.layerwise import Prefix, Replay
from iclgd_dist.model import behind, put_before
from iclgd_dist.shared_attention import NUM_WORTH, attend_behind, pays
from tests.tiny import ids, tiny

ROWS, TOKENS, CHANNELS = 3, 5, 8


def drawn(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("num_before", [1, 70])
@pytest.mark.parametrize("num_heads", [2, 6])  # of queries; two of keys
@pytest.mark.parametrize("scale", [1.0, 30.0])  # at 30 nearly all of the softmax lies on one token, of either part
def test_two_parts_equal_one_softmax_over_all_keys(dtype: torch.dtype, tolerance: float, num_before: int, num_heads: int, scale: float) -> None:
    query = drawn(ROWS, num_heads, TOKENS, dtype=dtype, seed=0, scale=scale)
    own = [drawn(ROWS, 2, TOKENS, dtype=dtype, seed=seed) for seed in (1, 2)]
    before = [drawn(1, 2, num_before, dtype=dtype, seed=seed) for seed in (3, 4)]
    keys, values = (torch.cat([whole.expand(ROWS, -1, -1, -1), part], 2).repeat_interleave(num_heads // 2, 1) for whole, part in zip(before, own, strict=True))
    is_seen = torch.arange(num_before + TOKENS) <= num_before + torch.arange(TOKENS)[:, None]
    expected = scaled_dot_product_attention(query.double(), keys.double(), values.double(), attn_mask=is_seen, scale=0.3)
    got = attend_behind((before[0], before[1]), query, own[0], own[1], scaling=0.3)
    assert got.shape == expected.shape and got.dtype == dtype
    assert float((got - expected).abs().max()) <= tolerance * float(expected.abs().max())


def test_a_prefix_is_attended_to_apart_only_where_all_of_it_is_seen_and_it_is_long() -> None:
    query, long, short = (drawn(ROWS, 2, length, dtype=torch.float32, seed=0) for length in (TOKENS, NUM_WORTH, NUM_WORTH - 1))
    assert pays(query, long, None) and pays(query, long, NUM_WORTH + TOKENS)
    assert not pays(query, short, None)
    assert not pays(query, long, NUM_WORTH + TOKENS - 1), "a sliding window hides the first tokens from the last query"
    assert not pays(query.bfloat16(), long.bfloat16(), None), "two parts that were rounded are not rounded as their sum is"
    assert not pays(query.to("meta"), long.to("meta"), None)


def states(lm, prefix: Prefix, replay: Replay) -> Tensor:
    with torch.no_grad():
        for index, layer in enumerate(lm.layers):
            prefix.climb(layer, index)
            replay.climb(layer, index)
    return replay.hidden_BTD


def test_keys_of_the_prefix_are_not_copied_for_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, copied = tiny("llama"), list[Tensor]()
    monkeypatch.setattr(model, "behind", lambda before, own: copied.append(behind(before, own)) or copied[-1])
    for num_worth, num_copies in ((1, 0), (10_000, 2 * lm.num_layers)):
        monkeypatch.setattr(shared_attention, "NUM_WORTH", num_worth)
        prefix = Prefix(lm, torch.tensor(ids(20, seed=1)))
        replay = Replay(lm, torch.tensor([ids(6, seed=2), ids(6, seed=3)]), cache=prefix.cache())
        copied.clear()
        states(lm, prefix, replay)
        assert len(copied) == num_copies


def test_what_an_interrupted_layer_left_is_not_attended_to() -> None:
    lm = tiny("llama")
    alone = Replay(lm, torch.tensor([ids(6, seed=2)]))
    expected = alone.again()
    put_before((torch.ones(1, lm.num_key_heads, 3, 8), torch.ones(1, lm.num_key_heads, 3, 8)))
    with torch.no_grad():
        for replay in (alone, expected):
            replay.climb(lm.layers[0], 0)
    assert torch.equal(alone.hidden_BTD, expected.hidden_BTD)
