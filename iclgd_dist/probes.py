"""Capture what a model does with the queries at the recorded position: attention outputs, attention scores, label scores.

Knows replays, hooks and shapes. Knows nothing of training or files.
"""

# Shapes: N lanes  Q queries  R rows of a micro-batch  L layers  H query heads  T query tokens  D width  C labels  V vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from iclgd_dist.attention import recording_scores
from iclgd_dist.deltas import Deltas, attached
from iclgd_dist.layerwise import Prefix, Replay
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel

# Measured on two CPU cores: 1,024 tokens a micro-batch stay in the cache and take 3/4 of the time of 4,096. A GPU wants larger ones.
TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True)
class _Row:
    """One row of a micro-batch: a query's prompt, and all but the last token of one label that has several."""

    query: int
    ids: tuple[int, ...]
    num_prompt: int  # tokens of the prompt; its last one is the recorded position
    labels: tuple[int, ...]  # labels scored in this row
    is_recorded: bool


def _rows(query_ids: Sequence[Sequence[int]], label_ids: Sequence[Sequence[int]], numbers: Sequence[int]) -> list[_Row]:
    short = tuple(n for n, ids in enumerate(label_ids) if len(ids) == 1)
    long = [n for n, ids in enumerate(label_ids) if len(ids) > 1]
    rows = []
    for number in numbers:
        prompt = tuple(query_ids[number])
        # The first row of a query is the recorded one and scores the one-token labels too: what follows the prompt cannot change it.
        first, others = (long[0], long[1:]) if long else (None, [])
        ids = prompt if first is None else prompt + tuple(label_ids[first][:-1])
        rows.append(_Row(number, ids, len(prompt), short if first is None else (*short, first), True))
        rows += [_Row(number, prompt + tuple(label_ids[n][:-1]), len(prompt), (n,), False) for n in others]
    return rows


class _MicroBatch:
    """Some rows of all lanes on their way up, with the index tensors that read them."""

    def __init__(self, lm: LanguageModel, rows: list[_Row], num_lanes: int, lead: Sequence[int], prefix: Prefix | None) -> None:
        self.rows, self.lead = rows, len(lead)
        width = self.lead + max(len(row.ids) for row in rows)
        ids_RT = torch.zeros(len(rows), width, dtype=torch.long)
        for n, row in enumerate(rows):
            ids_RT[n, : self.lead + len(row.ids)] = torch.tensor([*lead, *row.ids])
        self.replay = Replay(lm, ids_RT.repeat(num_lanes, 1), cache=prefix.cache() if prefix else None)
        self.recorded = [n for n, row in enumerate(rows) if row.is_recorded]
        self.queries = [rows[n].query for n in self.recorded]
        # Per lane x recorded row: batch row, and position of the last prompt token.
        self.at_B = torch.tensor([lane * len(rows) + n for lane in range(num_lanes) for n in self.recorded])
        self.position_B = torch.tensor([self.lead + rows[n].num_prompt - 1 for _ in range(num_lanes) for n in self.recorded])
        self.num_tokens = [rows[n].num_prompt for n in self.recorded]


