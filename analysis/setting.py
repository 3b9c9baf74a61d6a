"""A setting: one section of a report. Its cells, how it is called, and what stands under its figures.

Knows columns and protocols. Knows nothing of stores, means or pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd

from iclgd_dist.protocol import Protocol

from .text import counted

MATCHED_RATIO = 0.5  # R*, unless a sweep file sets [analysis] matched_ratio
SMALLEST_EFFECT = 0.02  # unless a sweep file sets [analysis] smallest_effect
KEPT = {
    "random": "everything drawn anew",
    "embeddings_norms": "embeddings, norms and output head as trained, the rest drawn anew",
    "norms": "norms as trained, the rest drawn anew",
}
CLEAN = "clean"
_DEFAULTS = Protocol().model_dump(mode="json")


@dataclass(frozen=True)
class Setting:
    """What one section of a report is about: one model, task, number of demonstrations, protocol and set of queries."""

    zero_shot: pd.DataFrame
    icl: pd.DataFrame
    finetuned: pd.DataFrame
    train_on: str
    planned: frozenset[str]  # draws: of its cells, and of the sweep files
    matched_ratio: float = MATCHED_RATIO  # R*: where methods are compared at equal size of update
    smallest_effect: float = SMALLEST_EFFECT  # the smallest difference that matters
    is_amended: bool = False  # a later sweep file says otherwise of the two; what stood there before the first run counts
    variant: str = ""  # of its model's settings in the same store, what tells it apart: computed in bfloat16, query seed 2
    own_methods: tuple[str, ...] = ()  # of the whole store: those that are not built in
    has_twin: bool = False  # another setting differs in the number of queries alone
    selected: dict[tuple[str, str], Any] = field(
        default_factory=dict, init=False, repr=False
    )  # (method, fold) -> what `chosen.select` chose, once it was asked

    @cached_property
    def first(self) -> pd.Series:
        return (self.finetuned if len(self.finetuned) else self.icl).iloc[0]

    @property
    def model(self) -> str:
        notes = self.first["model_notes"] if self.first["model_notes"] is not None else ()
        return ", ".join([str(self.first["model"]), *(note for note in notes if not note.startswith("random weights"))])  # of one seed; the caption has all

    @property
    def named(self) -> dict[str, Any]:
        """The columns that name the setting in every table of figures."""
        first = self.first
        scheme = f" ({first['init_scheme']})" if isinstance(first["init_scheme"], str) else ""
        found = {"task": str(first["task"]), "model": first["model"], "k": int(first["num_demonstrations"]), "train_on": self.train_on}
        found |= {"init": first["init"] + scheme, "protocol": protocol_name(first["protocol"])}
        return found | {"variant": self.variant, "num_queries": int(first["num_queries"])}

    @property
    def seeds(self) -> list[int]:
        return sorted({int(seed) for seed in [*self.icl["seed"], *self.finetuned["seed"]]})

    @property
    def num_draws(self) -> int:
        return len(self.planned)

    @property
    def num_first_orders(self) -> int:
        """How many draws there are where one order of each seed counts."""
        return len({draw.rpartition("/")[0] for draw in self.planned})

    def num_seeds(self, *methods: str) -> int:
        """Return how many seeds each of these methods has, of all unless some are named; of baselines alone, how many ICL has."""
        of_method = [self.finetuned.loc[self.finetuned["method"] == method, "replicate"].nunique() for method in methods or self.methods]
        return min(of_method, default=self.icl["replicate"].nunique())

    @property
    def replicates(self) -> list[int]:
        """The seeds that a mean is over: of the demonstrations, or of random weights."""
        return sorted({int(replicate) for replicate in [*self.icl["replicate"], *self.finetuned["replicate"]]})

    @property
    def is_random(self) -> bool:
        return bool(self.first["init"] != "trained")

    @property
    def methods(self) -> list[str]:
        return sorted(self.finetuned["method"].unique(), key=lambda method: (method != "vanilla", method))

    @property
    def last_step(self) -> str:
        """The largest step, as text: 16, or 16 (batched: 4) where a method does fewer updates."""
        most = max(self._last_steps.values())
        fewer = ", ".join(f"{method}: {step}" for method, step in self._last_steps.items() if step < most)
        return f"{most} ({fewer})" if fewer else str(most)

    def last_step_of(self, method: str) -> int:
        """Return the largest step of the setting that a method's updates reach, whether or not it is there yet."""
        return self._last_steps[method]

    @cached_property
    def _last_steps(self) -> dict[str, int]:
        k, steps, found = int(self.first["num_demonstrations"]), self.finetuned["step"], {}
        for method in self.methods:
            own = self.finetuned.loc[self.finetuned["method"] == method, "method_options"].dropna()
            options = json.loads(own.iloc[0]) if len(own) else {}
            num_updates = options.get("epochs", 1) * -(-k // options.get("batch_size", 1))
            found[method] = int(steps[steps <= num_updates].max())
        return found

    def num_planned(self, method: str) -> int:
        """Return how many draws of a baseline or method are planned; zero-shot has one, or one for each set of random weights."""
        if method == "icl":  # of every train_on
            return max(self.num_draws, self.icl["draw"].nunique())
        return max(1, self.zero_shot["draw"].nunique()) if method == "zero_shot" else self.num_draws

    @property
    def title(self) -> str:
        named = self.named
        return f"{named['task']}, {called(named)}" + (f", {named['num_queries']} queries" if self.has_twin else "")

    def no_rate(self, method: str) -> str:
        """Return why no learning rate of a method can be selected."""
        cells = self.at_last_step(method)
        is_empty = not (cells["learning_rate"] > 0).any()
        return f"no cell at step {self.last_step_of(method)} yet" if is_empty else "no learning rate without divergence"

    @property
    def caption(self) -> str:
        """What stands under every figure: model, weights, recorded position, sink, separator, queries, seeds, what one's own methods are."""
        row = self.first
        protocol = json.loads(row["protocol"])
        position = {"last_prompt": "last prompt token", "label": "the first label's token after the prompt"}[protocol["record_position"]]
        others = "".join(f"; {name}: {value}" for name, value in _altered(protocol).items() if name not in ("record_position", "sink", "separator"))
        runs = sorted({(int(seed), int(order)) for seed, order in pd.concat([self.icl, self.finetuned])[["seed", "order"]].drop_duplicates().to_numpy()})
        orders = len({order for _, order in runs})
        is_grid = len(runs) == orders * len(self.seeds)
        own = self.finetuned[["method", "method_options"]].dropna().drop_duplicates()
        weights = f"; random weights ({self.named['init']}: {KEPT.get(row['init'], row['init'])}), {listed(self.replicates, 'seed of the weights')}"
        return (
            f"{self.model}{weights if self.is_random else ''}; stored as {row['storage_dtype']}, computed in {row['compute_dtype']}. "
            + f"Task {self.named['task']}, k = {self.named['k']}"
            + ("" if self.train_on == "true" else f", finetuned on {self.train_on}")
            + f". Recorded position: {position}; sink: {protocol.get('sink_token', protocol['sink'])}; separator: {protocol['separator']}{others}. "
            + f"{int(row['num_queries'])} queries (query seed {int(row['query_seed'])}); {listed(self.seeds, 'seed')}"
            + (f", {orders} orders each." if is_grid and orders > 1 else f", as (seed, order): {', '.join(map(str, runs))}." if orders > 1 else ".")
            + "".join(f" {method}: {spelled(options)}." for method, options in own.itertuples(index=False))
        )

    def at(self, method: str, learning_rate: float, step: int) -> pd.DataFrame:
        rows = self.finetuned
        return rows[(rows["method"] == method) & (rows["learning_rate"] == learning_rate) & (rows["step"] == step)]

    def at_last_step(self, method: str) -> pd.DataFrame:
        return self.finetuned[(self.finetuned["method"] == method) & (self.finetuned["step"] == self.last_step_of(method))]


def called(named: Mapping[str, Any]) -> str:
    """Return what a setting, or a table over tasks, is called beside its task, from the columns that name it; those that it lacks are left out."""
    text = str(named["model"]) + (f", k = {named['k']}" if "k" in named else "")
    text += "" if named.get("init", "trained") == "trained" else f", random weights: {named['init']}"
    text += {CLEAN: "", "all": ", protocols together"}.get(protocol := str(named.get("protocol", CLEAN)), f", protocol {protocol}")
    text += "" if named.get("train_on", "true") == "true" else f", trained on {named['train_on']}"
    return text + (f", {named['variant']}" if named.get("variant") else "")


def resolved(protocol: str) -> str:
    """Return the protocol with the switches that the version which wrote it did not know: they had their defaults."""
    return json.dumps(_DEFAULTS | json.loads(protocol), sort_keys=True)


def protocol_name(protocol: str) -> str:
    """Return the preset of a resolved protocol, or the switches in which it differs from clean: separator = eos."""
    return ", ".join(f"{name} = {value}" for name, value in _altered(json.loads(protocol)).items()).removeprefix("preset = ") or CLEAN


def _altered(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preset if it is not clean, else the switches that are not clean's."""
    if protocol["preset"] != CLEAN:
        return {"preset": protocol["preset"]}
    return {name: value for name, value in sorted(protocol.items()) if name != "sink_token" and value != _DEFAULTS.get(name)}


def spelled(options: str) -> str:
    """Return the options of a method as text: base vanilla, weights attn_v."""
    return ", ".join(f"{name} {value}" for name, value in json.loads(options).items()) if options else ""


def listed(seeds: Sequence[int], noun: str) -> str:
    """Return 3 seeds (1, 2, 3)."""
    head, _, tail = noun.partition(" ")
    return f"{counted(len(seeds), head)}{' ' + tail if tail else ''} ({', '.join(map(str, seeds))})"
