"""Useful FLOPs of a procedure on its actual tokens: the matrix products that its results need. Written apart from the package's own estimate.

Counted are the tokens of prompts, in the body (of the last layer only keys and values, and the rest where a state is read), the half of attention that
is seen, logits where they are read, gradients of the inputs of what lies above a delta, products with deltas and their gradients. Padding,
recomputation, a baseline computed twice and the ranking of attention count nothing. For models that are built like llama.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from iclgd_dist.encoding import Encoded

Passes = Mapping[str, tuple[int, Sequence[int]]]  # method -> learning rates, and the steps that are captured


@dataclass(frozen=True)
class Sizes:
    """Of a model: layers, and the widths that products run over."""

    layers: int
    width: int
    query: int
    key: int
    inner: int
    vocabulary: int

    @staticmethod
    def of(config: Mapping[str, Any]) -> Sizes:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        channels = config.get("head_dim") or width // heads
        key = channels * config["num_key_value_heads"]
        return Sizes(config["num_hidden_layers"], width, channels * heads, key, config["intermediate_size"], config["vocab_size"])

    @property
    def key_and_value(self) -> int:
        return 2 * 2 * self.width * self.key

    @property
    def above(self) -> int:
        """Of one token in what a layer does after its attention: output projection and MLP."""
        return 2 * self.query * self.width + 2 * 3 * self.width * self.inner

    @property
    def layer(self) -> int:
        return self.key_and_value + 2 * self.width * self.query + self.above

    @property
    def head(self) -> int:
        return 2 * self.width * self.vocabulary

    def product(self, num_new: int, num_before: int = 0) -> float:
        """Of one of attention's products over all heads of a layer: new tokens with the tokens that they see."""
        return 2.0 * self.query * (num_new * num_before + num_new * (num_new + 1) / 2)

    def rising(self, num_new: int, num_before: int = 0, *, num_read: int | None = None) -> float:
        """Of new tokens going up. `num_read`: how many of them are read above the last layer's keys and values, from the last one on; None: all."""
        layer = num_new * self.layer + 2 * self.product(num_new, num_before)
        if num_read is None:
            return self.layers * layer
        seen = sum(num_before + num_new - n for n in range(num_read))
        return (self.layers - 1) * layer + num_new * self.key_and_value + num_read * (self.layer - self.key_and_value) + 4.0 * self.query * seen

    def learning(self, num_tokens: int, num_targets: int, method: str, *, has_deltas: bool) -> float:
        """Of one step on a demonstration. `has_deltas`: what is learnt is kept apart from the weights."""
        forward = self.rising(num_tokens)
        gradients = self.layers * num_tokens * self.key_and_value
        # What lies above the keys and values of a layer; queries have no delta below them there.
        local = self.layers * (num_tokens * self.above + 3 * self.product(num_tokens))
        heads = 2.0 * num_targets * self.head * (1 if method == "vanilla" else self.layers)
        total = forward + gradients + local + heads + (self.layers * num_tokens * self.key_and_value if has_deltas else 0)
        if method == "vanilla":  # from each layer but the first down to the one below: queries, keys and values, and the deltas of the latter two
            through = num_tokens * (self.layer - self.above + (self.key_and_value if has_deltas else 0)) + self.product(num_tokens)
            total += (self.layers - 1) * through
        return total


def of_block(encoded: Encoded, config: Mapping[str, Any], passes: Passes) -> dict[str, float]:
    """Return the useful FLOPs of the block's parts: what its cells need when all is computed once."""
    sizes, lead = Sizes.of(config), len(encoded.prefix_ids)
    zero_shot = sum(sizes.rising(lead + len(ids), num_read=1) for ids in encoded.queries)
    contexts = {len(encoded.context_ids)}
    for _, steps in passes.values():  # ICL with exactly the demonstrations trained on
        contexts |= {len(context[0]) for step in steps if (context := encoded.context_of(step)) is not None}
    shown = sum(sizes.rising(len(ids), before, num_read=1) for before in contexts for ids in encoded.queries)
    heads = len(encoded.queries) * sizes.head
    parts = {
        "baselines": zero_shot + shown + sizes.rising(max(contexts), num_read=0),
        "baselines, logits": (1 + len(contexts)) * heads,
    }
    query_tokens = sum(lead + len(ids) for ids in encoded.queries)
    for method, (num_lanes, steps) in passes.items():
        parts[f"{method}, training"] = num_lanes * _training(sizes, encoded, method, max(steps), has_deltas=True)
        captured = zero_shot + sizes.layers * query_tokens * sizes.key_and_value
        parts[f"{method}, captures"] = num_lanes * len(steps) * captured
        parts[f"{method}, logits"] = num_lanes * len(steps) * float(heads)
    return parts


def of_papers(encoded: Encoded, config: Mapping[str, Any], passes: Passes) -> dict[str, float]:
    """Return the FLOPs of the same cells one by one: zero-shot and ICL anew, the context for each query, a training for each number of steps."""
    sizes, lead, context = Sizes.of(config), len(encoded.prefix_ids), len(encoded.context_ids)
    num_cells = sum(num_rates * len(steps) for num_rates, steps in passes.values())
    alone = sum(sizes.rising(lead + len(ids)) for ids in encoded.queries)
    parts = {
        "zero_shot": num_cells * alone,
        "in_context": num_cells * sum(sizes.rising(context + len(ids)) for ids in encoded.queries),
        "finetuned": num_cells * alone,
        "logits": 3.0 * num_cells * len(encoded.queries) * sizes.head,
    }
    for method, (num_rates, steps) in passes.items():
        parts[f"{method}, training"] = sum(num_rates * _training(sizes, encoded, method, step, has_deltas=False) for step in steps)
    return parts


def _training(sizes: Sizes, encoded: Encoded, method: str, num_steps: int, *, has_deltas: bool) -> float:
    sequences = zip(encoded.training.sequences[:num_steps], encoded.training.first_loss, strict=False)
    return sum(sizes.learning(len(ids), len(ids) - first, method, has_deltas=has_deltas) for ids, first in sequences)
