"""The experiment as a slow loop that shares no code with the package: copy the model, write its weights, one learning rate, one prompt at a time.

Everything is float64. Scores are queries times keys, recomputed by hand from the weights, and checked against what enters the softmax of
transformers' own eager attention. Not a test.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

_LLAMA = ("model.layers", "self_attn", "q_proj k_proj v_proj o_proj", "mlp.gate_proj mlp.up_proj mlp.down_proj")
_OPT = ("self_attn", "q_proj k_proj v_proj out_proj", "fc1 fc2")
_QKV = "query_key_value query_key_value query_key_value dense"
# family -> layers, attention, its q, k, v and output modules, linear modules of the MLP
PATHS = dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "stablelm", "granite", "cohere"], _LLAMA) | {
    "phi": ("model.layers", "self_attn", "q_proj k_proj v_proj dense", "mlp.fc1 mlp.fc2"),
    "phi3": ("model.layers", "self_attn", "qkv_proj qkv_proj qkv_proj o_proj", "mlp.gate_up_proj mlp.down_proj"),
    "gpt2": ("transformer.h", "attn", "c_attn c_attn c_attn c_proj", "mlp.c_fc mlp.c_proj"),
    "gpt_neo": ("transformer.h", "attn.attention", "q_proj k_proj v_proj out_proj", "mlp.c_fc mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention", _QKV, "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "gptj": ("transformer.h", "attn", "q_proj k_proj v_proj out_proj", "mlp.fc_in mlp.fc_out"),
    "opt": ("model.decoder.layers", *_OPT),
    "xglm": ("model.layers", *_OPT),
    "bloom": ("transformer.h", "self_attention", _QKV, "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "falcon": ("transformer.h", "self_attention", _QKV, "mlp.dense_h_to_4h mlp.dense_4h_to_h"),
    "mpt": ("transformer.blocks", "attn", "Wqkv Wqkv Wqkv out_proj", "ffn.up_proj ffn.down_proj"),
}

Part = tuple[Tensor, "list[int] | slice", bool]  # parameter, which of its outputs, whether outputs are rows


def copied(model: nn.Module) -> nn.Module:
    """Return a float64 copy with eager attention: a loop that writes float32 weights would round each update to a weight's last bit."""
    model = copy.deepcopy(model).double()
    # Falcon's eager attention adds ALiBi twice (transformers 5.23); its SDPA path is the released model.
    model.set_attn_implementation("sdpa" if model.config.model_type == "falcon" else "eager")
    return model


def layers_of(model: nn.Module) -> nn.ModuleList:
    return model.get_submodule(PATHS[model.config.model_type][0])  # type: ignore[return-value]


def attention_of(model: nn.Module, layer: int) -> nn.Module:
    return layers_of(model)[layer].get_submodule(PATHS[model.config.model_type][1])


def module_of(model: nn.Module, layer: int, part: str) -> nn.Module:
    """Return the module of "q", "k", "v", "o" or "mlp.<name>"."""
    _, _, attention, mlp = PATHS[model.config.model_type]
    if part in "qkvo":
        return attention_of(model, layer).get_submodule(attention.split()["qkvo".index(part)])
    return layers_of(model)[layer].get_submodule(next(path for path in mlp.split() if path.split(".")[-1] == part[4:]))


def parts_of(model: nn.Module) -> list[str]:
    return [*"qkvo", *("mlp." + path.split(".")[-1] for path in PATHS[model.config.model_type][3].split())]


def heads_of(model: nn.Module) -> tuple[int, int, int]:
    """Return the numbers of query heads and key heads, and a head's channels."""
    config = model.config
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    if config.model_type == "falcon":
        keys = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else heads
    return heads, keys, getattr(config, "head_dim", None) or config.hidden_size // heads


