"""Above the last layer only some positions are read: the others are not computed there, and what is read does not change."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from iclgd_dist.layerwise import Prefix, Replay
from iclgd_dist.positions import NOWHERE, computed_only_at
from iclgd_dist.probes import Context, QueryPass
from tests.tiny import VARIANTS, ids, tiny

ROW, POSITION = torch.tensor([0, 0, 2, 1]), torch.tensor([3, 5, 5, 0])


@pytest.mark.parametrize("family", list(VARIANTS))
def test_what_is_computed_at_some_positions_equals_the_whole_layer_there(family: str) -> None:
    lm = tiny(family)
    outputs = []
    for only in (False, True):
        replay = Replay(lm, torch.tensor([ids(6, seed=n) for n in range(3)]))
        with torch.no_grad(), lm.resident(0) as layer:
            if only:
                with computed_only_at(lm, 0, 3, ROW, POSITION):
                    replay.climb(layer, 0)
            else:
                replay.climb(layer, 0)
        outputs.append(replay.hidden_BTD)
    whole, some = outputs
    assert torch.allclose(some[ROW, POSITION], whole[ROW, POSITION], rtol=1e-12, atol=1e-13)
    rest = torch.ones(3, 6, dtype=torch.bool)
    rest[ROW, POSITION] = False
    assert not torch.isclose(some[rest], whole[rest]).all(-1).any(), "the other positions were computed too"
    assert all("forward" not in vars(module) for module in lm.layers[0].modules()), "a layer must be left as it was"


def test_the_last_layer_of_a_pass_multiplies_only_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = tiny("llama"), dict[nn.Module, int]()
    plain = nn.Linear.forward

    def counting(module: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
        seen[module] = seen.get(module, 0) + inputs.numel() // inputs.shape[-1]
        return plain(module, inputs)

    monkeypatch.setattr(nn.Linear, "forward", counting)
    queries, labels, context = [ids(7, seed=1), ids(4, seed=2)], [[17], [23, 41]], ids(9, seed=3)
    prefix = Prefix(lm, torch.tensor(context))
    passed = QueryPass(lm, queries, labels, context=Context(prefix, 9), num_lanes=2)
    with torch.no_grad():
        for index in range(lm.num_layers):
            prefix.climb(lm.layers[index], index)
            passed.climb(lm.layers[index], index)
    all_tokens = 9 + 2 * 2 * 8  # the context, and two lanes of two rows as long as the longest with its label's first token
    read = 2 * 2 * 2  # two positions of each row: one for each token of the longer label
    for index, expected in ((lm.num_layers - 2, all_tokens), (lm.num_layers - 1, read)):
        layer = lm.layers[index]
        assert [seen[module] for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.down_proj)] == [expected] * 4
        assert seen[layer.self_attn.k_proj] == seen[layer.self_attn.v_proj] == all_tokens


def test_a_context_in_the_last_layer_computes_nothing_but_keys_and_values() -> None:
    lm = tiny("gpt2")
    replay = Replay(lm, torch.tensor([ids(5, seed=1)]))
    with torch.no_grad(), computed_only_at(lm, 0, 1, NOWHERE, NOWHERE):
        replay.climb(lm.layers[0], 0)
    assert replay.hidden_BTD.isfinite().all()
