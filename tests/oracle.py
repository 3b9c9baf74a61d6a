"""Check the package against numbers that the published code of the two papers gave: `python -m tests.oracle DIR`.

DIR is a case, or holds several: a tiny model, token ids, and for float64 (`f64`) or float32 (`f32`) or both what the published code made of them at
every stage. tests/data/oracle_a is one and its README.md says what lies where. The package trains, captures and compares; nothing is read from the
case but the model, the ids and what to expect. Prints one line of JSON with the largest error of each quantity; exit status 0 = all within
tolerance, 1 = not, 2 = DIR is no case. Not a test.
"""

# Shapes: N lanes (learning rates)  L layers  Q queries  H heads  T positions  D width  C labels

from __future__ import annotations

import json
import math
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from iclgd_dist import metrics
from iclgd_dist.attention import recording_queries
from iclgd_dist.config import ModelSpec, Resources
from iclgd_dist.deltas import Deltas
from iclgd_dist.layerwise import Prefix
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel, default_dtype, load
from iclgd_dist.probes import Context, QueryPass
from iclgd_dist.ranking import compare_attention
from iclgd_dist.sites import sites
from iclgd_dist.updates import BottomUp, LaneInputs, TrainingSequence
from tests.tiny import METHODS

DTYPES = {"f64": "float64", "f32": "float32"}
TOLERANCE = {"f64": 1e-8, "f32": 1e-4}  # float32: the published code's own float32 numbers are 4e-5 off its float64 ones
ATTENTION_TO_DEMONSTRATIONS = ("kendall_tokens", "kendall_examples", "topk_recall_tokens", "topk_recall_examples")


class NoCase(ValueError):
    """A directory that holds no case, or only part of one."""


class Errors(dict[str, float]):
    """The largest error of each quantity: max |got - expected| / max(1, max |expected|)."""

    def compare(self, quantity: str, got: Any, expected: Any) -> None:
        """Take in one pair of arrays; NaN and null stand for undefined and must be so on both sides."""
        a, b = (np.asarray(values, dtype=np.float64) for values in (got, expected))
        is_defined = ~np.isnan(b)
        found = math.inf
        if a.shape == b.shape and (np.isnan(a) != is_defined).all():
            found = float(np.abs(a - b)[is_defined].max(initial=0.0) / np.abs(b)[is_defined].max(initial=1.0))
        self[quantity] = max(self.get(quantity, 0.0), found)


# --- The case