def outputs_of(model: nn.Module, part: str) -> list[int] | slice:
    """Return which outputs of its module are the queries, keys or values."""
    family, (heads, keys, d) = model.config.model_type, heads_of(model)
    if part not in "qkv" or len(set(PATHS[family][2].split())) == 4:
        return slice(None)
    number = "qkv".index(part)
    if family in ("gpt2", "mpt", "phi3"):
        ends = [heads * d, (heads + keys) * d, (heads + 2 * keys) * d]
        return list(range(ends[number] - (heads, keys, keys)[number] * d, ends[number]))
    if family in ("gpt_neox", "bloom") or not (model.config.new_decoder_architecture or model.config.multi_query):
        return [head * 3 * d + number * d + channel for head in range(heads) for channel in range(d)]
    found, at = [], 0  # Falcon: the queries that share a key, the key, the value
    for _ in range(keys):
        for owner, width in (("q", heads // keys * d), ("k", d), ("v", d)):
            found += list(range(at, at + width)) if owner == part else []
            at += width
    return found


def tensors(model: nn.Module, layer: int, part: str) -> list[Part]:
    """Return weight and bias (where there is one) of a part."""
    module, outputs = module_of(model, layer, part), outputs_of(model, part)
    found: list[Part] = [(module.weight, outputs, isinstance(module, nn.Linear))]
    return found if module.bias is None else [*found, (module.bias, outputs, True)]


def write(part: Part, change: Tensor) -> None:
    """Add to a parameter; a change of a weight is inputs x outputs, as a delta is."""
    parameter, outputs, is_row = part
    with torch.no_grad():
        if is_row:
            parameter[outputs] += change.mT if change.dim() == 2 else change
        else:
            parameter[:, outputs] += change


def read(part: Part, of: Tensor | None = None) -> Tensor:
    """Return the part of a parameter, or of a tensor of its shape; weights as inputs x outputs."""
    parameter, outputs, is_row = part
    values = parameter if of is None else of
    taken = values[outputs] if is_row else values[:, outputs]
    return (taken.mT if is_row and values.dim() == 2 else taken).detach().clone()


def logits(model: nn.Module, ids: Tensor, num_layers: int | None = None, **options: Tensor) -> Tensor:
    """Return the model's own logits (T, V); with `num_layers`, those of the model that ends after so many layers."""
    path, _, name = PATHS[model.config.model_type][0].rpartition(".")
    parent, whole = model.get_submodule(path), layers_of(model)
    setattr(parent, name, nn.ModuleList(list(whole)[:num_layers]))
    try:
        with exact():
            return model(ids, use_cache=False, **options).logits[0]
    finally:
        setattr(parent, name, whole)


def train(model: nn.Module, sequences: list[list[int]], first: int, rate: float, method: str) -> Iterator[tuple[list[Tensor], Tensor, nn.Module]]:
    """Yield after each step: per layer and K/V tensor what training added (inputs x outputs), the loss before the step, the trained model."""
    start, model = model, copy.deepcopy(model)
    places = [(layer, part) for layer in range(len(layers_of(model))) for part in "kv"]
    parts = [tensor for place in places for tensor in tensors(model, *place)]
    initial = [tensor for place in places for tensor in tensors(start, *place)]
    for parameter, _, _ in parts:
        parameter.requires_grad_(True)
    for sequence in sequences:
        gradients, loss = _gradients(model, parts, torch.tensor([sequence]), first, method)
        for part, gradient in zip(parts, gradients, strict=True):
            write(part, -rate * gradient)
        yield [read(part) - read(before) for part, before in zip(parts, initial, strict=True)], loss, model


def _gradients(model: nn.Module, parts: list[Part], ids: Tensor, first: int, method: str) -> tuple[list[Tensor], Tensor]:
    """Return every part's gradient and the loss; layer-causal runs the model that ends after it for each layer's own loss."""
    parameters = [parameter for parameter, _, _ in parts]
    if method == "vanilla":
        loss = cross_entropy(logits(model, ids)[first - 1 : -1], ids[0, first:])
        return [read(part, of) for part, of in zip(parts, torch.autograd.grad(loss, parameters), strict=True)], loss.detach()
    entering: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: entering.append(_states(args, kwargs).detach()), with_kwargs=True) for layer in layers_of(model)
    ]
    with torch.no_grad():
        logits(model, ids)
    for handle in handles:
        handle.remove()
    gradients: list[Tensor] = []
    total = torch.zeros(())
    per_layer = len(parts) // len(entering)
    for target, hidden in enumerate(entering):
        handle = layers_of(model)[target].register_forward_pre_hook(
            lambda _, args, kwargs, hidden=hidden: ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden}), with_kwargs=True
        )
        loss = cross_entropy(logits(model, ids, target + 1)[first - 1 : -1], ids[0, first:])
        handle.remove()
        total = total + loss.detach()
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        own = range(target * per_layer, (target + 1) * per_layer)
        assert all((gradient is None) == (number not in own) for number, gradient in enumerate(found)), f"the loss of layer {target} reached another layer"
        gradients += [read(parts[number], found[number]) for number in own]
    return gradients, total


