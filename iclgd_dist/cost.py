"""What a block costs, by arithmetic: tokens, FLOPs and memory from the shapes of the model and the lengths of the prompts.

Knows configurations and token ids. Knows nothing of cells, stores or machines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iclgd_dist.config import SweepError
from iclgd_dist.encoding import Encoded
from iclgd_dist.extensions import members
from iclgd_dist.families import FAMILIES, num_key_heads, size
from iclgd_dist.schema import NUM_KENDALL_QUERIES, NUM_NOISE_QUERIES

MOST_WORDS, MOST_LOGITS = 16_384, 2**28  # that exist at once: losses.WORDS and losses.LOGITS, of a GPU
_STORED = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
MOST_LAYERS = 1_000  # a skeleton of more takes long to build, and no model has as many
FRAMEWORK_GIB = 0.7  # torch, transformers and Ray in one process, before any model (measured)


@dataclass(frozen=True)
class Cost:
    """What a block costs, on its actual tokens."""

    training_tokens: int  # tokens x lanes that go forward and backward
    capture_tokens: int  # tokens x lanes x probed steps that go forward, baselines included
    flops: float  # matrix products, without padding
    baseline_flops: float  # the part that does not shrink when lanes are split over actors
    peak_gib: float  # of the actor's process: framework, weights, deltas, graph, captures
    capture_bytes: int = 0  # of one cell's capture at most, where it is kept
    layer_bytes: int = 0  # of all decoder layers' weights, as they are stored
    vanilla_reads: int = 0  # times that methods which need the layers above bring all layers in, where weights are offloaded; the rest needs one time


@dataclass(frozen=True)
class _Sizes:
    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    layer_weights: int  # matrix elements of one decoder layer
    trained: Mapping[str, int]  # those of one layer that learn, by the name of the set

    @staticmethod
    def of(config: Mapping[str, Any]) -> _Sizes:
        width = size(config, "hidden_size", "n_embd", "d_model")
        heads = size(config, "num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads", default=1)
        head_width = size(config, "head_dim", default=width // heads)
        kv = num_key_heads(config, heads) * head_width
        inner = size(config, "intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", default=4 * width)
        family = FAMILIES.get(config.get("model_type", ""))
        num_matrices = 3 if family is not None and family.is_gated else 2
        attention = 2 * width * heads * head_width + 2 * width * kv
        layers = size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers", most=MOST_LAYERS)
        mlp, own, shared = num_matrices * width * inner, width * heads * head_width, width * kv  # matrices of q or o, of k or v
        trained = {"attn_k": shared, "attn_v": shared, "attn_kv": 2 * shared, "attn_q": own, "attn_o": own, "mlp": mlp, "all_linear": attention + mlp}
        return _Sizes(layers, width, heads, inner, size(config, "vocab_size"), attention + mlp, trained)


def layers_and_width(config: Mapping[str, Any]) -> tuple[int, int]:
    """Errors: SweepError where a model's configuration does not say them."""
    sizes = _Sizes.of(config)
    for what, number in (("layers (num_hidden_layers)", sizes.layers), ("channels (hidden_size)", sizes.width)):
        if not number:
            raise SweepError(f"its config.json must say its number of {what}, it does not")
    return sizes.layers, sizes.width


def num_embeddings(config: Mapping[str, Any]) -> int:
    """Return the number of rows of a model's embedding; 0 where its configuration does not say."""
    return _Sizes.of(config).vocabulary


def stored_dtype(config: Mapping[str, Any]) -> str:
    """Return the dtype that a model's weights are stored in. Errors: SweepError for what is none."""
    found = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if found not in _STORED:
        raise SweepError(f"dtype in config.json must be one of {', '.join(_STORED)}, got {found!r:.80}")
    return found


@dataclass(frozen=True)
class Pass:
    """One method on one version of the demonstrations: what its cost depends on."""

    train_on: str
    is_bottom_up: bool
    weights: str
    num_lanes: int
    steps: Sequence[int]  # probed
    batch_size: int = 1


