"""What has to hold for every family, against a plain loop: `python -m tests.families [MODEL DIRECTORY [float64]]` prints the table. Not a test.

Without an argument: tiny random models of every family, float64 and float32. With one: that model, float32 unless told otherwise. Exits 0 only where all of it holds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from iclgd_dist import shared_attention
from iclgd_dist.attention import recording_queries
from iclgd_dist.config import ModelSpec, Resources
from iclgd_dist.deltas import Delta, Deltas, attached
from iclgd_dist.layerwise import Prefix, Replay
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel, default_dtype, load
from iclgd_dist.probes import Context, QueryPass
from iclgd_dist.sites import WEIGHTS, sites
from iclgd_dist.updates import TrainingSequence
from tests import plain
from tests.tiny import METHODS, VARIANTS, config, ids, tiny

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # float32: two orders of summation of the same products
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Prompts:
    """Token ids; the context is longer than the windows of tiny models."""

    lead: list[int]  # sink and separator
    demonstrations: list[list[int]]
    queries: list[list[int]]
    labels: list[list[int]]
    rates: list[float]

    @property
    def context(self) -> list[int]:
        return self.lead + [token for demonstration in self.demonstrations for token in [*demonstration, self.lead[-1]]]


TINY = Prompts([1, 5], [ids(n, seed=n) for n in (7, 4, 9)], [ids(n, seed=50 + n) for n in (7, 3, 11)], [[17], [23, 41]], [0.03, 0.2])


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest expected number."""
    return float(((got.double() - expected.double()).abs().max() / expected.double().abs().max()).nan_to_num(torch.inf))


def climbed(lm: LanguageModel, query_pass: QueryPass, deltas: Deltas | None = None, prefix: Prefix | None = None) -> list[Capture]:
    """Return each lane's capture of a pass that went up through all layers."""
    for index in range(lm.num_layers):
        with lm.resident(index) as layer, torch.no_grad():
            if prefix:
                prefix.climb(layer, index)
            query_pass.climb(layer, index, deltas)
    return query_pass.captures()


def exit_logits(lm: LanguageModel, ids_BT: Tensor, deltas: Deltas | None = None) -> Tensor:
    """Return the early exit of the last layer (B, T, V) with deltas attached."""
    replay = Replay(lm, ids_BT)
    with torch.no_grad():
        for index in range(lm.num_layers):
            with lm.resident(index) as layer, attached(lm, index, deltas or {}):
                replay.climb(layer, index)
        return lm.early_exit(replay.hidden_BTD)


def deltas_equal_written_weights(lm: LanguageModel, model: nn.Module, prompts: Prompts) -> Iterator[float]:
    """(a) A delta attached by hook equals writing the weight: every projection of every layer, one kind at a time and all at once."""
    query, num_lanes = prompts.queries[0], 2
    generator = torch.Generator().manual_seed(0)
    kinds = [[part] for part in plain.parts_of(model)] if lm.num_layers < 10 else []
    for parts in [*kinds, plain.parts_of(model)]:
        deltas, changes = {}, []
        for index in range(lm.num_layers):
            for part, site in sites(lm, index, WEIGHTS["all_linear"]).items():
                if part in parts:
                    tensors = plain.tensors(model, index, part)
                    values = [
                        0.2 * plain.read(tensor).std() * torch.randn(num_lanes, *plain.read(tensor).shape, generator=generator, dtype=torch.float64)
                        for tensor in tensors
                    ]
                    made = [value.to(lm.delta_dtype) for value in values]
                    deltas[site.name] = Delta(made[0], made[1] if len(made) > 1 else None)
                    changes += list(zip(tensors, [value.double() for value in made], strict=True))
        assert len(deltas) == len(parts) * lm.num_layers
        got = exit_logits(lm, torch.tensor([query]).repeat(num_lanes, 1), deltas)
        for lane in range(num_lanes):
            for tensor, value in changes:
                plain.write(tensor, value[lane])
            with torch.no_grad():
                yield error(got[lane], plain.logits(model, torch.tensor([query])))
            for tensor, value in changes:
                plain.write(tensor, -value[lane])


