"""The experiment as a slow loop that shares no code with the package: copy the model, write its weights, one learning rate, one prompt at a time.

Scores are read from the softmax of transformers' own eager attention. Not a test.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LAYERS = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "xglm": "model.layers",
}
NORM = {
    "llama": "model.norm",
    "qwen3": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "xglm": "model.layer_norm",
}
ATTENTION = {"llama": "self_attn", "qwen3": "self_attn", "gpt2": "attn", "gpt_neox": "attention", "opt": "self_attn", "xglm": "self_attn"}


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.get_submodule(LAYERS[model.config.model_type])  # type: ignore[return-value]


def key_value(model: nn.Module, layer: int) -> list[tuple[Tensor, slice | Tensor, bool]]:
    """Return (parameter, which of its outputs are keys or values, whether outputs are rows) for K then V, weights then biases."""
    family = model.config.model_type
    attention = getattr(layers_of(model)[layer], ATTENTION[family])
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    found: list[tuple[Tensor, slice | Tensor, bool]] = []
    for part in ("k", "v"):
        if family == "gpt2":
            columns: slice | Tensor = slice(width, 2 * width) if part == "k" else slice(2 * width, 3 * width)
            module, rows = attention.c_attn, False
        elif family == "gpt_neox":
            d = width // heads
            start = d if part == "k" else 2 * d
            columns = torch.cat([torch.arange(h * 3 * d + start, h * 3 * d + start + d) for h in range(heads)])
            module, rows = attention.query_key_value, True
        else:
            module, rows, columns = getattr(attention, f"{part}_proj"), True, slice(None)
        found.append((module.weight, columns, rows))
        if module.bias is not None:
            found.append((module.bias, columns, True))
    return found


def train(model: nn.Module, sequences: list[list[int]], first: int, rate: float, method: str) -> Iterator[tuple[list[Tensor], Tensor, nn.Module]]:
    """Yield after each step: per layer and K/V tensor what training added (outputs x inputs), the loss before the step, the trained model."""
    start, model = model, copy.deepcopy(model)
    count = len(layers_of(model))
    parts = [part for layer in range(count) for part in key_value(model, layer)]
    initial = [part for layer in range(count) for part in key_value(start, layer)]
    for parameter in {id(p): p for p, _, _ in parts}.values():
        parameter.requires_grad_(True)
    for sequence in sequences:
        with exact_softmax():
            total = _gradients(model, parts, torch.tensor([sequence]), first, method)
        with torch.no_grad():
            done = set()
            for parameter, columns, rows in parts:
                if (id(parameter), str(columns)) not in done:
                    done.add((id(parameter), str(columns)))
                    index = columns if rows else (slice(None), columns)
                    parameter[index] -= rate * parameter.grad[index]  # type: ignore[index]
        yield [_taken(p, c, r) - _taken(q, c, r) for (p, c, r), (q, _, _) in zip(parts, initial, strict=True)], total, model


def _gradients(model: nn.Module, parts: list[tuple[Tensor, slice | Tensor, bool]], ids: Tensor, first: int, method: str) -> Tensor:
    """Leave every part's gradient in place and return the loss; layer-causal runs the whole model once for each layer's own loss."""
    count = len(layers_of(model))
    model.zero_grad()
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    if method == "vanilla":
        loss = _loss(model(ids, use_cache=False).logits, ids, first)
        loss.backward()
        total += loss.detach()
    else:
        inputs: list[Tensor] = []
        with torch.no_grad(), _hooked(model, lambda layer, hidden: inputs.append(hidden.detach())):
            model(ids, use_cache=False)
        gradients: dict[int, Tensor] = {}
        for target in range(count):
            model.zero_grad()
            outputs: dict[int, Tensor] = {}
            with _replaced(model, target, inputs[target], outputs):
                model(ids, use_cache=False)
            hidden = model.get_submodule(NORM[model.config.model_type])(outputs[target])
            loss = _loss(model.get_output_embeddings()(hidden), ids, first)
            loss.backward()
            total += loss.detach()
            for number, (parameter, _, _) in enumerate(parts):
                if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                    assert number // (len(parts) // count) == target, f"the loss of layer {target} reached another layer"
                    gradients[id(parameter)] = parameter.grad.clone()
        for parameter, _, _ in parts:
            parameter.grad = gradients[id(parameter)]
    return total


def _taken(parameter: Tensor, columns: slice | Tensor, rows: bool) -> Tensor:
    return (parameter[columns] if rows else parameter[:, columns].T).detach().clone()


def _loss(logits: Tensor, ids: Tensor, first: int) -> Tensor:
    return cross_entropy(logits[0, first - 1 : -1], ids[0, first:])


@contextmanager
def _hooked(model: nn.Module, see) -> Iterator[None]:
    def hook(index):
        return lambda module, args, kwargs: see(index, args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(hook(n), with_kwargs=True) for n, layer in enumerate(layers_of(model))]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _replaced(model: nn.Module, target: int, hidden: Tensor, outputs: dict[int, Tensor]) -> Iterator[None]:
    def before(module, args, kwargs):
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def after(module, args, output):
        outputs[target] = output[0] if isinstance(output, tuple) else output

    layer = layers_of(model)[target]
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def exact_softmax(see=lambda values: None) -> Iterator[None]:
    """Show what enters each attention softmax, and keep its dtype: eager attention would round a float64 model's scores to float32."""
    softmax = torch.nn.functional.softmax

    def seen(values: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
        see(values.detach())
        return softmax(values, dim=dim)

    torch.nn.functional.softmax = seen  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.softmax = softmax  # type: ignore[assignment]


def capture(model: nn.Module, ids: list[int], own: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for one prompt at its last token: attention outputs (L, D), scores over the last `own` tokens (L, H, own), log-probabilities (V)."""
    outputs, scores = [], []
    family = model.config.model_type
    handles = [
        getattr(layer, ATTENTION[family]).register_forward_hook(lambda m, a, output: outputs.append(output[0][0, -1].detach().clone()))
        for layer in layers_of(model)
    ]
    with torch.no_grad(), exact_softmax(lambda values: scores.append(values.reshape(-1, *values.shape[-2:])[:, -1, -own:].clone())):
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return torch.stack(outputs), torch.stack(scores), logits.double().log_softmax(-1)
