"""What a good engineer would write with transformers, against one block of ours, in turns on the same work.

The model is loaded once; zero-shot and ICL are computed once; the demonstrations' keys and values are kept in a DynamicCache and expanded to the batch;
queries go in batches of 16, sorted by length; the output head reads the last position only; one learning rate at a time is trained once through all
steps, written into the weights, with captures on the way. Ours does more: noise floors, attention rankings, folds, rows on disk.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from iclgd_dist.block import run_block
from tests.benchmarks import flops, grid, lanes, papers
from tests.benchmarks.agreement import Key, Stored
from tests.benchmarks.grid import Work, say
from tests.benchmarks.papers import Capture

GOAL, BATCH = 1.3, 16


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Time both in turns, check that their results agree, and return the figures."""
    made = grid.parser(__doc__)
    made.add_argument("--rounds", type=int, default=2)
    options = made.parse_args(arguments)
    seconds: dict[str, list[float]] = {"loop": [], "ours": []}
    errors: dict[str, float] = defaultdict(float)
    with grid.work(options) as work:
        lm, loop = grid.loaded(work.block), Loop(work)
        for number in range(options.rounds):
            before = time.perf_counter()
            found = loop.run()
            seconds["loop"].append(time.perf_counter() - before)
            store, before = grid.new_store(work.folder), time.perf_counter()
            run_block(lm, work.block, store)
            seconds["ours"].append(time.perf_counter() - before)
            say(f"round {number + 1}: loop {seconds['loop'][-1]:.1f} s, ours {seconds['ours'][-1]:.1f} s")
            stored = Stored(store)
            assert stored.cells.keys() == found.keys(), "the two procedures computed different cells"
            for key, figures in found.items():
                for name, error in stored.errors(key, figures).items():
                    errors[name] = max(errors[name], error)
        training = lanes.measure(lm, work, lanes=[1, 8], rounds=options.rounds)
        useful = sum(flops.of_block(work.encoded, work.block.model.config, work.passes).values())
    medians = {name: median(times) for name, times in seconds.items()}
    value = medians["loop"] / medians["ours"]
    return {
        "value": value,
        "goal": GOAL,
        "holds": value >= GOAL,
        "seconds": seconds,
        "gflops": {name: useful / median_seconds / 1e9 for name, median_seconds in medians.items()},  # useful FLOPs of ours, for both
        "training_alone": training,
        "grid": {name: vars(options)[name] for name in ("k", "queries", "rates", "threads")} | {"steps": work.passes["vanilla"][1]},
        "num_cells": len(found),
        "largest_errors": dict(errors),
    }


class Loop:
    """The engineer's program. One model, whose W_K and W_V are written and restored."""

    def __init__(self, work: Work) -> None:
        self.encoded, self.labels = work.encoded, work.labels
        self.grid = {name: (work.block.learning_rates(name), work.block.steps(name)) for name in work.passes}
        self.model, self.recorder = papers.load(str(work.directory))
        self.initial = [weight.clone() for weight in papers.trained(self.model)]
        by_length = sorted(range(len(self.encoded.queries)), key=lambda number: len(self.encoded.queries[number]))
        self.batches = [by_length[start : start + BATCH] for start in range(0, len(by_length), BATCH)]

    def run(self) -> dict[Key, dict[str, Tensor]]:
        """Return the figures of every cell."""
        steps = sorted({step for _, some in self.grid.values() for step in some})
        zero_shot, contexts = self.capture(), self.in_contexts(steps)
        in_context = contexts.pop(len(self.encoded.context_ids))
        found: dict[Key, dict[str, Tensor]] = {("zero_shot", None, None): {"label_scores": zero_shot.label_scores_QC}}
        found["icl", None, None] = {"label_scores": in_context.label_scores_QC}
        training = list(zip(self.encoded.training.sequences, self.encoded.training.first_loss, strict=True))
        for method, (rates, steps) in self.grid.items():
            for rate in rates:
                for step, (ids, first) in enumerate(training[: max(steps)], 1):
                    with papers.learning(self.model):
                        papers.update(self.model, ids, first, method, rate)
                    if step in steps:
                        finetuned = self.capture()
                        figures = papers.compare(zero_shot, in_context, finetuned)
                        prefix = contexts.get(len(self.encoded.context_of(step)[0]), in_context)
                        for name, figure in papers.compare(zero_shot, prefix, finetuned).items():
                            figures[f"{name.removesuffix('_norms')}_prefix{'_norms' if name.endswith('_norms') else ''}"] = figure
                        found[method, rate, step] = figures | {"delta_norms": self.delta_norms()}
                self.restore()
        return found

    def delta_norms(self) -> Tensor:
        return torch.stack([(weight - before).norm() for weight, before in zip(papers.trained(self.model), self.initial, strict=True)]).view(-1, 2)

    @torch.no_grad()
    def restore(self) -> None:
        for weight, before in zip(papers.trained(self.model), self.initial, strict=True):
            weight.copy_(before)

    @torch.no_grad()
    def in_contexts(self, steps: Sequence[int]) -> Mapping[int, Capture]:
        """Return the queries behind all demonstrations, and behind those of each step, by the context's length; its keys and values are computed once."""
        cache = DynamicCache()
        self.model.model(torch.tensor([self.encoded.context_ids]), past_key_values=cache)
        lengths = {len(self.encoded.context_of(step)[0]) for step in steps} | {len(self.encoded.context_ids)}
        return {length: self.capture([(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers]) for length in lengths}

    @torch.no_grad()
    def capture(self, context: Sequence[tuple[Tensor, Tensor]] | None = None) -> Capture:
        """Return what the model does with all queries, alone or behind a context, batch by batch."""
        queries, config = self.encoded.queries, self.model.config
        attention_LQD = torch.zeros(config.num_hidden_layers, len(queries), config.hidden_size)
        scores_LQHT = torch.zeros(config.num_hidden_layers, len(queries), config.num_attention_heads, max(map(len, queries)))
        label_scores_QC = torch.zeros(len(queries), len(self.labels), dtype=torch.float64)
        lead = [] if context else list(self.encoded.prefix_ids)
        for numbers in self.batches:
            lengths = torch.tensor([len(queries[number]) for number in numbers])
            rows = [torch.tensor([*lead, *queries[number]]) for number in numbers]
            ids_BT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            cache = None
            if context:
                cache = DynamicCache()
                for index, (keys, values) in enumerate(context):
                    cache.update(keys.expand(len(numbers), -1, -1, -1), values.expand(len(numbers), -1, -1, -1), index)
            positions = (len(lead) + lengths - 1).tolist()
            self.recorder.start(positions, len(lead))
            # Padding is on the right, where no token sees it: no mask.
            hidden_BTD = self.model.model(ids_BT, past_key_values=cache, use_cache=cache is not None).last_hidden_state
            logits_BV = self.model.lm_head(hidden_BTD[range(len(numbers)), positions])
            attention_LQD[:, numbers] = torch.stack(self.recorder.outputs_LBD)
            scores_LBHT = torch.stack(self.recorder.scores_LBHT)
            is_own = torch.arange(scores_LBHT.shape[-1]) < lengths[:, None]
            scores_LQHT[:, numbers, :, : scores_LBHT.shape[-1]] = scores_LBHT * is_own[None, :, None]
            label_scores_QC[numbers] = logits_BV.double().log_softmax(-1)[:, self.labels]
        self.recorder.start([], 0)
        return Capture(attention_LQD, scores_LQHT, label_scores_QC)