class Table(dict[str, Any]):
    """What a file of the case holds; a name that is not there is named together with the file."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, name: str) -> Any:
        raise NoCase(f"{self.file}: {name} is missing")


def read(file: Path) -> Table:
    """Return the contents of a .npz or .json file."""
    try:
        if file.suffix == ".json":
            table: Table = json.loads(file.read_text(), object_hook=lambda values: Table(file, values))
            return table
        with np.load(file) as arrays:
            return Table(file, arrays)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise NoCase(f"{file} cannot be read: {error}") from error


@dataclass(frozen=True)
class Inputs:
    """The token ids of a case."""

    demonstrations: list[list[int]]  # each begins with BOS
    zero_shot: list[list[int]]  # context, query and the token of label 0
    in_context: list[list[int]]
    zero_shot_context: list[int]
    in_context_context: list[int]
    labels: list[int]
    gold: list[int]
    eos: int
    is_same_order: bool

    @property
    def items(self) -> list[tuple[int, int]]:
        """Return where the tokens of each demonstration begin and end among those of all."""
        ends = np.cumsum([len(ids) - 1 for ids in self.demonstrations]).tolist()
        return list(zip([0, *ends], ends, strict=False))

    @property
    def columns(self) -> list[int]:
        """Return the positions of these tokens in the ICL context: after its BOS, and an EOS after each demonstration."""
        return [1 + number + item for number, (start, end) in enumerate(self.items) for item in range(start, end)]


def read_inputs(case: Path) -> Inputs:
    found = read(case / "inputs.json")
    contexts = {"zs": found["zs_input_sequences"][0][: found["zs_context_len"]], "icl": found["icl_context"]}
    for kind, context in contexts.items():
        if any(ids[: len(context)] != context or ids[-1] != found["label_token_ids"][0] for ids in found[f"{kind}_input_sequences"]):
            raise NoCase(f"{case}/inputs.json: every {kind} input must begin with the same context and end with the token of label 0")
    inputs = Inputs(
        found["ft_sequences_in_training_order"],
        found["zs_input_sequences"],
        found["icl_input_sequences"],
        contexts["zs"],
        contexts["icl"],
        found["label_token_ids"],
        found["gold_labels"],
        found["eos"],
        found["ft_order_equals_icl_order"],
    )
    joined = inputs.demonstrations[0][:1] + [token for ids in inputs.demonstrations for token in [*ids[1:], inputs.eos]]
    if inputs.is_same_order and joined != inputs.in_context_context:
        raise NoCase(f"{case}/inputs.json: ft_order_equals_icl_order is true, but icl_context is not BOS and each training sequence with EOS after it")
    return inputs


def runs_of(part: Path) -> dict[str, list[str]]:
    """Return the learning rates of each method as the files write them."""
    found: dict[str, list[str]] = {}
    for file in sorted(part.glob("train_*.npz")):
        name = re.fullmatch(r"train_(.+)_lr([-+.e\d]+)", file.stem)
        if name is None or name[1] not in METHODS:
            raise NoCase(f"{file}: train_METHOD_lrNUMBER.npz is required, with METHOD one of {', '.join(METHODS)}")
        found.setdefault(name[1], []).append(name[2])
    if not found:
        raise NoCase(f"{part} holds no train_METHOD_lrNUMBER.npz")
    return found


# --- The package at work


class ReferenceModel(LanguageModel):
    """A LanguageModel whose early exit scales gradients as the published code scales its loss: by float32(1 / tokens), not 1 / tokens.

    The difference moves weights by up to 7e-9 in float64. What the early exit returns is untouched.
    """

    def normed(self, hidden_XD: Tensor) -> Tensor:
        num_tokens = hidden_XD.shape[-2]
        excess = float(np.float32(1 / num_tokens)) * num_tokens - 1
        return super().normed(hidden_XD + excess * (hidden_XD - hidden_XD.detach()))


def load_model(case: Path, dtype: str) -> LanguageModel:
    for name in ("config.json", "model.safetensors"):
        if not (case / "model" / name).is_file():
            raise NoCase(f"{case}/model/{name} is missing")
    spec = ModelSpec.model_validate({"source": "model", "compute_dtype": dtype})
    lm = load(case / "model", spec, Resources(device_map="cpu"), storage_dtype="float32")
    return ReferenceModel(**{field.name: getattr(lm, field.name) for field in fields(lm)})


@dataclass(frozen=True)
class Training:
    """What one method's training came to, all lanes."""

    deltas: dict[int, Deltas]  # by step
    loss_SLN: Tensor  # [nats per token]; L = 1 where layers have no loss of their own
    queries_LSNTW: list[Sequence[Tensor]]  # projections of the training tokens, unscaled

    @property
    def of_items_LNTW(self) -> list[Tensor]:
        """Return the query projections of the demonstrations' tokens: all but each sequence's BOS."""
        return [torch.cat([query_NTW[:, 1:] for query_NTW in layer], dim=1) for layer in self.queries_LSNTW]


def train(lm: LanguageModel, inputs: Inputs, method: str, rates: Sequence[float]) -> Training:
    sequences = [TrainingSequence(torch.tensor(ids), 1) for ids in inputs.demonstrations]
    steps, learner = range(1, len(sequences) + 1), METHODS[method]
    deltas: dict[int, dict[str, Any]] = {step: {} for step in steps}
    losses, queries = [], {}
    if isinstance(learner, BottomUp):  # as a block runs it: all steps of a layer before the next layer
        lanes, probes = LaneInputs(lm, sequences, len(rates)), []
        for index in range(lm.num_layers):
            with lm.resident(index) as layer:
                probes = list(learner.train_layer(lm, index, layer, lanes, rates, steps=steps))
            losses.append(probes[-1].loss_SN)
            queries |= probes[-1].queries
            for probe in probes:
                deltas[probe.step] |= probe.deltas
    else:
        probes = list(learner.train(lm, sequences, rates, steps=steps))
        losses.append(probes[-1].loss_SN)
        queries |= probes[-1].queries
        deltas = {probe.step: dict(probe.deltas) for probe in probes}
    return Training(dict(deltas), torch.stack(losses, dim=1), [queries[index] for index in range(lm.num_layers)])