def training_equals_the_plain_loop(lm: LanguageModel, model: nn.Module, prompts: Prompts) -> Iterator[float]:
    """(b) Deltas and losses after every step, and captures after the last, equal those of a loop that writes weights, for both methods and every rate."""
    demonstrations = [prompts.lead + demonstration for demonstration in prompts.demonstrations]
    sequences = [TrainingSequence(torch.tensor(demonstration), len(prompts.lead)) for demonstration in demonstrations]
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    for method in ("vanilla", "layer_causal"):
        probes = list(METHODS[method].train(lm, sequences, prompts.rates, steps=range(1, len(sequences) + 1)))
        trained = climbed(lm, QueryPass(lm, prompts.queries, prompts.labels, lead=prompts.lead, num_lanes=len(prompts.rates)), probes[-1].deltas)
        for lane, rate in enumerate(prompts.rates):
            loop = plain.train(model, demonstrations, len(prompts.lead), rate, method)
            for probe, (expected, loss, written) in zip(probes, loop, strict=True):
                names = [site.name for index in range(lm.num_layers) for site in sites(lm, index).values()]
                got = [tensor[lane] for name in names for tensor in probe.deltas[name].tensors()]
                yield error(torch.cat([tensor.flatten() for tensor in got]), torch.cat([tensor.flatten() for tensor in expected]))
                yield error(probe.loss_SN[-1, lane], loss)
                if probe is probes[-1]:
                    yield _capture_error(trained[lane], written, prompts, prompts.lead)
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items()), "base weights were written"


def captures_equal_eager_attention(lm: LanguageModel, model: nn.Module, prompts: Prompts) -> Iterator[float]:
    """(c) Attention outputs, scores and label scores equal those of single prompts in eager attention; recorded queries equal the projection by hand."""
    (capture,) = climbed(lm, QueryPass(lm, prompts.queries, prompts.labels, lead=prompts.lead))
    yield _capture_error(capture, model, prompts, prompts.lead)
    replay, recorded = Replay(lm, torch.tensor([prompts.context])), list[Tensor]()
    for index in range(lm.num_layers):
        with torch.no_grad(), lm.resident(index) as layer, recording_queries(lm, index, recorded.append):
            replay.climb(layer, index)
    for got, expected in zip(recorded, plain.queries(model, prompts.context), strict=True):
        yield error(got[0], expected)


def any_packing_agrees(lm: LanguageModel, model: nn.Module, prompts: Prompts) -> Iterator[float]:
    """(d) Captures with right padding equal those of one row at a time and of any micro-batch."""
    passes = [
        climbed(lm, QueryPass(lm, prompts.queries, prompts.labels, lead=prompts.lead, tokens_per_batch=budget, num_lanes=lanes))[-1]
        for budget, lanes in ((1, 1), (30, 1), (4096, 1), (60, 2))
    ]
    for other in passes[1:]:
        yield max(error(got, expected) for got, expected in zip(_tensors(other), _tensors(passes[0]), strict=True))


def early_exits_are_the_models_own_logits(lm: LanguageModel, model: nn.Module, prompts: Prompts) -> Iterator[float]:
    """(e) After the last layer, and after any other those of the same model without the layers above."""
    for query in prompts.queries[:1] if lm.num_layers > 10 else prompts.queries:
        replay = Replay(lm, torch.tensor([prompts.lead + query]))
        for index in range(lm.num_layers):
            with torch.no_grad():
                with lm.resident(index) as layer:
                    replay.climb(layer, index)
                yield error(lm.early_exit(replay.hidden_BTD)[0], plain.logits(model, torch.tensor([prompts.lead + query]), index + 1))


def a_shared_prefix_equals_the_full_prompt(lm: LanguageModel, model: nn.Module, prompts: Prompts) -> Iterator[float]:
    """(f) Queries behind a context whose keys and values were computed once equal whole prompts, of the package and of the plain loop."""
    for num_worth in (0, len(prompts.context) + 1):  # attention in two parts, and keys and values that are copied
        with mock.patch.object(shared_attention, "NUM_WORTH", num_worth):
            prefix = Prefix(lm, torch.tensor(prompts.context))
            context = Context(prefix, prefix.length)
            (shared,) = climbed(lm, QueryPass(lm, prompts.queries, prompts.labels, context=context, tokens_per_batch=20), prefix=prefix)
        (whole,) = climbed(lm, QueryPass(lm, prompts.queries, prompts.labels, lead=prompts.context))
        yield max(error(got, expected) for got, expected in zip(_tensors(shared), _tensors(whole), strict=True))
        yield _capture_error(shared, model, prompts, prompts.context)


