"""LanguageModel: a frozen causal LM that accelerate placed, with its layers, early exit and recorded attention.

Knows where weights live and which dtype they are computed in. Knows nothing of tasks, training or files of results.
"""

# Shapes: B rows of a batch  T positions  D width  H query heads  V vocabulary

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import softmax
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from iclgd_dist import shared_attention
from iclgd_dist.config import ModelSpec, Resources, SweepError
from iclgd_dist.families import Family, family_of, num_key_heads
from iclgd_dist.head import Head
from iclgd_dist.untrained import redraw

RECORDED = "iclgd_recorded"
# Attention module, queries (B, H, T, d), keys (B, K, S, d), scaling, and the keys (1, K, P, d) of a prefix that comes before those, or None.
ScoreSink = Callable[[nn.Module, Tensor, Tensor, float, Tensor | None], None]
_sink: ScoreSink | None = None
_prefix: tuple[Tensor, Tensor] | None = None


def put_before(prefix: tuple[Tensor, Tensor] | None) -> None:
    """Let the next attention see these keys and values (1, K, P, d) before its own, in every row: a cache calls this where it would return both together.

    None: let it see its own, whatever a layer that was interrupted has left.
    """
    global _prefix
    _prefix = prefix


def behind(keys_1KPd: Tensor, own_BKTd: Tensor) -> Tensor:
    """Return the keys, or values, of every row behind those of a prefix, as a copy."""
    return torch.cat([keys_1KPd.expand(len(own_BKTd), -1, -1, -1), own_BKTd], dim=2)


def _recorded(compute: Callable[..., Any], *, splits: bool) -> Callable[..., Any]:
    """Return an attention function that shows queries (B, H, T, d) and keys (B, K, S, d) to whoever listens, then computes.

    `splits`: behind a shared prefix it attends in two parts where that pays.
    """

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Any:
        global _prefix
        prefix, _prefix = _prefix, None
        scaling = kwargs.get("scaling")
        if _sink is not None:
            _sink(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling, prefix[0] if prefix else None)
        if prefix and splits and shared_attention.pays(query, prefix[0], kwargs.get("sliding_window")):
            return shared_attention.attend_behind(prefix, query, key, value, scaling=scaling).transpose(1, 2), None
        if prefix:
            key, value = behind(prefix[0], key), behind(prefix[1], value)
        return compute(module, query, key, value, attention_mask, **kwargs)

    return attend


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)  # each family has its own