@dataclass(frozen=True)
class State:
    """What a state does with the queries."""

    at_label: Capture  # recorded at the token of label 0
    at_prompt: Capture  # recorded at the token before it
    to_context_QLT: Tensor  # attention scores of the token of label 0 over the context, summed over heads
    query_QLD: Tensor  # query projection of the token of label 0, scaled


def evaluate(lm: LanguageModel, inputs: Inputs, *, in_context: bool = False, training: Training | None = None, num_lanes: int = 1) -> list[State]:
    """Return one State per lane. The queries share the ICL context, as a block's do; attention to all of a context is captured from whole prompts."""
    prompts, context = (inputs.in_context, inputs.in_context_context) if in_context else (inputs.zero_shot, inputs.zero_shot_context)
    queries, options = [ids[len(context) : -1] for ids in prompts], [[label] for label in inputs.labels]
    place: dict[str, Any] = {"lead": context, "num_lanes": num_lanes}
    prefix = Prefix(lm, torch.tensor(context)) if in_context else None
    if prefix:
        place = {"context": Context(prefix, prefix.length, torch.tensor(inputs.columns) if inputs.is_same_order else None)}
    at_label, at_prompt = (QueryPass(lm, queries, options, at_label=is_at_label, **place) for is_at_label in (True, False))
    whole = QueryPass(lm, prompts, options, num_lanes=num_lanes, tokens_per_batch=1)  # each prompt a micro-batch of its own
    deltas = training.deltas[len(inputs.demonstrations)] if training else None
    by_layer = []
    for index in range(lm.num_layers):
        last_NW: list[Tensor] = []
        with lm.resident(index) as layer, torch.no_grad():
            if prefix:
                prefix.replay.climb(layer, index)
            at_label.climb(layer, index, deltas, trained_NTW=training.of_items_LNTW[index] if training else None)
            at_prompt.climb(layer, index, deltas)
            with recording_queries(lm, index, lambda query_BTHd, last_NW=last_NW: last_NW.append(query_BTHd[:, -1].flatten(1))):
                whole.climb(layer, index, deltas)
        by_layer.append([last_NW[call] for call in sorted(range(len(prompts)), key=lambda call: whole.batches[call].queries[0])])
    query_NQLD = torch.stack([torch.stack(layer, dim=1) for layer in by_layer], dim=2) * scaling(lm)
    to_context_NQLT = whole.scores_NLQHT[..., : len(context)].sum(3).transpose(1, 2)
    captures = zip(at_label.captures(), at_prompt.captures(), strict=True)
    return [State(*pair, to_context_NQLT[n], query_NQLD[n]) for n, pair in enumerate(captures)]


