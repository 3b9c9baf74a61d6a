"""Storage and compute dtype: small updates reach the activations, and what a dtype cannot resolve is NULL, not a number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from iclgd_dist import metrics
from iclgd_dist.block import run_block
from iclgd_dist.config import ModelSpec, Resources
from iclgd_dist.deltas import Deltas
from iclgd_dist.layerwise import Prefix
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel, default_dtype, load
from iclgd_dist.probes import Context, QueryPass
from iclgd_dist.sites import sites
from iclgd_dist.store import Store, read_results
from iclgd_dist.updates import TrainingSequence
from tests import plain
from tests.test_block import planned
from tests.tiny import METHODS, ids, lm_for, tiny

LEAD = [1, 5]  # sink and separator
DEMONSTRATIONS = [ids(n, seed=n) for n in (9, 4, 14, 6)]
QUERIES = [ids(n, seed=50 + n) for n in range(3, 15)]
LABELS = [[17], [23]]
FAMILIES = ["llama", "gpt2", "gpt_neox", "opt", "xglm", "gemma2", "falcon_grouped"]
every_method = pytest.mark.parametrize("method", ["vanilla", "layer_causal"])


def saved(family: str, folder: Path, *, offset: float = 0.0, rounded: bool = False) -> Path:
    """Write a tiny float32 model, its key and value weights moved away from 0 by `offset`, all weights rounded to bfloat16 if asked for."""
    lm = tiny(family, torch.float32)
    with torch.no_grad():
        for index in range(lm.num_layers):
            for module in {site.module for site in sites(lm, index).values()}:
                module.weight += offset * module.weight.sign()  # type: ignore[operator]
        for parameter in lm.model.parameters() if rounded else ():
            parameter.copy_(parameter.bfloat16())
    lm.model.save_pretrained(folder)
    return folder


def loaded(folder: Path, *, storage: str = "float32", compute: str = "float32") -> LanguageModel:
    return load(folder, ModelSpec(source="tiny", compute_dtype=compute), Resources(device_map="cpu"), storage_dtype=storage)


def trained(lm: LanguageModel, method: str, rate: float) -> Deltas:
    sequences = [TrainingSequence(torch.tensor(LEAD + demonstration), len(LEAD)) for demonstration in DEMONSTRATIONS]
    with default_dtype(lm.delta_dtype):
        (probe,) = METHODS[method].train(lm, sequences, [rate], steps=[len(sequences)])
    return probe.deltas


def captured(lm: LanguageModel, deltas: Deltas | None = None, *, in_context: bool = False, tokens_per_batch: int | None = None) -> Capture:
    with default_dtype(lm.delta_dtype), torch.no_grad():
        context = LEAD + [token for demonstration in DEMONSTRATIONS for token in [*demonstration, 5]]
        prefix = Prefix(lm, torch.tensor(context)) if in_context else None
        shown = Context(prefix, len(context)) if prefix else None
        query_pass = QueryPass(lm, QUERIES, LABELS, lead=LEAD, context=shown, tokens_per_batch=tokens_per_batch)
        for index, layer in enumerate(lm.layers):
            if prefix:
                prefix.replay.climb(layer, index)
            query_pass.climb(layer, index, deltas)
    return query_pass.captures()[0]


def close_in_direction_and_size(got: Tensor, expected: Tensor) -> bool:
    got, expected = got.double().flatten(), expected.flatten()
    return bool(torch.cosine_similarity(got, expected, dim=0) > 0.9999) and abs(float(got @ expected / (expected @ expected)) - 1) < 1e-3


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_an_update_that_no_bfloat16_weight_would_show_moves_the_activations_as_it_does_in_float64(family: str, method: str, tmp_path: Path) -> None:
    lm = loaded(saved(family, tmp_path, offset=0.25), storage="bfloat16")
    exact = plain.copied(lm.model)
    # Between .25 and .5 bfloat16 numbers lie 2^-9 apart; half of that is the smallest update that changes one. The offset keeps weights out of finer grids.
    largest = max(float(delta.weight_NIO.abs().max()) for delta in trained(lm, method, 1e-4).values())
    rate = 0.5 * 2**-10 / largest * 1e-4
    deltas = trained(lm, method, rate)
    for index in range(lm.num_layers):
        for site in sites(lm, index).values():
            weight_OI = site.module.weight.T if family == "gpt2" else site.module.weight  # type: ignore[union-attr,operator]
            weight_OI = weight_OI if site.columns is None else weight_OI[site.columns]
            assert torch.equal((weight_OI + deltas[site.name].weight_NIO[0].T).bfloat16(), weight_OI.bfloat16()), "a weight would change: nothing is tested"
    before, after = captured(lm), captured(lm, deltas)
    with default_dtype(torch.float64):
        *_, (_, _, model) = plain.train(exact, [LEAD + demonstration for demonstration in DEMONSTRATIONS], len(LEAD), rate, method)
        pairs = [[plain.capture(which, LEAD + query, len(query)) for which in (exact, model)] for query in QUERIES]
    expected_attention = torch.stack([ft[0] - zs[0] for zs, ft in pairs], dim=1)
    assert close_in_direction_and_size(after.attention_LQD - before.attention_LQD, expected_attention)
    for number, (zs, ft) in enumerate(pairs):
        change = (after.scores_LQHT - before.scores_LQHT)[:, number, :, : len(QUERIES[number])]
        assert float((change.double() - (ft[1] - zs[1])).norm() / (ft[1] - zs[1]).norm()) < 0.02


@every_method
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_weights_computed_in_float32_are_the_float32_model_with_rounded_weights(family: str, method: str, tmp_path: Path) -> None:
    stored = loaded(saved(family, tmp_path / "exact"), storage="bfloat16")
    others = [loaded(saved(family, tmp_path / name, rounded=name == "rounded")) for name in ("rounded", "as it was")]
    mine, rounded, unrounded = (captured(lm, trained(lm, method, 0.05)).attention_LQD for lm in (stored, *others))
    assert float((mine - rounded).abs().max() / rounded.abs().max()) <= 1e-4
    assert float((mine - unrounded).abs().max() / unrounded.abs().max()) > 1e-3, "rounding changes nothing: nothing is tested"


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_are_summed_in_float32_also_where_all_else_is_bfloat16(family: str, method: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path, rounded=True)
    low, exact = (trained(loaded(folder, compute=compute), method, 1e-3) for compute in ("bfloat16", "float64"))
    assert all(delta.weight_NIO.dtype == torch.float32 for delta in low.values())
    a, b = (torch.cat([delta.weight_NIO.double().flatten() for delta in deltas.values()]) for deltas in (low, exact))
    assert float(torch.cosine_similarity(a, b, dim=0)) > 0.95  # the gradients themselves are those of a bfloat16 pass


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_a_similarity_is_near_that_of_float64_or_undefined(family: str, method: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path, rounded=True)
    exact, single, half = (similarities(loaded(folder, compute=compute), method) for compute in ("float64", "float32", "bfloat16"))
    assert half[1e-4].isnan().all(), "bfloat16 cannot tell such an update from rounding"
    for rate in (1e-4, 1e-3):
        torch.testing.assert_close(single[rate], exact[rate], atol=0.02, rtol=0, equal_nan=True)  # undefined: what a sliding window does not see
        assert single[rate].isfinite().double().mean() > 0.5
    assert half[0.06].isfinite().any()
    assert (half[0.06] - exact[0.06])[half[0.06].isfinite()].abs().mean() < 0.1


def similarities(lm: LanguageModel, method: str) -> dict[float, Tensor]:
    zero_shot, again, in_context = captured(lm), captured(lm, tokens_per_batch=1), captured(lm, in_context=True)
    precision = torch.finfo(lm.compute_dtype)
    floor_L = metrics.noise_floor(zero_shot, again, eps=precision.eps if precision.bits < 32 else 0.0).attention_L
    origin = metrics.vectors(zero_shot.attention_LQD)
    icl = metrics.attention_change(origin, in_context.attention_LQD)
    found = {}
    for rate in (1e-4, 1e-3, 0.06):
        change = metrics.attention_change(origin, captured(lm, trained(lm, method, rate)).attention_LQD)
        found[rate] = metrics.sim_aou(icl, change, floor_L=floor_L)
    return found


def test_a_block_records_the_noise_floor_of_its_dtype_and_null_below_it(sweep_file: Path, tmp_path: Path) -> None:
    floors, similar = {}, {}
    for dtype in ("float64", "float32", "bfloat16"):
        block, store = planned(sweep_file, dtype=dtype, vanilla="[1e-4]", layer_causal="[1e-4]"), Store(tmp_path / dtype)
        store.prepare()
        run_block(lm_for(block), block, store)
        results = read_results(store)
        floors[dtype] = max(row["noise_floor"] for row in results.layers.to_pylist() if row["noise_floor"] is not None)
        rows = [row for row in results.cells.to_pylist() if row["kind"] == "finetuned"]
        similar[dtype] = {(row["method"], row["step"], name): row[name] for row in rows for name in ("sim_aou", "sim_aou_norm", "sim_am_delta")}
    assert 0 < floors["float64"] < 1e-6 * floors["float32"] < 1e-9 * floors["bfloat16"]
    assert set(similar["bfloat16"].values()) == {None}
    assert similar["float32"] == pytest.approx(similar["float64"], abs=2e-3)
