"""LanguageModel: a frozen causal LM that accelerate placed, with its layers, early exit and recorded attention.

Knows where weights live and which dtype they are computed in. Knows nothing of tasks, training or files of results.
"""

# Shapes: B rows of a batch  T positions  D width  H query heads  V vocabulary

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights, load_checkpoint_and_dispatch
from accelerate.utils import send_to_device
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from iclgd_dist.config import ModelSpec, Resources, SweepError
from iclgd_dist.families import Family, family_of

RECORDED = "iclgd_recorded"
ScoreSink = Callable[[nn.Module, Tensor, Tensor, float], None]
_sink: ScoreSink | None = None


def _recorded_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
    """transformers' SDPA, after showing queries (B, H, T, d) and keys (B, H_kv, S, d) to whoever listens."""
    if _sink is not None:
        scaling = kwargs.get("scaling")
        _sink(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(RECORDED, _recorded_attention)
AttentionMaskInterface.register(RECORDED, sdpa_mask)  # without it no mask is made for an attention function of ours


@contextlib.contextmanager
def listening(sink: ScoreSink) -> Iterator[None]:
    """Call `sink(attention module, queries, keys, scaling)` at every attention call inside the block."""
    global _sink
    assert _sink is None, "attention scores are already being recorded"
    _sink = sink
    try:
        yield
    finally:
        _sink = None


@dataclass
class LanguageModel:
    """A causal LM in evaluation mode whose weights nobody writes."""

    model: Any  # a transformers PreTrainedModel
    family: Family
    name: str = "model"
    tokenizer: Any = None
    compute_dtype: torch.dtype = torch.float32
    offload_folder: Any = field(default=None, repr=False)  # keeps the temporary directory of weights on disk alive

    @cached_property
    def layers(self) -> nn.ModuleList:
        layers: nn.ModuleList = attrgetter(self.family.layers)(self.model)
        return layers

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def num_heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    @property
    def delta_dtype(self) -> torch.dtype:
        """Dtype of deltas and of the sums they enter: float32, float64 on a float64 model."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def input_device(self) -> torch.device:
        return self.device_of(self.model.get_input_embeddings())

    def device_of(self, module: nn.Module) -> torch.device:
        """Return the device a module computes on (not where its weights rest while offloaded)."""
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
        parameter = next(module.parameters(), None)
        return parameter.device if parameter is not None and parameter.device.type != "meta" else torch.device("cpu")

    @contextlib.contextmanager
    def resident(self, index: int) -> Iterator[Callable[..., Any]]:
        """Yield layer `index` as a function whose weights stay on its device until the block ends: offloaded weights come in once."""
        layer: Any = self.layers[index]
        hook = getattr(layer, "_hf_hook", None)
        device = self.device_of(layer)
        with default_dtype(self.delta_dtype):  # XGLM makes constants in the default dtype that overflow when a float64 model meets float32
            if hook is None:
                yield layer
                return
            hook.pre_forward(layer)
            try:
                yield lambda *args, **kwargs: layer._old_forward(*send_to_device(args, device), **send_to_device(kwargs, device, skip_keys="past_key_values"))
            finally:
                hook.post_forward(layer, None)

    def early_exit(self, hidden_XD: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states after any layer: final norm, projection where the model has one, output head."""
        for path in (self.family.norm, self.family.project_out, self.family.head):
            module = _at(self.model, path)
            if module is not None:
                hidden_XD = module(hidden_XD.to(self.device_of(module)))
        return hidden_XD


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors have `dtype` unless told otherwise."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def _at(root: Any, path: str | None) -> Any:
    """Return the attribute at a dotted path, or None where it or a step to it is absent."""
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
    return root if path else None


def load(directory: Path, spec: ModelSpec, resources: Resources, *, storage_dtype: str, name: str = "model", tokenizer: Any = None) -> LanguageModel:
    """Load a model directory through accelerate: on one device, sharded over the GPUs of a node, or offloaded to CPU or disk.

    Weights are rounded to `storage_dtype` and computed in `spec.compute_dtype`.
    Errors: SweepError for an unsupported architecture or weights whose names do not match it.
    """
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32: part of a cell's key
    torch.backends.cudnn.allow_tf32 = False
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    family = family_of(config.model_type)
    compute, storage = getattr(torch, spec.compute_dtype), getattr(torch, storage_dtype)
    attention = RECORDED if family.scores == "interface" else "eager"
    device_map, max_memory = resources.device_map, {int(k) if k.isdigit() else k: v for k, v in resources.max_memory.items()}
    place: dict[str, Any] = {}
    model: Any
    if device_map != "disk" and not max_memory:
        single = "cpu" if device_map == "cpu" or not torch.cuda.is_available() else device_map
        place = {"device_map": {"": single} if single == "cpu" else single}
    if place:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=storage, attn_implementation=attention, use_safetensors=True, trust_remote_code=False, local_files_only=True, **place
        )
        for tensor in model.parameters():
            tensor.data = tensor.data.to(compute)
        offload = None
    else:
        model, offload = _load_offloaded(directory, config, attention, device_map, max_memory, compute, storage, family)
    model.eval().requires_grad_(False)
    return LanguageModel(model, family, name, tokenizer, compute, offload)


def _load_offloaded(
    directory: Path, config: Any, attention: str, device_map: str, max_memory: dict[Any, str], compute: torch.dtype, storage: torch.dtype, family: Family
) -> tuple[nn.Module, Any]:
    """Dispatch layer by layer, so that a decoder layer comes in whole; weights rest in the storage dtype and are raised as they come in."""
    with default_dtype(compute), init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=compute, attn_implementation=attention, trust_remote_code=False)
    model.tie_weights()
    layers = attrgetter(family.layers)(model)
    block = type(layers[0]).__name__
    _require_names(directory, model)
    if device_map == "disk":
        main = 0 if torch.cuda.is_available() else "cpu"
        whole = {name: main for name, _ in model.named_modules() if name and not any(True for _ in model.get_submodule(name).children())}
        placed: dict[str, Any] = {name: at for name, at in whole.items() if not name.startswith(f"{family.layers}.")}
        placed |= {f"{family.layers}.{n}": "disk" for n in range(len(layers))}
    else:
        placed = infer_auto_device_map(model, max_memory=max_memory or None, no_split_module_classes=[block], dtype=storage)
    folder = tempfile.TemporaryDirectory(prefix="iclgd-offload-", dir=os.environ.get("ICLGD_OFFLOAD_DIR"))
    model = load_checkpoint_and_dispatch(
        model,
        str(directory),
        device_map=placed,
        max_memory=max_memory or None,
        no_split_module_classes=[block],
        preload_module_classes=[block],
        dtype=storage,
        offload_folder=folder.name,
        skip_keys="past_key_values",
    )
    for tensor in model.parameters():
        if tensor.device.type != "meta":
            tensor.data = tensor.data.to(compute)
    return model, folder


def _require_names(directory: Path, model: nn.Module) -> None:
    """Raise SweepError when the weights on disk are not named as the model names them: accelerate would load nothing and say little."""
    stored: set[str] = set()
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            stored |= set(weights.keys())
    tied = set(getattr(model, "_tied_weights_keys", None) or {})
    if missing := {name for name, _ in model.named_parameters()} - stored - tied:
        raise SweepError(
            f"{directory}: {len(missing)} weights have other names in the files than in {type(model).__name__} ({sorted(missing)[0]} is not there); "
            "to offload this model, load it once with transformers and save_pretrained() it to a directory"
        )