def _states(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def exact(see=lambda values: None) -> Iterator[None]:
    """Show what enters each attention softmax, and keep heads and scores in float64: several families would round them to float32."""
    softmax, to, as_float = torch.nn.functional.softmax, Tensor.to, Tensor.float

    def is_kept(values: Tensor) -> bool:
        return values.dim() == 4 and values.dtype == torch.float64

    def seen(values: Tensor, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
        see(values.detach())
        return softmax(values, dim=dim)

    def placed(values: Tensor, *args, **kwargs) -> Tensor:
        is_rounding = is_kept(values) and any(value is torch.float32 for value in (*args, *kwargs.values()))
        return values if is_rounding else to(values, *args, **kwargs)

    with (
        patch("torch.nn.functional.softmax", seen),
        patch.object(Tensor, "to", placed),
        patch.object(Tensor, "float", lambda values: values if is_kept(values) else as_float(values)),
    ):
        yield


def capture(model: nn.Module, ids: list[int], own: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for one prompt at its last token: attention outputs (L, D), scores over the last `own` tokens (L, H, own), log-probabilities (V)."""
    outputs, scores, softmaxed, handles = [], [], [], []
    for number in range(len(layers_of(model))):
        handles += [
            attention_of(model, number).register_forward_pre_hook(
                lambda _, args, kwargs, number=number: scores.append(_scores(model, number, _states(args, kwargs)[0], kwargs)), with_kwargs=True
            ),
            module_of(model, number, "o").register_forward_hook(lambda _, args, output: outputs.append(output.reshape(len(ids), -1)[-1].clone())),
        ]
    with torch.no_grad(), exact(lambda values: softmaxed.append(values.reshape(-1, *values.shape[-2:])[:, -1].clone())):
        last = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    for entered, by_hand in zip(softmaxed, scores, strict=True) if softmaxed else ():
        _assert_same_attention(model, entered, by_hand)
    return torch.stack(outputs), torch.stack(scores)[:, :, -own:], last.double().log_softmax(-1)


def queries(model: nn.Module, ids: list[int]) -> list[Tensor]:
    """Return per layer the queries of a prompt (T, H, d) before rotation and scaling."""
    heads, _, d = heads_of(model)
    found: list[Tensor] = []

    def keep(number: int):
        attention = attention_of(model, number)
        return lambda _, args, kwargs: found.append(_normed(attention, "q", _projected(model, number, "q", _states(args, kwargs)[0]), heads, d))

    handles = [attention_of(model, number).register_forward_pre_hook(keep(number), with_kwargs=True) for number in range(len(layers_of(model)))]
    with torch.no_grad():
        logits(model, torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


def _assert_same_attention(model: nn.Module, entered_HT: Tensor, scores_HT: Tensor) -> None:
    """Check the scores made by hand against what eager attention gives its softmax, once soft cap, ALiBi and mask are put on them."""
    cap = getattr(model.config, "attn_logit_softcapping", None)
    expected = torch.tanh(scores_HT / cap) * cap if cap else scores_HT
    heads = len(expected)
    if model.config.model_type in ("bloom", "mpt"):
        slopes = torch.tensor([2.0 ** (-8 * (head + 1) / heads) for head in range(heads)], dtype=torch.float64)
        expected = expected + slopes[:, None] * torch.arange(expected.shape[1])
    visible = entered_HT[0] > -1e30
    difference = ((entered_HT - entered_HT[:, -1:]) - (expected - expected[:, -1:]))[:, visible]  # a softmax knows differences only
    assert float(difference.abs().max()) <= 1e-6 * max(1.0, float(scores_HT.abs().max())), f"{model.config.model_type}: not what eager attention computes"


def _scores(model: nn.Module, layer: int, entering_TD: Tensor, given: dict) -> Tensor:
    """Return the last token's scaled scores (H, T), from the attention's input and its weights."""
    config, attention, (heads, keys, d) = model.config, attention_of(model, layer), heads_of(model)
    query, key = (
        _rotated(model, attention, _normed(attention, part, _projected(model, layer, part, entering_TD), count, d), given)
        for part, count in (("q", heads), ("k", keys))
    )
    key = torch.stack([key[:, head // (heads // keys)] for head in range(heads)], dim=1)
    return torch.stack([key[:, head] @ query[-1, head] for head in range(heads)]) * _scale(config, d)


def _projected(model: nn.Module, layer: int, part: str, entering_TD: Tensor) -> Tensor:
    weight, *bias = (read(tensor) for tensor in tensors(model, layer, part))
    projected = entering_TD @ weight + (bias[0] if bias else 0)
    clip = model.config.attn_config.clip_qkv if model.config.model_type == "mpt" else None
    return projected.clamp(-clip, clip) if clip else projected


def _normed(attention: nn.Module, part: str, projected: Tensor, heads: int, d: int) -> Tensor:
    """Return (T, heads, d) after the norm of queries or keys, where there is one."""
    split = projected.view(len(projected), heads, d)
    norm = getattr(attention, f"{part}_norm", None) or getattr(attention, f"{part}_layernorm", None)
    if norm is None:
        return split
    if hasattr(norm, "norms"):  # StableLM: one norm for each head
        return torch.stack([norm.norms[head](split[:, head]) for head in range(heads)], dim=1)
    if norm.weight.numel() == heads * d and norm.weight.dim() == 1 and heads > 1:  # OLMo 2: over all heads
        return norm(projected[None])[0].view(len(projected), heads, d)
    return norm(split[None])[0]


def _rotated(model: nn.Module, attention: nn.Module, states: Tensor, given: dict) -> Tensor:
    """Rotate (T, heads, d) by the angles that the model gives its attention."""
    family, length = model.config.model_type, len(states)
    if family == "gptj":
        sin, cos = (half.double().repeat_interleave(2, dim=-1) for half in attention.embed_positions[:length].chunk(2, dim=-1))
    elif given.get("position_embeddings") is None or (family == "falcon" and model.config.alibi):
        return states
    else:
        cos, sin = (table[0].double() for table in given["position_embeddings"])
    by_pairs = family in ("gptj", "cohere")
    turned, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    result = torch.empty_like(turned)
    for channel in range(cos.shape[-1]):
        half = cos.shape[-1] // 2
        partner, sign = (channel ^ 1, 1 if channel % 2 else -1) if by_pairs else ((channel + half) % (2 * half), 1 if channel >= half else -1)
        result[..., channel] = turned[..., channel] * cos[:, None, channel] + sign * turned[..., partner] * sin[:, None, channel]
    return torch.cat([result, rest], dim=-1)


def _scale(config, d: int) -> float:
    if config.model_type in ("gemma2", "gemma3_text"):
        return config.query_pre_attn_scalar**-0.5
    if config.model_type == "mpt" and config.attn_config.softmax_scale:
        return config.attn_config.softmax_scale
    return {"granite": getattr(config, "attention_multiplier", 0.0), "gpt_neo": 1.0}.get(config.model_type, d**-0.5)