class QueryPass:
    """All queries, all lanes, on their way up through the layers; captures are taken on the way.

    With `prefix` the queries follow a shared context whose replay must climb each layer first; without, each row starts with the ids `lead`.
    """

    def __init__(
        self,
        lm: LanguageModel,
        query_ids: Sequence[Sequence[int]],
        label_ids: Sequence[Sequence[int]],
        *,
        lead: Sequence[int] = (),
        prefix: Prefix | None = None,
        num_lanes: int = 1,
        tokens_per_batch: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.lm, self.label_ids, self.num_lanes = lm, label_ids, num_lanes
        tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH.get(lm.input_device.type, TOKENS_PER_BATCH["cuda"])
        numbers = list(range(len(query_ids))) if numbers is None else list(numbers)
        self.slot = {number: slot for slot, number in enumerate(numbers)}
        lead = () if prefix else tuple(lead)
        by_length = sorted(numbers, key=lambda number: len(query_ids[number]))
        self.batches = [
            _MicroBatch(lm, _rows(query_ids, label_ids, some), num_lanes, lead, prefix)
            for some in _packed(by_length, query_ids, label_ids, num_lanes, len(lead), tokens_per_batch)
        ]
        num_queries, num_tokens = len(numbers), max(len(query_ids[number]) for number in numbers)
        dtype = lm.delta_dtype
        self.attention_NLQD = torch.zeros(num_lanes, lm.num_layers, num_queries, lm.width, dtype=dtype)
        self.scores_NLQHT = torch.zeros(num_lanes, lm.num_layers, num_queries, lm.num_heads, num_tokens, dtype=dtype)
        self.label_scores_NQC = torch.zeros(num_lanes, num_queries, len(label_ids), dtype=torch.float64)

    @torch.no_grad()
    def climb(self, layer: Callable[..., Any], index: int, deltas: Deltas | None = None) -> None:
        """Move all queries up through layer `index` with `deltas` attached, recording on the way."""
        for batch in self.batches:
            with attached(self.lm, index, deltas or {}), self._recording(batch, index):
                batch.replay.climb(layer, index)

    @contextlib.contextmanager
    def _recording(self, batch: _MicroBatch, index: int) -> Iterator[None]:
        module = attrgetter(self.lm.family.output)(self.lm.layers[index])
        slots = [self.slot[query] for query in batch.queries]

        def keep_output(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden_BTD = output[0] if isinstance(output, tuple) else output
            taken = hidden_BTD[batch.at_B.to(hidden_BTD.device), batch.position_B.to(hidden_BTD.device)]
            self.attention_NLQD[:, index, slots] = taken.view(self.num_lanes, len(slots), -1).to(self.attention_NLQD)

        def keep_scores(_module: nn.Module, query_BHTd: Tensor, key_BHTd: Tensor, scaling: float) -> None:
            # Columns: the query's own tokens, right-aligned in what is new (a shared prefix comes first, the lead too).
            at, position = batch.at_B.to(query_BHTd.device), batch.position_B.to(query_BHTd.device)
            first = key_BHTd.shape[2] - query_BHTd.shape[2] + batch.lead
            query = query_BHTd[at, :, position].to(self.scores_NLQHT.dtype)
            key = key_BHTd[at, :, first:].to(self.scores_NLQHT.dtype)
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped keys: one per query head
            taken = torch.einsum("bhd,bhtd->bht", query, key) * scaling
            taken = taken.view(self.num_lanes, len(slots), query.shape[1], -1).to(self.scores_NLQHT.device)
            for slot, column, count in zip(slots, range(len(slots)), batch.num_tokens, strict=True):
                self.scores_NLQHT[:, index, slot, :, :count] = taken[:, column, :, :count]

        handle = module.register_forward_hook(keep_output)
        try:
            with recording_scores(self.lm, index, keep_scores):
                yield
        finally:
            handle.remove()

    @torch.no_grad()
    def captures(self) -> list[Capture]:
        """Return one Capture per lane, once every layer has been climbed."""
        for batch in self.batches:
            assert batch.replay.next_layer == self.lm.num_layers, f"{batch.replay.next_layer} of {self.lm.num_layers} layers were climbed"
            self._score_labels(batch)
        return [Capture(self.attention_NLQD[n], self.scores_NLQHT[n], self.label_scores_NQC[n]) for n in range(self.num_lanes)]

    def _score_labels(self, batch: _MicroBatch) -> None:
        """Add each label's mean log-probability; the output head reads only the positions that predict a label token."""
        hidden_BTD = batch.replay.hidden_BTD
        reads: dict[tuple[int, int], int] = {}  # (row, position) -> index of its logits
        terms = []  # (index of logits, token, query slot, label, weight)
        for n, row in enumerate(batch.rows):
            for label in row.labels:
                tokens = self.label_ids[label]
                for offset, token in enumerate(tokens):
                    read = reads.setdefault((n, batch.lead + row.num_prompt - 1 + offset), len(reads))
                    terms.append((read, token, self.slot[row.query], label, 1 / len(tokens)))
        row_X, position_X = torch.tensor(list(reads)).T.to(hidden_BTD.device)
        read_Y, token_Y, slot_Y, label_Y = torch.tensor([term[:4] for term in terms]).T
        weight_Y = torch.tensor([term[4] for term in terms], dtype=torch.float64)
        for lane in range(self.num_lanes):
            logits_XV = self.lm.early_exit(hidden_BTD[row_X + lane * len(batch.rows), position_X]).double()
            log_probability_X = logits_XV.logsumexp(-1)
            chosen_Y = (logits_XV[read_Y.to(logits_XV.device), token_Y.to(logits_XV.device)] - log_probability_X[read_Y.to(logits_XV.device)]).cpu()
            self.label_scores_NQC[lane].index_put_((slot_Y, label_Y), chosen_Y * weight_Y, accumulate=True)


def _packed(
    by_length: Sequence[int], query_ids: Sequence[Sequence[int]], label_ids: Sequence[Sequence[int]], num_lanes: int, lead: int, tokens_per_batch: int
) -> Iterator[list[int]]:
    """Yield queries, shortest first, in groups whose padded tokens over all lanes stay within the budget (one query at least)."""
    longest_label = max(len(ids) for ids in label_ids)
    rows = max(1, sum(len(ids) > 1 for ids in label_ids))
    group: list[int] = []
    for number in by_length:
        tokens = lead + len(query_ids[number]) + longest_label - 1
        if group and (len(group) + 1) * rows * num_lanes * tokens > tokens_per_batch:
            yield group
            group = []
        group.append(number)
    yield group
