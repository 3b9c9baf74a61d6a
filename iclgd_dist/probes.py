"""Capture what a model does with the queries at the recorded position: attention outputs, attention scores, label scores.

Knows replays, hooks and shapes. Knows nothing of training or files.
"""

# Shapes: N lanes  Q queries  R rows of a micro-batch  L layers  H query heads  T query tokens  D width  C labels  V vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from iclgd_dist.attention import recording_queries, recording_scores
from iclgd_dist.deltas import Deltas, attached
from iclgd_dist.layerwise import Prefix, Replay, to_host
from iclgd_dist.losses import log_chances
from iclgd_dist.metrics import Capture
from iclgd_dist.model import LanguageModel
from iclgd_dist.positions import computed_only_at
from iclgd_dist.schema import NUM_KENDALL_QUERIES

# Measured on two CPU cores, width 576: 2,048 tokens take .96 of the time of 1,024 and .99 of that of 3,072. A GPU wants larger ones.
TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384}
CALLS = 1 / 32  # what the calls of a micro-batch cost beside its tokens, as a share of the largest one (measured likewise)


_nothing: contextlib.AbstractContextManager[None] = contextlib.nullcontext()


@dataclass(frozen=True)
class _Row:
    """One row of a micro-batch: a query's prompt, with the beginning of a label that has several tokens, or with the label that is recorded."""

    query: int
    ids: tuple[int, ...]
    num_prompt: int  # tokens of the prompt
    labels: tuple[int, ...]  # labels scored in this row
    recorded: int | None  # position that is recorded

    def needed(self) -> list[int]:
        """Return the positions that are read above the last layer: what predicts a token after the prompt, and what is recorded."""
        return sorted({*range(self.num_prompt - 1, max(len(self.ids), self.num_prompt)), *([] if self.recorded is None else [self.recorded])})


def _rows(
    query_ids: Sequence[Sequence[int]], label_ids: Sequence[Sequence[int]], numbers: Sequence[int], recorded: Collection[int], *, at_label: bool
) -> list[_Row]:
    short = tuple(n for n, ids in enumerate(label_ids) if len(ids) == 1)
    long = [n for n, ids in enumerate(label_ids) if len(ids) > 1]
    rows = []
    for number in numbers:
        prompt = tuple(query_ids[number])
        # The first row of a query is the recorded one and scores the one-token labels too: what follows the prompt cannot change it.
        first = 0 if at_label else next(iter(long), None)
        added = () if first is None else tuple(label_ids[first]) if at_label else tuple(label_ids[first][:-1])
        scored = tuple(dict.fromkeys(short if first is None else (*short, first)))
        place = len(prompt) - 1 + (len(added) if at_label else 0)
        rows.append(_Row(number, prompt + added, len(prompt), scored, place if number in recorded else None))
        rows += [_Row(number, prompt + tuple(label_ids[n][:-1]), len(prompt), (n,), None) for n in long if n != first]
    return rows


