"""All that the queries do before anything is trained: zero-shot, the noise check, and every context they are shown.

Knows encoded draws, replays and captures. Knows nothing of methods or files. A context whose ids begin another one shares its keys and values.
"""

# Shapes: L layers  Q queries  T positions

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from iclgd_dist.blocks import Block
from iclgd_dist.comparison import Baseline, InContext, changed, make_baseline, random_ranks
from iclgd_dist.encoding import Encoded
from iclgd_dist.layerwise import Prefix
from iclgd_dist.metrics import Capture, noise_floor
from iclgd_dist.model import LanguageModel
from iclgd_dist.probes import Context, QueryPass
from iclgd_dist.schema import NUM_NOISE_QUERIES

Items = tuple[tuple[int, int], ...]  # per demonstration, its (start, stop)


def queries_of(lm: LanguageModel, block: Block, encoded: Encoded, **options: Any) -> QueryPass:
    """Return the block's queries as a pass over the model, zero-shot unless the options say otherwise."""
    defaults: dict[str, Any] = {
        "lead": encoded.prefix_ids,
        "tokens_per_batch": block.resources.tokens_per_batch,
        "at_label": block.protocol.record_position == "label",
        "parks": block.resources.hidden_states == "host",
        "blanks": encoded.blanks,
        "keeps_output": block.measured.outputs,
    }
    return QueryPass(lm, encoded.queries, encoded.label_ids, **defaults | options)


def columns_of(items: Items) -> torch.Tensor:
    """Return the columns of all items, in order."""
    return torch.cat([torch.arange(start, stop) for start, stop in items]) if items else torch.empty(0, dtype=torch.long)


def packed_items(items: Items) -> Items:
    """Return where each item is once the columns between them are left out."""
    stops = torch.tensor([stop - start for start, stop in items]).cumsum(0).tolist()
    return tuple(zip([0, *stops], stops, strict=False))


class Baselines:
    """Zero-shot, zero-shot again one query at a time (the noise floor), and the queries in every context that the block compares with.

    `trained` lists (train_on, number of demonstrations) of all probes: each is compared with the context of exactly the demonstrations trained on.
    """

    def __init__(self, lm: LanguageModel, block: Block, encoded: Encoded, trained: Sequence[tuple[str, int]]) -> None:
        self.lm, self.block, self.encoded = lm, block, encoded
        self.prefixes: list[tuple[tuple[int, ...], Prefix]] = []
        self.passes: dict[tuple[int, ...], QueryPass] = {}  # by the ids of the context
        self.items: dict[tuple[int, ...], Items] = {}
        self.random_ranks: dict[tuple[int, ...], Mapping[str, torch.Tensor]] = {}
        self.zero_shot = queries_of(lm, block, encoded)
        self.again = queries_of(
            lm, block, encoded, tokens_per_batch=1, numbers=range(min(NUM_NOISE_QUERIES, len(encoded.queries))), blanks=(), keeps_output=False
        )
        shown = {(train_on, num): context for train_on, num in trained if (context := encoded.context_of(num, train_on)) is not None}
        wanted = [(encoded.context_ids, encoded.context_items), *shown.values(), *((ids, ()) for ids in encoded.control_contexts.values())]
        for ids, items in sorted(wanted, key=lambda each: (-len(each[0]), -len(each[1]))):  # the longest first: others may be its beginning
            self._follow(ids, items)
        self.of_trained = {point: ids for point, (ids, _) in shown.items()}
        shift = len(encoded.context_ids) - len(encoded.prefix_ids)
        has_shift = "shifted" in block.controls.contexts and not lm.has_relative_positions
        self.shifted = queries_of(lm, block, encoded, shift=shift) if has_shift else None

    def _follow(self, ids: tuple[int, ...], items: Items) -> None:
        if ids in self.passes:
            return
        prefix = next((prefix for whole, prefix in self.prefixes if whole[: len(ids)] == ids), None)
        if prefix is None:
            prefix = Prefix(self.lm, torch.tensor(ids))
            self.prefixes.append((ids, prefix))
        context = Context(prefix, len(ids), columns_of(items) if items else None)
        self.passes[ids], self.items[ids] = queries_of(self.lm, self.block, self.encoded, context=context), items

    @torch.no_grad()
    def climb(self, layer: Any, index: int) -> None:
        for _, prefix in self.prefixes:
            prefix.climb(layer, index)
        for query_pass in (self.zero_shot, self.again, *self.passes.values(), *([self.shifted] if self.shifted else [])):
            query_pass.climb(layer, index)
        for _, prefix in self.prefixes:
            prefix.forget(index)

    def compare(self) -> Baseline:
        """Return zero-shot and ICL compared, once every layer has been climbed.

        Errors: ArithmeticError for states that are not finite in this dtype.
        """
        (zero_shot,), (again,), (in_context,) = self.zero_shot.captures(), self.again.captures(), self.passes[self.encoded.context_ids].captures()
        for name, capture in (("zero-shot", zero_shot), ("in-context", in_context)):
            if not capture.is_finite():
                raise ArithmeticError(f"{self.block.name}: the {name} states of {self.block.model.name} are not finite in {self.block.spec.compute_dtype}")
        draw, protocol, precision = self.block.draw, self.block.protocol, torch.finfo(self.lm.compute_dtype)
        eps = precision.eps if precision.bits < 32 else 0.0  # in float32 and float64 two packings differ by more than a rounding
        baseline = make_baseline(
            zero_shot=zero_shot,
            in_context=in_context,
            noise=noise_floor(zero_shot, again, eps=eps),
            gold_Q=[query.label for query in draw.queries],
            folds_Q=[query.fold for query in draw.queries],
            query_ids=[query.id for query in draw.queries],
            label_words=draw.label_words,
            num_queries_left_out=draw.num_queries_left_out,
            is_first_layer_still=self.lm.has_relative_positions,
            counts_first_layer=protocol.first_layer == "count",
            has_eps=protocol.undefined == "eps",
        )
        self.captures = {ids: in_context if ids == self.encoded.context_ids else query_pass.captures()[0] for ids, query_pass in self.passes.items()}
        self.controls: dict[str, Capture] = {name: self.captures[ids] for name, ids in self.encoded.control_contexts.items()}
        if self.shifted is not None:
            (self.controls["shifted"],) = self.shifted.captures()
        self.baseline = baseline
        self.passes.clear()
        self.prefixes.clear()
        del self.zero_shot, self.again, self.shifted  # hidden states that nobody reads again
        return baseline

    def prefix(self, train_on: str, num_trained: int) -> InContext | None:
        """Return the queries after exactly the demonstrations trained on; None where these do not fit the context."""
        ids = self.of_trained.get((train_on, num_trained))
        if ids is None:
            return None
        items = packed_items(self.items[ids])
        if ids not in self.random_ranks:
            self.random_ranks[ids] = random_ranks(self.captures[ids], items)
        # Made anew each time: kept, the float64 changes of every step would be many times what the captures are.
        state = self.baseline.in_context if ids == self.encoded.context_ids else changed(self.baseline.zero_shot, self.captures[ids])
        return replace(state, items=items, random_ranks=self.random_ranks[ids])
