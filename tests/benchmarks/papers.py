"""The papers' procedure for one cell, written plainly with transformers: `python -m tests.benchmarks.papers JOB RESULT`.

A fresh process, batch 1: zero-shot and ICL of every query anew, the context computed again for each query, a training of its own for each number of
steps, weights written. Shares no code with the package: token ids in, tensors out. For llama and the models that are built like it.
"""

# Shapes: B rows  L layers  Q queries  H heads  T tokens of a query  D width  C labels

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Capture(NamedTuple):
    """What is recorded of the queries in one state of the model."""

    attention_LQD: Tensor
    scores_LQHT: Tensor
    label_scores_QC: Tensor


class Recorder:
    """Keeps what each layer does at one position of each row: the attention's output, and its scores over the query's own tokens."""

    def __init__(self) -> None:
        self.outputs_LBD: list[Tensor] = []
        self.scores_LBHT: list[Tensor] = []
        self.positions: list[int] = []
        self.num_before = 0  # tokens of a row before the query's own

    def start(self, positions: Sequence[int], num_before: int) -> None:
        self.outputs_LBD, self.scores_LBHT, self.positions, self.num_before = [], [], list(positions), num_before

    def of_output(self, hidden_BTD: Tensor) -> None:
        if self.positions:
            self.outputs_LBD.append(hidden_BTD[range(len(self.positions)), self.positions])

    def of_scores(self, query_BHTd: Tensor, key_BHSd: Tensor, scaling: float) -> None:
        if not self.positions:
            return
        first = key_BHSd.shape[2] - query_BHTd.shape[2] + self.num_before
        query_BHd = query_BHTd[range(len(self.positions)), :, self.positions]
        key_BHTd = key_BHSd[:, :, first:].repeat_interleave(query_BHTd.shape[1] // key_BHSd.shape[1], dim=1)
        self.scores_LBHT.append(torch.einsum("bhd,bhtd->bht", query_BHd, key_BHTd) * scaling)


def load(directory: str) -> tuple[Any, Recorder]:
    """Return a model whose attention shows itself, and what watches it."""
    recorder = Recorder()

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        recorder.of_scores(query, key, kwargs["scaling"])
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("plain", attend)
    AttentionMaskInterface.register("plain", sdpa_mask)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="plain", local_files_only=True)
    model.eval().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda _module, _args, hidden_BTD: recorder.of_output(hidden_BTD))
    return model, recorder


def trained(model: Any) -> list[nn.Parameter]:
    """Return the weights that learn: W_K and W_V of every layer, in this order."""
    return [module.weight for layer in model.model.layers for module in (layer.self_attn.k_proj, layer.self_attn.v_proj)]


def losses(model: Any, ids: Sequence[int], first: int, method: str) -> Iterator[Tensor]:
    """Yield the mean cross-entropy over ids[first:]: once, or for each layer that of its early exit, which reaches no other layer."""
    ids_T, body = torch.tensor(ids), model.model
    if method == "vanilla":
        yield cross_entropy(model(ids_T[None], use_cache=False).logits[0, first - 1 : -1], ids_T[first:])
        return
    hidden = body.embed_tokens(ids_T[None])
    angles = body.rotary_emb(hidden, torch.arange(len(ids_T))[None])
    for layer in body.layers:
        hidden = layer(hidden.detach(), attention_mask=None, position_embeddings=angles)
        yield cross_entropy(model.lm_head(body.norm(hidden[0, first - 1 : -1])), ids_T[first:])


def update(model: Any, ids: Sequence[int], first: int, method: str, rate: float) -> None:
    """Take one step of plain SGD."""
    optimizer = torch.optim.SGD(trained(model), lr=rate)
    for loss in losses(model, ids, first, method):
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@contextmanager
def learning(model: Any) -> Iterator[None]:
    """Let W_K and W_V learn inside the block."""
    for weight in trained(model):
        weight.requires_grad_(True)
    yield
    for weight in trained(model):
        weight.requires_grad_(False)


@torch.no_grad()
def capture(model: Any, recorder: Recorder, before: Sequence[int], queries: Sequence[Sequence[int]], labels: Sequence[int]) -> Capture:
    """Return what the model does with each query behind the tokens `before`, one at a time, at the query's last token."""
    width, num_heads, num_layers = model.config.hidden_size, model.config.num_attention_heads, model.config.num_hidden_layers
    attention_LQD = torch.zeros(num_layers, len(queries), width)
    scores_LQHT = torch.zeros(num_layers, len(queries), num_heads, max(map(len, queries)))
    label_scores_QC = torch.zeros(len(queries), len(labels), dtype=torch.float64)
    for number, query in enumerate(queries):
        recorder.start([len(before) + len(query) - 1], len(before))
        logits_V = model(torch.tensor([[*before, *query]]), use_cache=False, logits_to_keep=1).logits[0, -1]
        attention_LQD[:, number] = torch.stack(recorder.outputs_LBD)[:, 0]
        scores_LQHT[:, number, :, : len(query)] = torch.stack(recorder.scores_LBHT)[:, 0]
        label_scores_QC[number] = logits_V.double().log_softmax(-1)[list(labels)]
    recorder.start([], 0)
    return Capture(attention_LQD, scores_LQHT, label_scores_QC)


def compare(zero_shot: Capture, in_context: Capture, finetuned: Capture) -> dict[str, Tensor]:
    """Return ICL's change against finetuning's, of attention outputs (L, Q) and of scores (L, Q, H): cosines and the norms of both."""
    found = {}
    for name, field in (("sim_aou", "attention_LQD"), ("sim_am_delta", "scores_LQHT")):
        before, shown, learnt = (getattr(state, field).double() for state in (zero_shot, in_context, finetuned))
        found |= {name: cosine_similarity(shown - before, learnt - before, dim=-1, eps=0.0)}
        found |= {f"{name}_norms": torch.stack([(state - before).norm(dim=-1) for state in (shown, learnt)])}
    return found | {"label_scores": finetuned.label_scores_QC}


def main(job_file: str, result_file: str) -> None:
    """Compute one cell: figures and label scores to `result_file`, and how long each part took."""
    seconds, since = {}, time.perf_counter()

    def lap(part: str) -> None:
        nonlocal since
        seconds[part], since = time.perf_counter() - since, time.perf_counter()

    with open(job_file) as file:
        job = json.load(file)
    torch.set_num_threads(job["threads"])
    model, recorder = load(job["model"])
    given = model, recorder
    initial = [weight.clone() for weight in trained(model)]
    lap("load")
    zero_shot = capture(*given, job["lead"], job["queries"], job["labels"])
    lap("zero_shot")
    in_context = capture(*given, job["context"], job["queries"], job["labels"])
    lap("in_context")
    with learning(model):
        for ids, first in zip(job["sequences"], job["first"], strict=True):
            update(model, ids, first, job["method"], job["rate"])
    lap("training")
    finetuned = capture(*given, job["lead"], job["queries"], job["labels"])
    lap("finetuned")
    changes = torch.stack([(weight - before).norm() for weight, before in zip(trained(model), initial, strict=True)]).view(-1, 2)
    found = compare(zero_shot, in_context, finetuned) | {"delta_norms": changes}
    baselines = {kind: {"label_scores": state.label_scores_QC} for kind, state in (("zero_shot", zero_shot), ("icl", in_context))}
    torch.save({"found": found, "baselines": baselines, "seconds": seconds}, result_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