def cost_of(
    encoded: Encoded,
    *,
    config: Mapping[str, Any],
    compute_dtype: str,
    storage_dtype: str,
    passes: Sequence[Pass],
    is_on_disk: bool = False,
    is_supervised: bool = False,
    has_outputs: bool = False,
) -> Cost:
    """Return what a block with these passes costs. `is_on_disk`: layers rest there, and so do captures. `is_supervised`: finetuned weights read the
    demonstrations too. `has_outputs`: what the output head reads is recorded."""
    sizes = _Sizes.of(config)
    body = 2.0 * sizes.layers * sizes.layer_weights  # FLOPs of one token going up
    head = 2.0 * sizes.width * sizes.vocabulary  # of one position's logits
    num_queries = len(encoded.queries)
    query_tokens = sum(len(ids) for ids in encoded.queries) + len(encoded.prefix_ids) * num_queries
    label_rows = num_queries * max(1, sum(len(ids) > 1 for ids in encoded.label_ids))
    captured = query_tokens * 2 + len(encoded.context_ids)  # zero-shot, in-context, the context itself
    captured += sum(query_tokens + len(ids) for ids in encoded.control_contexts.values())
    captured += query_tokens * len(
        {(each.train_on, num) for each in passes for step in each.steps if (num := step * each.batch_size) < len(encoded.demonstrations)}
    )
    baseline = captured * body + 2 * label_rows * head + min(NUM_NOISE_QUERIES, num_queries) / num_queries * query_tokens * body
    training, flops, reads = 0, baseline, 0
    states = 2.0  # captures that are made at once
    waiting = 0  # captures of other methods at the largest step that a method is compared with
    live = 0.0  # elements of deltas, gradients, autograd's graph and logits at once
    rising = 0  # tokens whose states wait between layers, beside those of captures: of demonstrations, and of queries behind them
    for each in passes:
        num_lanes, steps, is_bottom_up, trained = each.num_lanes, each.steps, each.is_bottom_up, sizes.trained[each.weights]
        sequences = encoded.training_for(each.train_on).sequences
        updates = [[len(sequences[n]) for n in members(update, len(sequences), each.batch_size)] for update in range(max(steps))]
        longest, tokens = max(len(batch) * max(batch) for batch in updates), num_lanes * sum(map(sum, updates))
        probed = num_lanes * len(steps)
        # Forward, gradients of the inputs, gradients of the deltas; logits forward and backward at every early exit.
        flops += tokens * (2 * body + 4 * sizes.layers * trained + 2 * (sizes.layers if is_bottom_up else 1) * head)
        flops += probed * (query_tokens * (body + 2 * sizes.layers * trained) + label_rows * head)
        training += tokens
        reads += 0 if is_bottom_up else 2 * max(steps) + len(steps)  # forward and backward of each step, captures of each probe
        captured += probed * query_tokens
        rising = rising + tokens if is_bottom_up else max(rising, tokens)
        if is_supervised:
            shown = query_tokens + len(encoded.context_ids)
            rising = rising + probed * shown if is_bottom_up else max(rising, num_lanes * shown)
            flops += probed * (shown * (body + 2 * sizes.layers * trained) + label_rows * head)
            captured += probed * shown
        layers = 1 if is_bottom_up else sizes.layers
        graph = num_lanes * longest * layers * (10 * sizes.width + 4 * sizes.inner)
        logits = min(num_lanes * max(longest, label_rows) * min(sizes.vocabulary, MOST_WORDS), MOST_LOGITS)
        live = max(live, 3 * num_lanes * trained * layers + graph + 3 * logits)
        states = max(states, 2.0 + (probed if is_bottom_up else num_lanes))
        waiting = max(waiting, sum(other.num_lanes for other in passes if other.train_on == each.train_on) - num_lanes)
    widest = _widest(encoded)
    capture = num_queries * sizes.layers * (sizes.width + widest * sizes.width / 64)  # attention outputs, and scores at 64 channels a head
    # On disk: one layer, as it is stored and as it computes; captures and hidden states between layers rest there too.
    tables = sizes.width * sizes.vocabulary * (1 if config.get("tie_word_embeddings", True) else 2)
    weights = sizes.layer_weights * (2 if is_on_disk else sizes.layers) + tables
    resting = 0.0 if is_on_disk else states * capture + ((states - 2) * query_tokens + rising) * sizes.width
    resting += 12 * 2**22 if has_outputs else 0  # logits of some queries, in float64: outputs.MOST_LOGITS
    number = 8 if compute_dtype == "float64" else 4
    held = weights * (number if compute_dtype in ("float64", "float32") else 2) + number * (live + resting + waiting * capture) + 8 * 4 * capture
    kept = capture_bytes(encoded, config=config, compute_dtype=compute_dtype, has_outputs=has_outputs)
    stored = sizes.layers * sizes.layer_weights * {"float64": 8, "float32": 4}.get(storage_dtype, 2)
    return Cost(training, captured, flops, baseline, FRAMEWORK_GIB + held / 2**30, kept, stored, reads)


def capture_bytes(encoded: Encoded, *, config: Mapping[str, Any], compute_dtype: str, has_outputs: bool = False) -> int:
    """Return the bytes of one in-context cell's kept capture, apart from the file's header (under 1 kB). That of zero-shot and of early steps is smaller.

    Attention outputs, scores and the attention to the demonstrations are as captured, label scores in float64.
    """
    sizes, num_queries = _Sizes.of(config), len(encoded.queries)
    ranked = min(NUM_KENDALL_QUERIES, num_queries) * sum(len(ids) for ids in encoded.demonstrations)
    numbers = sizes.layers * (num_queries * (sizes.width + sizes.heads * _widest(encoded)) + ranked)
    outputs = num_queries * sizes.width * {"float64": 8, "float32": 4}.get(compute_dtype, 2) if has_outputs else 0
    return numbers * (8 if compute_dtype == "float64" else 4) + outputs + (num_queries + len(encoded.blanks)) * 8 * len(encoded.label_ids)


def _widest(encoded: Encoded) -> int:
    return max((len(ids) for ids in encoded.queries), default=0)