CHECKS: dict[str, Callable[[LanguageModel, nn.Module, Prompts], Iterator[float]]] = {
    "a": deltas_equal_written_weights,
    "b": training_equals_the_plain_loop,
    "c": captures_equal_eager_attention,
    "d": any_packing_agrees,
    "e": early_exits_are_the_models_own_logits,
    "f": a_shared_prefix_equals_the_full_prompt,
}


def _tensors(capture: Capture) -> list[Tensor]:
    return [capture.attention_LQD, capture.scores_LQHT, capture.label_scores_QC]


def _capture_error(capture: Capture, model: nn.Module, prompts: Prompts, lead: list[int]) -> float:
    outputs, scores, labels = [], torch.zeros_like(capture.scores_LQHT, dtype=torch.float64), []
    for number, query in enumerate(prompts.queries):
        output, by_hand, after = plain.capture(model, lead + query, len(query))
        outputs.append(output)
        scores[:, number, :, : len(query)] = by_hand
        row = []
        for label in prompts.labels:
            terms = [after[label[0]]] + [plain.capture(model, lead + query + label[:n], 1)[2][label[n]] for n in range(1, len(label))]
            row.append(torch.stack(terms).mean())
        labels.append(torch.stack(row))
    return max(error(got, expected) for got, expected in zip(_tensors(capture), (torch.stack(outputs, dim=1), scores, torch.stack(labels)), strict=True))


def errors_of(lm: LanguageModel, prompts: Prompts) -> dict[str, float]:
    """Return the largest error of each check."""
    with default_dtype(torch.float64):  # a float64 XGLM runs only where float64 is the default
        model = plain.copied(lm.model)
        return {name: max(check(lm, model, prompts)) for name, check in CHECKS.items()}


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    family: str
    name: str
    special: str
    errors: dict[str, dict[str, float]]  # dtype -> check -> largest error


def _tiny_rows() -> Iterator[Row]:
    for name, variant in VARIANTS.items():
        errors = {dtype: errors_of(tiny(name, DTYPES[dtype], layers=2), TINY) for dtype in DTYPES}
        yield Row(config(name).model_type, name, variant.special, errors)


def _real_row(directory: Path, dtype: str) -> Row:
    from transformers import AutoTokenizer

    lm = load(directory, ModelSpec(source=str(directory), compute_dtype=dtype), Resources(device_map="cpu"), storage_dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(directory)

    def encoded(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompts = Prompts(
        [tokenizer.bos_token_id or tokenizer.eos_token_id or 0, *encoded("\n")[-1:]],
        [encoded(text) for text in ("Review: a fine film. Sentiment: positive", "Review: dull. Sentiment: negative")],
        [encoded(text) for text in ("Review: a warm and funny story. Sentiment:", "Review: it drags on. Sentiment:")],
        [encoded(" positive")[:1], encoded(" negative, mostly")],
        [0.001],
    )
    return Row(lm.family.model_type, lm.family.model_type, f"{lm.num_layers} layers, {lm.width} wide", {dtype: errors_of(lm, prompts)})


def main(arguments: list[str]) -> int:
    """Print the table and the line of JSON; return the exit code."""
    dtypes = [*arguments[1:], "float32"][:1] if arguments else list(DTYPES)
    print("| family | special | " + " | ".join(f"{check}, {dtype}" for dtype in dtypes for check in CHECKS) + " |")
    print("|---|---|" + "---|" * len(CHECKS) * len(dtypes))
    rows = []
    for row in [_real_row(Path(arguments[0]), dtypes[0])] if arguments else _tiny_rows():
        print(f"| {row.name} | {row.special} | " + " | ".join(f"{row.errors[dtype][check]:.0e}" for dtype in dtypes for check in CHECKS) + " |", flush=True)
        rows.append(row)
    found = [(dtype, value) for row in rows for dtype, errors in row.errors.items() for value in errors.values()]
    holds = all(value <= TOLERANCE[DTYPES[dtype]] for dtype, value in found)
    print(json.dumps({"families": len({row.family for row in rows}), "worst": max(value for _, value in found), "holds": holds}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