class _Arrivals:
    """What is on its way from the device to its place in memory: copied without waiting, put there once all of it has come."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self.devices: set[torch.device] = set()

    def send(self, tensor: Tensor, put: Callable[[Tensor], None]) -> None:
        if tensor.device.type == "cpu":
            put(tensor)
        else:
            self.waiting.append((to_host(tensor), put))
            self.devices.add(tensor.device)

    def wait(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)
        for tensor, put in self.waiting:
            put(tensor)
        self.waiting.clear()


class _MicroBatch:
    """Some rows of all lanes on their way up, with the index tensors that read them, on the device where the prompts enter."""

    def __init__(self, replay: Replay, rows: list[_Row], num_lanes: int, lead: int) -> None:
        self.replay, self.rows, self.lead = replay, rows, lead
        device = replay.hidden_BTD.device
        self.recorded = [n for n, row in enumerate(rows) if row.recorded is not None]
        self.queries = [rows[n].query for n in self.recorded]
        # Per lane x recorded row: batch row, and recorded position.
        self.at_B = torch.tensor([lane * len(rows) + n for lane in range(num_lanes) for n in self.recorded], device=device)
        self.position_B = torch.tensor([lead + (rows[n].recorded or 0) for _ in range(num_lanes) for n in self.recorded], device=device)
        self.num_tokens = [(rows[n].recorded or 0) + 1 for n in self.recorded]
        # All that is read above the last layer, of every lane: the recorded position, and those that predict a token of a label.
        needed = [(n, position) for n, row in enumerate(rows) for position in row.needed()]
        self.needed_row = torch.tensor([lane * len(rows) + n for lane in range(num_lanes) for n, _ in needed], device=device)
        self.needed_position = torch.tensor([lead + position for _ in range(num_lanes) for _, position in needed], device=device)

    def again(self) -> _MicroBatch:
        other = copy(self)
        other.replay = self.replay.again()
        return other


@dataclass(frozen=True)
class Context:
    """What queries follow: a prefix, how much of it, and which of its columns are the items that attention is ranked over."""

    prefix: Prefix
    length: int
    columns_T: Tensor | None = None


class QueryPass:
    """All queries, all lanes, on their way up through the layers; captures are taken on the way.

    With `context` the queries follow a shared prefix whose replay must climb each layer first; without, each row starts with the ids `lead`.
    `at_label` records at the last token of the first label, appended to the prompt, instead of at the prompt's last token. `shift` moves the positions of
    what follows `lead`, for models with absolute ones. `parks`: between layers the states wait in the machine's memory, not on the device. `blanks` are
    prompts whose labels are scored and of which nothing is recorded; `keeps_output` records what the output head reads at each prompt's last token.
    """

    def __init__(
        self,
        lm: LanguageModel,
        query_ids: Sequence[Sequence[int]],
        label_ids: Sequence[Sequence[int]],
        *,
        lead: Sequence[int] = (),
        context: Context | None = None,
        num_lanes: int = 1,
        tokens_per_batch: int | None = None,
        numbers: Sequence[int] | None = None,
        at_label: bool = False,
        shift: int = 0,
        parks: bool = False,
        blanks: Sequence[Sequence[int]] = (),
        keeps_output: bool = False,
    ) -> None:
        self.lm, self.label_ids, self.num_lanes, self.context, self.parks, self.keeps_output = lm, label_ids, num_lanes, context, parks, keeps_output
        tokens_per_batch = tokens_per_batch or TOKENS_PER_BATCH.get(lm.input_device.type, TOKENS_PER_BATCH["cuda"])
        recorded = list(range(len(query_ids))) if numbers is None else list(numbers)
        self.num_tokens = max((len(query_ids[number]) for number in recorded), default=0) + (len(label_ids[0]) if at_label else 0)
        numbers, self.num_recorded = [*recorded, *range(len(query_ids), len(query_ids) + len(blanks))], len(recorded)
        query_ids = [*query_ids, *blanks]
        self.slot = {number: slot for slot, number in enumerate(numbers)}
        lead = () if context else tuple(lead)
        by_length = sorted(numbers, key=lambda number: len(query_ids[number]))
        self.batches = []
        for some in _packed(by_length, query_ids, label_ids, num_lanes, len(lead), tokens_per_batch, at_label=at_label):
            rows = _rows(query_ids, label_ids, some, set(recorded), at_label=at_label)
            ids_RT = torch.zeros(len(rows), len(lead) + max(len(row.ids) for row in rows), dtype=torch.long)
            for n, row in enumerate(rows):
                ids_RT[n, : len(lead) + len(row.ids)] = torch.tensor([*lead, *row.ids])
            positions_T = torch.arange(ids_RT.shape[1]) + shift * (torch.arange(ids_RT.shape[1]) >= len(lead)) if shift else None
            cache = context.prefix.cache(context.length) if context else None
            self.batches.append(_MicroBatch(Replay(lm, ids_RT.repeat(num_lanes, 1), cache=cache, positions_T=positions_T), rows, num_lanes, len(lead)))
        self._clear()

    def _clear(self) -> None:
        num_lanes, num_queries, dtype = self.num_lanes, self.num_recorded, self.lm.delta_dtype
        self.attention_NLQD = self.lm.zeros(num_lanes, self.lm.num_layers, num_queries, self.lm.width, dtype=dtype)
        self.scores_NLQHT = self.lm.zeros(num_lanes, self.lm.num_layers, num_queries, self.lm.num_heads, self.num_tokens, dtype=dtype)
        self.arrivals = _Arrivals()
        self.label_scores_NQC = torch.zeros(num_lanes, len(self.slot), len(self.label_ids), dtype=torch.float64)  # those of blanks come last
        self.output_NQD: Tensor | None = None
        self.ranked_LNQT: dict[int, Tensor] = {}  # layer -> raw attention of the first queries to the demonstrations' tokens

    def again(self) -> QueryPass:
        """Return the same queries before the first layer, with nothing captured."""
        other = copy(self)
        other.batches = [batch.again() for batch in self.batches]
        other._clear()
        return other

    @torch.no_grad()
    def climb(self, layer: Callable[..., Any], index: int, deltas: Deltas | None = None, *, trained_NTW: Tensor | None = None) -> None:
        """Move all queries up through layer `index` with `deltas` attached, recording on the way.

        `trained_NTW`: the query projections of the demonstrations' tokens, recorded while training; what the queries attend to by them is recorded too.
        """
        for batch in self.batches:
            with attached(self.lm, index, deltas or {}), self._recording(batch, index, trained_NTW), self._as_far_as_read(batch, index):
                batch.replay.climb(layer, index)
            if self.parks:
                batch.replay.park()
            if self.lm.is_on_disk and self.lm.input_device.type == "cpu":  # from a GPU that copy would be waited for
                batch.replay.rest(self.lm)

    def _as_far_as_read(self, batch: _MicroBatch, index: int) -> contextlib.AbstractContextManager[None]:
        if index < self.lm.num_layers - 1:
            return _nothing
        return computed_only_at(self.lm, index, len(batch.rows) * self.num_lanes, batch.needed_row, batch.needed_position)

    @contextlib.contextmanager
    def _recording(self, batch: _MicroBatch, index: int, trained_NTW: Tensor | None) -> Iterator[None]:
        if not batch.recorded:
            yield
            return
        module = attrgetter(self.lm.family.output)(self.lm.layers[index])
        slots = [self.slot[query] for query in batch.queries]

        def put(place_NQX: Tensor, taken_NQX: Tensor) -> None:
            place_NQX[:, slots] = taken_NQX.to(place_NQX)

        def keep_output(_module: nn.Module, _args: Any, hidden_BTD: Tensor) -> None:
            taken = hidden_BTD[batch.at_B.to(hidden_BTD.device), batch.position_B.to(hidden_BTD.device)]
            self.arrivals.send(taken.view(self.num_lanes, len(slots), -1), lambda taken_NQD: put(self.attention_NLQD[:, index], taken_NQD))

        def keep_scores(_module: nn.Module, query_BHTd: Tensor, key_BHTd: Tensor, scaling: float, prefix_key_1HPd: Tensor | None) -> None:
            # Columns: the query's own tokens, right-aligned in what is new (a shared prefix comes first where it is not apart, the lead too).
            at, position = batch.at_B.to(query_BHTd.device), batch.position_B.to(query_BHTd.device)
            first = key_BHTd.shape[2] - query_BHTd.shape[2] + batch.lead
            query = query_BHTd[at, :, position].to(self.scores_NLQHT.dtype)
            key = key_BHTd[at, :, first:].to(self.scores_NLQHT.dtype)
            if self.context is not None and self.context.columns_T is not None:
                # Summed over heads: the queries of a group meet the same key. All rows share the prefix.
                grouped = query.unflatten(1, (key.shape[1], -1)).sum(2).flatten(1)
                before = (key_BHTd if prefix_key_1HPd is None else prefix_key_1HPd)[0]
                shown = before[:, self.context.columns_T.to(key.device)].to(grouped.dtype).transpose(1, 2).flatten(0, 1)
                self._keep_ranked(index, slots, (grouped @ shown * scaling)[None])
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)  # grouped keys: one per query head
            taken = torch.einsum("bhd,bhtd->bht", query, key) * scaling
            self.arrivals.send(taken.view(self.num_lanes, len(slots), query.shape[1], -1), put_scores)

        def put_scores(taken_NQHT: Tensor) -> None:
            for column, (slot, count) in enumerate(zip(slots, batch.num_tokens, strict=True)):
                self.scores_NLQHT[:, index, slot, :, :count] = taken_NQHT[:, column, :, :count]

        def keep_ranked(query_BTHd: Tensor) -> None:
            assert trained_NTW is not None
            taken = query_BTHd[batch.at_B.to(query_BTHd.device), batch.position_B.to(query_BTHd.device)].flatten(1)
            taken_NQW = taken.view(self.num_lanes, len(slots), -1).to(trained_NTW)
            self._keep_ranked(index, slots, taken_NQW @ trained_NTW.mT / query_BTHd.shape[-1])  # both projections are scaled by 1 / sqrt(d)

        handle = module.register_forward_hook(keep_output)
        try:
            # Queries first: their product with those of training is not to be taken for the attention's own.
            with recording_queries(self.lm, index, keep_ranked) if trained_NTW is not None else _nothing, recording_scores(self.lm, index, keep_scores):
                yield
        finally:
            handle.remove()

    def _keep_ranked(self, index: int, slots: list[int], map_NQT: Tensor) -> None:
        if index not in self.ranked_LNQT:
            num_queries = min(NUM_KENDALL_QUERIES, self.num_recorded)
            self.ranked_LNQT[index] = self.lm.zeros(self.num_lanes, num_queries, map_NQT.shape[-1], dtype=self.lm.delta_dtype)
        kept = self.ranked_LNQT[index]
        among = [column for column, slot in enumerate(slots) if slot < kept.shape[1]]

        def put(taken_NQT: Tensor) -> None:
            kept[:, [slots[column] for column in among]] = taken_NQT.to(kept)

        self.arrivals.send(map_NQT[:, among], put)

    @torch.no_grad()
    def captures(self) -> list[Capture]:
        """Return one Capture per lane, once every layer has been climbed."""
        self.arrivals.wait()
        for batch in self.batches:
            assert batch.replay.next_layer == self.lm.num_layers, f"{batch.replay.next_layer} of {self.lm.num_layers} layers were climbed"
        self._score_labels()
        is_whole = len(self.ranked_LNQT) == self.lm.num_layers
        ranked_LNQT = [self.ranked_LNQT[index] for index in sorted(self.ranked_LNQT)] if is_whole else []
        return [
            Capture(
                self.attention_NLQD[n],
                self.scores_NLQHT[n],
                self.label_scores_NQC[n, : self.num_recorded],
                torch.stack([layer[n] for layer in ranked_LNQT]) if ranked_LNQT else None,
                None if self.output_NQD is None else self.output_NQD[n],
                self.label_scores_NQC[n, self.num_recorded :] if len(self.slot) > self.num_recorded else None,
            )
            for n in range(self.num_lanes)
        ]

    def _score_labels(self) -> None:
        """Add each label's mean log-probability; the output head reads only the states that predict a label's token, of all micro-batches at once."""
        states, read, tokens, places, weights = list[Tensor](), 0, list[tuple[int, int]](), list[int](), list[float]()
        last: dict[int, int] = {}  # slot of a recorded query -> the state at its prompt's last token
        for batch in self.batches:
            reads: dict[tuple[int, int], int] = {}  # (row, position) -> which of a lane's states
            for n, row in enumerate(batch.rows):
                for label in row.labels:
                    ids = self.label_ids[label]
                    for offset, token in enumerate(ids):
                        at = reads.setdefault((n, batch.lead + row.num_prompt - 1 + offset), read + len(reads))
                        tokens.append((at, token))
                        places.append(self.slot[row.query] * len(self.label_ids) + label)
                        weights.append(1 / len(ids))
                if row.recorded is not None:
                    last[self.slot[row.query]] = reads[n, batch.lead + row.num_prompt - 1]
            read += len(reads)
            row_X, position_X = torch.tensor(list(reads)).T.to(batch.replay.hidden_BTD.device)
            states.append(batch.replay.hidden_BTD.unflatten(0, (self.num_lanes, -1))[:, row_X, position_X].to(self.lm.input_device))
        normed_XD = self.lm.normed(torch.cat(states, dim=1).flatten(0, 1))
        if self.keeps_output:
            self.output_NQD = normed_XD.view(self.num_lanes, read, -1)[:, [last[slot] for slot in range(self.num_recorded)]].cpu()
        at_Y, word_Y = torch.tensor(tokens).T
        at_NY = at_Y + read * torch.arange(self.num_lanes)[:, None]
        chance_NY = log_chances(self.lm, normed_XD, at_NY.flatten(), word_Y.repeat(self.num_lanes)).cpu().view(self.num_lanes, -1)
        self.label_scores_NQC.flatten(1).index_add_(1, torch.tensor(places), chance_NY * torch.tensor(weights, dtype=torch.float64))


def _packed(
    by_length: Sequence[int],
    query_ids: Sequence[Sequence[int]],
    label_ids: Sequence[Sequence[int]],
    num_lanes: int,
    lead: int,
    tokens_per_batch: int,
    *,
    at_label: bool,
) -> list[list[int]]:
    """Return queries, shortest first, in groups whose tokens over all lanes, padding included, stay within the budget (one query at least).

    Of all such groups those that cost least: the tokens of all, and for each group as many more as its calls take the time of.
    """
    num_long = sum(len(ids) > 1 for ids in label_ids)
    longest_label = max(max(map(len, label_ids)) - 1, len(label_ids[0]) if at_label else 0)  # of a label what predicts its last token, of the recorded one all
    rows = max(1, num_long + (at_label and len(label_ids[0]) == 1)) * num_lanes  # with the row that the label is recorded in
    tokens_n = rows * np.array([lead + len(query_ids[number]) + longest_label for number in by_length])
    best_n, start_n = np.zeros(len(tokens_n) + 1), [0] * (len(tokens_n) + 1)  # of the first n queries: their cost, and where their last group starts
    for n, tokens in enumerate(tokens_n, 1):
        first = max(0, n - max(1, tokens_per_batch // tokens))
        cost = best_n[first:n] + tokens * np.arange(n - first, 0, -1)
        start_n[n] = first + int(cost.argmin())
        best_n[n] = cost.min() + tokens_per_batch * CALLS
    groups, stop = list[list[int]](), len(tokens_n)
    while stop:
        groups.append(list(by_length[start_n[stop] : stop]))
        stop = start_n[stop]
    return groups[::-1]
