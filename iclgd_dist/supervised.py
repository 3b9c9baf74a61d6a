"""Supervised in-context learning: the queries behind the demonstrations, by weights that were finetuned on them.

Knows deltas, prefixes and passes of queries. Knows nothing of training, rows or files.
Source: Li et al. 2023 (arXiv 2312.13772), where finetuned models are given demonstrations too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iclgd_dist.blocks import Block
from iclgd_dist.deltas import Deltas, attached
from iclgd_dist.encoding import Encoded
from iclgd_dist.layerwise import Prefix
from iclgd_dist.model import LanguageModel
from iclgd_dist.probes import Context, QueryPass


class Supervised:
    """One pass for each lane on its way up: its weights make keys and values of their own of the context."""

    def __init__(self, lm: LanguageModel, block: Block, encoded: Encoded, num_lanes: int) -> None:
        self.lm = lm
        options: dict[str, Any] = {"tokens_per_batch": block.resources.tokens_per_batch, "parks": block.resources.hidden_states == "host"}
        self.lanes: list[tuple[Prefix, QueryPass]] = []
        for _ in range(num_lanes):
            prefix = Prefix(lm, torch.tensor(encoded.context_ids))
            # Label scores are all that is wanted.
            self.lanes.append((prefix, QueryPass(lm, (), encoded.label_ids, blanks=encoded.queries, context=Context(prefix, prefix.length), **options)))

    @torch.no_grad()
    def climb(self, layer: Callable[..., Any], index: int, deltas: Deltas) -> None:
        for lane, (prefix, queries) in enumerate(self.lanes):
            own = {name: delta.of([tensor[lane : lane + 1] for tensor in delta.tensors()]) for name, delta in deltas.items()}
            with attached(self.lm, index, own):
                prefix.climb(layer, index)
            queries.climb(layer, index, own)
            prefix.forget(index)

    def label_scores(self) -> list[Tensor]:
        """Return each lane's label scores (Q, C), once every layer has been climbed."""
        found = [queries.captures()[0].blank_scores_KC for _, queries in self.lanes]
        return [scores_QC for scores_QC in found if scores_QC is not None]
