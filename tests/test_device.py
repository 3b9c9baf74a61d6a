"""What a GPU must not be asked for: training and captures run on torch's meta device, from which nothing can be read back, until results are fetched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, masking_utils

from iclgd_dist import layerwise, probes
from iclgd_dist.deltas import norms
from iclgd_dist.layerwise import Prefix, Replay
from iclgd_dist.model import LanguageModel
from iclgd_dist.probes import Context, QueryPass
from iclgd_dist.updates import LaneInputs, TrainingSequence
from tests.tiny import METHODS, ids, tiny

META = torch.device("meta")
FAMILIES = ["llama", "gpt2", "gemma2", "phi3", "bloom", "falcon", "opt", "cohere"]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Put every tensor on the meta device, and collect what is sent to the host without waiting for it.

    transformers reads the positions back when it makes masks: when prompts are recorded, once each. There it is told not to.
    """
    collected: list[torch.Tensor] = []
    record = Replay.__init__

    def recorded(replay: Replay, *args: Any, **options: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(masking_utils, "is_tracing", lambda *_: True)
            patched.setattr(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None)
            record(replay, *args, **options)

    monkeypatch.setattr(Replay, "__init__", recorded)
    monkeypatch.setattr(LanguageModel, "device_of", lambda lm, module: META)
    monkeypatch.setattr(probes._Arrivals, "send", lambda arrivals, tensor, put: collected.append(tensor))
    return collected


def on_meta(family: str) -> LanguageModel:
    lm = tiny(family, torch.float32)
    lm.model.to(META)
    return lm


def test_the_device_of_these_tests_can_indeed_not_be_read() -> None:
    for read in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, bool, float, torch.Tensor.nonzero):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read(torch.ones(1, device=META))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", list(METHODS))
def test_training_steps_wait_for_nothing(family: str, method: str, sent: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    lm = on_meta(family)
    sequences = [TrainingSequence(torch.tensor(ids(6, seed=n), device=META), 1) for n in range(3)]
    for number, probe in enumerate(METHODS[method].train(lm, sequences, [0.1, 0.2], steps=[1, 3])):
        if number == 0:
            monkeypatch.setattr(Replay, "__init__", None)  # all prompts are recorded before the first step
        assert probe.loss_SN.device == probe.gradient_norm_SNL.device == META
        assert all(norm.device == META for norm in norms(lm, 0, probe.deltas).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_captures_wait_for_nothing_while_they_climb(family: str, sent: list[torch.Tensor]) -> None:
    lm = on_meta(family)
    prefix = Prefix(lm, torch.tensor(ids(9, seed=3)))
    passed = QueryPass(lm, [ids(7, seed=1), ids(4, seed=2)], [[17], [23, 41]], context=Context(prefix, 9, torch.arange(2, 8)), num_lanes=2)
    inputs = LaneInputs(lm, [TrainingSequence(torch.tensor(ids(6, seed=n), device=META), 1) for n in range(2)], 2)
    for index in range(lm.num_layers):
        with lm.resident(index) as layer:
            with torch.no_grad():
                prefix.climb(layer, index)
            for probe in METHODS["layer_causal"].train_layer(lm, index, layer, inputs, [0.1, 0.2], steps=[2]):  # type: ignore[attr-defined]
                passed.climb(layer, index, probe.deltas)
    kinds = 3  # attention outputs, scores, and what is ranked
    assert len(sent) == kinds * lm.num_layers * len(passed.batches)
    assert {tensor.device for tensor in sent} == {META}


def test_states_that_wait_on_the_host_are_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, parked = tiny("llama"), list[torch.Tensor]()
    monkeypatch.setattr(layerwise, "to_host", lambda tensor: parked.append(tensor) or tensor.clone())
    captures = []
    for parks in (False, True):
        passed = QueryPass(lm, [ids(7, seed=1), ids(4, seed=2)], [[17], [23, 41]], parks=parks)
        for index in range(lm.num_layers):
            passed.climb(lm.layers[index], index)
        captures += passed.captures()
    assert torch.equal(captures[0].attention_LQD, captures[1].attention_LQD)
    assert torch.equal(captures[0].label_scores_QC, captures[1].label_scores_QC)
    assert len(parked) == lm.num_layers