# Without a mask function under the same name, no mask is made for an attention function of ours.
for _name, _compute, _mask in (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", _eager, eager_mask)):
    AttentionInterface.register(f"{RECORDED}_{_name}", _recorded(_compute, splits=_name == "sdpa"))
    AttentionMaskInterface.register(f"{RECORDED}_{_name}", _mask)


def attention_of(family: Family) -> str:
    """Return the attention implementation that a model of this family is loaded with."""
    return f"{RECORDED}_{family.implementation}" if family.scores == "interface" else family.implementation


@contextlib.contextmanager
def listening(sink: ScoreSink) -> Iterator[None]:
    """Call the sink at every attention call inside the block."""
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

    @cached_property
    def num_key_heads(self) -> int:
        return num_key_heads(self.model.config.to_dict(), self.num_heads)

    @property
    def has_relative_positions(self) -> bool:
        """Whether queries and keys depend on no absolute position."""
        return self.family.has_relative_positions

    @property
    def delta_dtype(self) -> torch.dtype:
        """Dtype of deltas and of the sums they enter: float32, float64 on a float64 model."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether weights of some layer rest elsewhere and come in when it is called."""
        return next(_offloaded(self.model), None) is not None

    @cached_property
    def is_on_disk(self) -> bool:
        """Whether weights of some layer rest on disk."""
        return "disk" in (getattr(self.model, "hf_device_map", None) or {}).values()

    def zeros(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Return zeros for what is kept of all layers: where the weights rest on disk it does so too, in a file that nobody else sees."""
        if not self.is_on_disk or self.offload_folder is None or not math.prod(shape):
            return torch.zeros(shape, dtype=dtype)
        with tempfile.NamedTemporaryFile(dir=self.offload_folder.name) as file:  # what is mapped outlives its name
            file.truncate(math.prod(shape) * dtype.itemsize)
            return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)

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
        # XGLM makes constants in the default dtype that overflow when a float64 model meets float32.
        with default_dtype(self.delta_dtype), _Float64() if self.compute_dtype == torch.float64 else contextlib.nullcontext():
            if hook is None:
                yield layer
                return
            hook.pre_forward(layer)
            try:
                yield lambda *args, **kwargs: layer._old_forward(*send_to_device(args, device), **send_to_device(kwargs, device, skip_keys="past_key_values"))
            finally:
                hook.post_forward(layer, None)

    def early_exit(self, hidden_XD: Tensor) -> Tensor:
        """Return logits (..., V) of hidden states after any layer: final norm, projection where the model has one, output head, scaling or cap."""
        normed_XD = self.normed(hidden_XD)
        with self.head() as head:
            return head.logits(normed_XD.to(head.weight_VD.device))

    def normed(self, hidden_XD: Tensor) -> Tensor:
        """Return what the output head reads of hidden states after any layer."""
        return self._through((self.family.norm, self.family.project_out), hidden_XD)

    @contextlib.contextmanager
    def head(self) -> Iterator[Head]:
        """Yield the output head with its weights where it computes: offloaded ones come in once and go when the block ends."""
        module = module_at(self.model, self.family.head)
        hook = getattr(module, "_hf_hook", None)
        how, name = self.family.logits or ("times", None)
        if hook is not None:
            hook.pre_forward(module)
        try:
            yield Head(module.weight, module.bias, how, getattr(self.model.config, name) if name else None, self.compute_dtype)
        finally:
            if hook is not None:
                hook.post_forward(module, None)

    def _through(self, paths: Iterable[str | None], states: Tensor) -> Tensor:
        for module in (module_at(self.model, path) for path in paths):
            if module is not None:
                states = module(states.to(self.device_of(module)))
        return states


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors have `dtype` unless told otherwise."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


class _Float64(TorchFunctionMode):
    """Keeps queries, keys and scores of a float64 model in float64: several families round them to float32 whatever their weights are."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.to, softmax) and args and args[0].dim() == 4 and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        return func(*args, **kwargs)


def module_at(root: Any, path: str | None) -> Any:
    """Return the attribute at a dotted path, or None where it or a step to it is absent."""
    for name in path.split(".") if path else ():
        root = getattr(root, name, None)
    return root if path else None


def load(directory: Path, spec: ModelSpec, resources: Resources, *, storage_dtype: str, name: str = "model", tokenizer: Any = None) -> LanguageModel:
    """Load a model directory through accelerate: on one device, sharded over the GPUs of a node, or offloaded to CPU or disk.

    Weights are rounded to `storage_dtype` and computed in `spec.compute_dtype`; offloaded ones rest in the former. Those of an untrained model are drawn anew.
    Errors: SweepError for an unsupported architecture, or weights that are missing.
    """
    _set_precision(spec)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    family = family_of(config.model_type)
    if getattr(config, "slow_but_exact", False) and getattr(config, "pretraining_tp", 1) > 1:
        raise SweepError(
            f"{config.model_type} with slow_but_exact and pretraining_tp > 1 goes around its output projection; set slow_but_exact to false in config.json"
        )
    compute, storage = getattr(torch, spec.compute_dtype), getattr(torch, storage_dtype)
    has_gpu = resources.gpus_per_actor > 0 and torch.cuda.is_available()  # an actor that asked for none leaves the GPUs to others
    attention = attention_of(family)
    place: dict[str, Any] = {"device_map": resources.device_map}
    if resources.device_map == "disk":
        place["device_map"] = _layers_on_disk(config, family, main=0 if has_gpu else "cpu")
    elif resources.device_map == "cpu" or not (has_gpu or resources.max_memory):
        place["device_map"] = {"": "cpu"}
    elif resources.max_memory:
        place["max_memory"] = {int(device) if device.isdigit() else device: size for device, size in resources.max_memory.items()}
    # A process that is killed leaves it behind: it is made only where something may be offloaded.
    is_whole = place["device_map"] == {"": "cpu"}
    folder = None if is_whole else tempfile.TemporaryDirectory(prefix="iclgd-offload-", dir=os.environ.get("ICLGD_OFFLOAD_DIR"))
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        directory,
        output_loading_info=True,
        dtype=storage,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        offload_folder=folder and folder.name,
        **place,
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):  # transformers draws them at random
        raise SweepError(f"model {name!r}: its files hold no weights for {', '.join(missing[:3])}{' and others' if missing[3:] else ''}")
    redraw(model, family, spec, next(_offloaded(model), None))
    _hook_whole_layers(model, family)
    low = _tables(model, family) if "disk" in (getattr(model, "hf_device_map", None) or {}).values() else ()
    _raise(model, compute, but=low)
    _rebuild_buffers(model, config, compute)
    model.eval().requires_grad_(False)
    return LanguageModel(model, family, name, tokenizer, compute, folder)


def _set_precision(spec: ModelSpec) -> None:
    """Let this process compute as precisely and as repeatably as the model's cells say: both are part of their keys."""
    torch.backends.cuda.matmul.allow_tf32 = spec.tf32
    torch.backends.cudnn.allow_tf32 = spec.tf32
    torch.use_deterministic_algorithms(spec.deterministic)
    # The gradients of the fused kernels add in whatever order their threads finish; the plain one is a few products.
    torch.backends.cuda.enable_flash_sdp(not spec.deterministic)
    torch.backends.cuda.enable_mem_efficient_sdp(not spec.deterministic)


def _layers_on_disk(config: Any, family: Family, *, main: int | str) -> dict[str, Any]:
    """Return the device map with every decoder layer on disk and all else on `main`."""
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    leaves = [name for name, module in empty.named_modules() if name and not any(module.children())]
    placed: dict[str, Any] = {name: main for name in leaves if not name.startswith(f"{family.layers}.")}
    return placed | {f"{family.layers}.{n}": "disk" for n in range(len(attrgetter(family.layers)(empty)))}


def _hook_whole_layers(model: Any, family: Family) -> None:
    """Where weights are offloaded, let a decoder layer come in as a whole: transformers hooks every leaf, which would load it for each micro-batch."""
    if (offloaded := next(_offloaded(model), None)) is None:
        return
    remove_hook_from_submodules(model)
    dispatch_model(
        model,
        model.hf_device_map,
        state_dict=offloaded.state_dict or None,
        offload_dir=offloaded.save_folder,
        offload_index=offloaded.index,
        preload_module_classes=[type(attrgetter(family.layers)(model)[0]).__name__],
        skip_keys="past_key_values",
    )


def _offloaded(model: Any) -> Iterator[Any]:
    """Yield what holds the weights that are offloaded, once for each hook that reads it."""
    for module in model.modules():
        hook = getattr(module, "_hf_hook", None)
        for single in getattr(hook, "hooks", [hook]):
            if getattr(single, "weights_map", None) is not None:
                yield single.weights_map.dataset


def _rebuild_buffers(model: Any, config: Any, dtype: torch.dtype) -> None:
    """Make the tables that are computed, not stored (sinusoidal and rotary positions), anew in `dtype`: loading rounds them with the weights."""
    with default_dtype(dtype), init_empty_weights(include_buffers=False):
        fresh = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    stored = set(model.state_dict())
    held = dict(model.named_buffers())
    for name, table in fresh.named_buffers():
        if name not in stored and table.is_floating_point():
            module, _, last = name.rpartition(".")
            model.get_submodule(module).register_buffer(last, table.to(held[name].device), persistent=False)


def _tables(model: Any, family: Family) -> tuple[nn.Module, ...]:
    """Return the embedding and the output head, which may rest as they are stored: rows of them are raised as they are read. None where they are one."""
    words, head = model.get_input_embeddings(), module_at(model, family.head)
    return (words, head) if type(words) is nn.Embedding and type(head) is nn.Linear and words.weight is not head.weight else ()


def _raise(model: nn.Module, dtype: torch.dtype, *, but: Collection[nn.Module] = ()) -> None:
    """Give every parameter `dtype`. An offloaded one is a meta tensor: accelerate casts what comes in to its dtype, and rests in the stored one.

    Modules of `but` keep theirs; an embedding among them returns `dtype`.
    """
    for module in but:
        if isinstance(module, nn.Embedding):
            module.register_forward_hook(lambda _module, _args, rows: rows.to(dtype))
    for module in model.modules():
        if any(module is each for each in but):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=dtype), requires_grad=False))
            else:
                parameter.data = parameter.data.to(dtype)