def scaling(lm: LanguageModel) -> float:
    """Return what the published code multiplies query projections with before it records them."""
    return float((lm.width // lm.num_heads) ** -0.5)


def similarities(zero_shot: Capture, in_context: Capture, finetuned: Capture) -> dict[str, Tensor]:
    """Return the similarities of each layer (L,) as the published code defines them: there every change counts, and an eps makes 0 / 0 a 0."""
    origin = metrics.vectors(zero_shot.attention_LQD)
    icl, ft = (metrics.attention_change(origin, state.attention_LQD) for state in (in_context, finetuned))
    icl_scores, ft_scores = (metrics.score_change(zero_shot.scores_LQHT, state.scores_LQHT) for state in (in_context, finetuned))
    floor_LH = torch.full((origin.norm.shape[0], zero_shot.scores_LQHT.shape[2]), -1.0)
    found = {
        "sim_aou": metrics.sim_aou(icl, ft, floor_L=floor_LH[:, 0]),
        "sim_aou_norm": metrics.sim_aou_norm(icl, ft, floor_L=floor_LH[:, 0]),
        "sim_am": metrics.sim_am(icl_scores, ft_scores, floor_LH=floor_LH),
        "sim_am_zs": metrics.sim_am_zs(icl_scores, zero_shot.scores_LQHT),
        "sim_am_delta": metrics.sim_am_delta(icl_scores, ft_scores, floor_LH=floor_LH),
    }
    return {name: values_LQ.nan_to_num(0.0).mean(1) for name, values_LQ in found.items()}


def attention_to_demonstrations(inputs: Inputs, in_context: Capture, finetuned: Capture) -> dict[str, Tensor]:
    """Return the rank comparisons of each layer (L,), over the first queries."""
    assert in_context.ranked_LQT is not None and finetuned.ranked_LQT is not None
    layers = [compare_attention(icl_QT, ft_QT, inputs.items) for icl_QT, ft_QT in zip(in_context.ranked_LQT, finetuned.ranked_LQT, strict=True)]
    return {name: torch.stack([layer[name].mean() for layer in layers]) for name in ATTENTION_TO_DEMONSTRATIONS}


# --- The comparison


def compare_training(errors: Errors, lm: LanguageModel, training: Training, lane: int, expected: Table) -> None:
    for index in range(lm.num_layers):
        for part, site in sites(lm, index).items():
            for kind in ("weight", "bias"):
                start = getattr(site.module, kind)
                errors.compare("weights", start, expected[f"step0/L{index}.{part}_proj.{kind}"])
                for step, deltas in training.deltas.items():
                    delta = deltas[site.name]
                    added = delta.weight_NIO[lane].mT if kind == "weight" else 0 if delta.bias_NO is None else delta.bias_NO[lane]
                    errors.compare("weights", start + added, expected[f"step{step}/L{index}.{part}_proj.{kind}"])
    num_tokens_S = torch.tensor([query_NTW.shape[1] - 1 for query_NTW in training.queries_LSNTW[0]])
    loss_SL = training.loss_SLN[:, :, lane].double() * num_tokens_S[:, None]
    errors.compare("loss_sum", loss_SL.sum(1), expected["loss_sum"])
    errors.compare("sample_size", num_tokens_S, expected["sample_size"])
    for number in range(len(num_tokens_S)):
        query_LTD = torch.stack([layer[number][lane] for layer in training.queries_LSNTW]) * scaling(lm)
        errors.compare("attn_q_training", query_LTD, expected[f"demo{number}/attn_q"])
        if f"demo{number}/loss_per_layer" in expected:
            errors.compare("loss_per_layer", loss_SL[number], expected[f"demo{number}/loss_per_layer"])


def compare_state(errors: Errors, state: State, gold: list[int], num_tokens_Q: Sequence[int], expected: Table) -> None:
    errors.compare("self_attn_out_hiddens", state.at_label.attention_LQD.transpose(0, 1), expected["self_attn_out_hiddens"])
    errors.compare("attn_map_ctx", state.to_context_QLT, expected["attn_map_ctx"])
    if "attn_q" in expected:  # of finetuned states only
        errors.compare("attn_q", state.query_QLD, expected["attn_q"])
    for query, num_tokens in enumerate(num_tokens_Q):
        errors.compare("attn_map", state.at_label.scores_LQHT[:, query, :, :num_tokens], expected[f"q{query}/attn_map"])
        if f"q{query}/self_attn_out_at_-2" in expected:
            errors.compare("self_attn_out_at_-2", state.at_prompt.attention_LQD[:, query], expected[f"q{query}/self_attn_out_at_-2"])
    errors.compare("option_logprobs", state.at_prompt.label_scores_QC, expected["option_logprobs"])
    answers = metrics.answers(state.at_label.label_scores_QC, torch.tensor(gold))
    errors.compare("option_logprobs", answers.label_scores_QC, expected["option_logprobs"])
    errors.compare("pred_label", answers.predictions_Q, expected["pred_label"])
    errors.compare("gold_label", gold, expected["gold_label"])


def compare_predictions(errors: Errors, gold: list[int], states: Sequence[State], expected: Table) -> None:
    right = [metrics.predictions(state.at_label.label_scores_QC)[0] == torch.tensor(gold) for state in states]
    found, counts = metrics.rec2ftp(*right), expected["counts"]
    errors.compare("rec2ftp", found["rec2ftp"], expected["rec2ftp"])
    for ours, theirs in (("icl_right", "icl"), ("ft_right", "finetuned"), ("ft_right_icl_right", "both")):
        errors.compare("rec2ftp_counts", found[f"num_zs_wrong_{ours}"], counts[theirs])


def check_part(case: Path, part: str, inputs: Inputs) -> Errors:
    """Train, capture and compare everything in one dtype."""
    errors, folder, gold = Errors(), case / part, inputs.gold
    runs, expected = runs_of(folder), read(folder / "metrics.json")
    with default_dtype(getattr(torch, DTYPES[part])):  # XGLM makes constants in the default dtype
        lm = load_model(case, DTYPES[part])
        (zero_shot,), (in_context,) = evaluate(lm, inputs), evaluate(lm, inputs, in_context=True)
        num_tokens_Q = [len(ids) - len(inputs.zero_shot_context) for ids in inputs.zero_shot]
        for state, name in ((zero_shot, "zs"), (in_context, "icl")):
            compare_state(errors, state, gold, num_tokens_Q, read(folder / f"eval_{name}.npz"))
        for method, rates in runs.items():
            training = train(lm, inputs, method, [float(rate) for rate in rates])
            finetuned = evaluate(lm, inputs, training=training, num_lanes=len(rates))
            for lane, (rate, state) in enumerate(zip(rates, finetuned, strict=True)):
                run = f"{method}_lr{rate}"
                compare_training(errors, lm, training, lane, read(folder / f"train_{run}.npz"))
                compare_state(errors, state, gold, num_tokens_Q, read(folder / f"eval_finetuned_{run}.npz"))
                compare_predictions(errors, gold, (zero_shot, in_context, state), expected[run])
                for name, values in similarities(zero_shot.at_label, in_context.at_label, state.at_label).items():
                    errors.compare(name, values, expected[run][name])
                if inputs.is_same_order:
                    ranks = attention_to_demonstrations(inputs, in_context.at_label, state.at_label)
                    for name in ATTENTION_TO_DEMONSTRATIONS:
                        errors.compare(name, ranks[name], expected[run][name.removesuffix("s")])
    return errors


def check(case: Path) -> dict[str, Any]:
    """Return what `python -m tests.oracle` prints of a case.

    Errors: NoCase where something is missing.
    """
    inputs, parts = read_inputs(case), [part for part in DTYPES if (case / part).is_dir()]
    if not parts:
        raise NoCase(f"{case} holds neither f64 nor f32")
    found: dict[str, Any] = {"case": case.name, "holds": True}
    for part in parts:
        errors = check_part(case, part, inputs)
        holds = all(error <= TOLERANCE[part] for error in errors.values())
        shown = {name: error if math.isfinite(error) else None for name, error in errors.items()}  # JSON has no infinity
        found |= {part: {"holds": holds, "tolerance": TOLERANCE[part], "errors": shown}, "holds": found["holds"] and holds}
    if not inputs.is_same_order:
        found["left_out"] = f"{', '.join(ATTENTION_TO_DEMONSTRATIONS)}: the demonstrations stand in another order in the prompt than in training"
    return found


def cases_in(directory: Path) -> list[Path]:
    cases = [folder for folder in (directory, *sorted(directory.glob("*/"))) if (folder / "inputs.json").is_file()]
    if not cases:
        raise NoCase(f"{directory} is no case and holds none: a case has inputs.json, model and f64 or f32")
    return cases


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tests.oracle DIR", file=sys.stderr)
        return 2
    disable_progress_bar()
    try:
        found = [check(case.resolve()) for case in cases_in(Path(arguments[0]))]
    except NoCase as error:
        print(error, file=sys.stderr)
        return 2
    holds = all(case["holds"] for case in found)
    print(json.dumps(found[0] if len(found) == 1 else {"cases": found, "holds": holds}))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
