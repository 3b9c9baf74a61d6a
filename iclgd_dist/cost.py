"""What a block costs, by arithmetic: tokens, FLOPs and memory from the shapes of the model and the lengths of the prompts.

Knows configurations and token ids. Knows nothing of cells, stores or machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iclgd_dist.families import FAMILIES, num_key_heads
from iclgd_dist.schema import NUM_NOISE_QUERIES
from iclgd_dist.tasks import Encoded

FRAMEWORK_GIB = 0.7  # torch, transformers and Ray in one process, before any model (measured)


@dataclass(frozen=True)
class Cost:
    """What a block costs, on its actual tokens."""

    training_tokens: int  # tokens x lanes that go forward and backward
    capture_tokens: int  # tokens x lanes x probed steps that go forward, baselines included
    flops: float  # matrix products, without padding
    baseline_flops: float  # the part that does not shrink when lanes are split over actors
    peak_gib: float  # of the actor's process: framework, weights, deltas, graph, captures


@dataclass(frozen=True)
class _Sizes:
    layers: int
    width: int
    inner: int
    vocabulary: int
    layer_weights: int  # matrix elements of one decoder layer
    trained_weights: int  # of K and V of one layer

    @staticmethod
    def of(config: Mapping[str, Any]) -> _Sizes:
        def first(*names: str, default: int = 0) -> int:
            return next((int(config[name]) for name in names if config.get(name)), default)

        width = first("hidden_size", "n_embd", "d_model")
        heads = first("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads", default=1)
        head_width = first("head_dim", default=width // heads)
        kv = num_key_heads(config, heads) * head_width
        inner = first("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * width)
        family = FAMILIES.get(config.get("model_type", ""))
        num_matrices = 3 if family is not None and family.is_gated else 2
        attention = 2 * width * heads * head_width + 2 * width * kv
        layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        return _Sizes(layers, width, inner, first("vocab_size"), attention + num_matrices * width * inner, 2 * width * kv)


def cost_of(encoded: Encoded, *, config: Mapping[str, Any], compute_dtype: str, lanes: Mapping[str, tuple[int, Sequence[int]]]) -> Cost:
    """Return what a block costs whose methods have so many lanes and probe these steps (`lanes`: method -> number of lanes, steps)."""
    sizes = _Sizes.of(config)
    body = 2.0 * sizes.layers * sizes.layer_weights  # FLOPs of one token going up
    head = 2.0 * sizes.width * sizes.vocabulary  # of one position's logits
    num_queries = len(encoded.queries)
    query_tokens = sum(len(ids) for ids in encoded.queries) + len(encoded.prefix_ids) * num_queries
    label_rows = num_queries * max(1, sum(len(ids) > 1 for ids in encoded.label_ids))
    captured = query_tokens * 2 + len(encoded.context_ids)  # zero-shot, in-context, the context itself
    baseline = captured * body + 2 * label_rows * head + min(NUM_NOISE_QUERIES, num_queries) / num_queries * query_tokens * body
    training, flops = 0, baseline
    longest = max((len(ids) for ids in encoded.training_sequences), default=0)
    states = 2.0  # captures that are held at once
    live = 0.0  # elements of deltas, gradients, autograd's graph and logits at once
    for method, (num_lanes, steps) in lanes.items():
        is_bottom_up = method == "layer_causal"
        tokens = num_lanes * sum(len(ids) for ids in encoded.training_sequences[: max(steps)])
        probed = num_lanes * len(steps)
        # Forward, gradients of the inputs, gradients of the deltas; logits forward and backward at every early exit.
        flops += tokens * (2 * body + 4 * sizes.layers * sizes.trained_weights + 2 * (sizes.layers if is_bottom_up else 1) * head)
        flops += probed * (query_tokens * (body + 2 * sizes.layers * sizes.trained_weights) + label_rows * head)
        training += tokens
        captured += probed * query_tokens
        layers = 1 if is_bottom_up else sizes.layers
        graph = num_lanes * longest * (layers * (10 * sizes.width + 4 * sizes.inner) + 3 * sizes.vocabulary)
        live = max(live, 3 * num_lanes * sizes.trained_weights * layers + graph)
        states = max(states, 2.0 + (probed if is_bottom_up else num_lanes))
    widest = max((len(ids) for ids in encoded.queries), default=0)
    capture = num_queries * sizes.layers * (sizes.width + widest * sizes.width / 64)  # attention outputs, and scores at 64 channels a head
    moving = (states - 2) * query_tokens * sizes.width  # hidden states between layers
    weights = sizes.layers * sizes.layer_weights + sizes.width * sizes.vocabulary
    number = 8 if compute_dtype == "float64" else 4
    held = weights * (number if compute_dtype in ("float64", "float32") else 2) + number * (live + states * capture + moving) + 8 * 4 * capture
    return Cost(training, captured, flops, baseline, FRAMEWORK_GIB + held / 2**30)
