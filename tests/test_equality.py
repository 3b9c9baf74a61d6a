"""Training and captures equal a plain loop that copies the model and writes its weights, for every family and both methods."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from iclgd_dist.families import FAMILIES
from iclgd_dist.layerwise import Prefix
from iclgd_dist.model import LanguageModel, default_dtype
from iclgd_dist.probes import Context, QueryPass
from iclgd_dist.sites import sites
from iclgd_dist.updates import METHODS, Probe, TrainingSequence
from tests import plain
from tests.tiny import ids, tiny

RATES = [0.05, 0.003, 0.4]
LEAD = [1, 5]  # sink and separator
DEMONSTRATIONS = [ids(n, seed=n) for n in (9, 4, 14, 6)]
QUERIES = [ids(n, seed=50 + n) for n in (7, 3, 11, 5, 8)]
LABELS = [[17], [23, 41], [23, 60, 12]]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # float32: two orders of summation of the same products


@pytest.fixture(autouse=True)
def _default_dtype():
    """A float64 XGLM runs only where float64 is the default."""
    with default_dtype(torch.float64):
        yield


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def eager(lm: LanguageModel) -> torch.nn.Module:
    """Return the model for the plain loop, always in float64: one that writes float32 weights would round each update to a weight's last bit."""
    model = copy.deepcopy(lm.model).double()
    model.set_attn_implementation("eager")
    return model


def run(lm: LanguageModel, method: str, rates: list[float], steps: list[int]) -> list[Probe]:
    sequences = [TrainingSequence(torch.tensor(LEAD + demonstration), len(LEAD)) for demonstration in DEMONSTRATIONS]
    return list(METHODS[method].train(lm, sequences, rates, steps=steps))


def climbed(lm: LanguageModel, query_pass: QueryPass, deltas=None, prefix: Prefix | None = None) -> QueryPass:
    for index in range(lm.num_layers):
        with lm.resident(index) as layer, torch.no_grad():
            if prefix:
                prefix.replay.climb(layer, index)
            query_pass.climb(layer, index, deltas)
    return query_pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("method", ["vanilla", "layer_causal"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_deltas_after_every_step_and_all_captures_equal_the_plain_loop(family: str, method: str, dtype: torch.dtype) -> None:
    lm = tiny(family, dtype)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    probes = run(lm, method, RATES, [1, 2, 3, 4])
    for lane, rate in enumerate(RATES):
        loop = plain.train(eager(lm), [LEAD + demonstration for demonstration in DEMONSTRATIONS], len(LEAD), rate, method)
        for probe, (expected, loss, model) in zip(probes, loop, strict=True):
            got = [
                tensor[lane].mT if tensor[lane].dim() == 2 else tensor[lane]
                for index in range(lm.num_layers)
                for site in sites(lm, index).values()
                for tensor in probe.deltas[site.name].tensors()
            ]
            worst = max(float((a.double() - b.double()).abs().max()) for a, b in zip(got, expected, strict=True))
            assert worst / max(float(b.abs().max()) for b in expected) <= TOLERANCE[dtype]
            assert abs(float(probe.loss_SN[-1, lane]) / float(loss) - 1) <= TOLERANCE[dtype]
            if probe.step == 4:
                query_pass = climbed(lm, QueryPass(lm, QUERIES, LABELS, lead=LEAD, num_lanes=len(RATES), tokens_per_batch=60), probe.deltas)
                _same_captures(query_pass.captures()[lane], model, LEAD, TOLERANCE[dtype])
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items()), "base weights were written"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_zero_shot_and_in_context_captures_equal_full_prompts_run_one_by_one(family: str, dtype: torch.dtype) -> None:
    lm = tiny(family, dtype)
    context = LEAD + [token for demonstration in DEMONSTRATIONS for token in [*demonstration, 5]]
    prefix = Prefix(lm, torch.tensor(context))
    in_context = climbed(lm, QueryPass(lm, QUERIES, LABELS, context=Context(prefix, prefix.length), tokens_per_batch=20), prefix=prefix)
    _same_captures(in_context.captures()[0], eager(lm), context, TOLERANCE[dtype])
    for budget in (1, 30, 4096):
        zero_shot = climbed(lm, QueryPass(lm, QUERIES, LABELS, lead=LEAD, tokens_per_batch=budget))
        _same_captures(zero_shot.captures()[0], eager(lm), LEAD, TOLERANCE[dtype])


def _same_captures(capture, model: torch.nn.Module, lead: list[int], tolerance: float) -> None:
    expected_out, expected_scores, expected_labels = [], torch.zeros_like(capture.scores_LQHT), []
    for number, query in enumerate(QUERIES):
        out, scores, log_probabilities = plain.capture(model, lead + query, len(query))
        expected_out.append(out)
        expected_scores[:, number, :, : len(query)] = scores
        row = []
        for label in LABELS:
            total, tokens = 0.0, list(query)
            for token in label:
                total += float(plain.capture(model, lead + tokens, 1)[2][token]) if tokens != query else float(log_probabilities[token])
                tokens.append(token)
            row.append(total / len(label))
        expected_labels.append(row)
    assert error(capture.attention_LQD, torch.stack(expected_out, dim=1)) <= tolerance
    assert error(capture.scores_LQHT, expected_scores) <= tolerance
    assert error(capture.label_scores_QC, torch.tensor(expected_labels, dtype=torch.float64)) <= tolerance
