"""The first paragraph of a report: is layer-causal finetuning closer to ICL than vanilla, at equal size of update and at equal improvement, and is that about the task?

The rule stands here; the smallest effect that matters and R* stand in the sweep file before the run: the oldest file of a setting counts. What the paragraph says is counted from the store, with the
intervals of intervals.py. Unit of a mean over tasks: the task.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from . import controls
from .chosen import REASONS as SIZE_REASONS
from .chosen import SELECTED, Matched, Selected, difference, matched, paired
from .crossing import REASONS as GAIN_REASONS
from .crossing import at_equal_gain, crossfit, selected
from .intervals import ALL_TASKS, MIN_SEEDS, Estimate, over_tasks
from .load import SETTING, Frames, each, of_most_queries
from .setting import Setting
from .text import counted, number, rate

BASE, METHOD, METRIC = "vanilla", "layer_causal", "sim_aou"


@dataclass(frozen=True)
class Compared:
    """Estimates of one quantity: of each task, and over all of them; the draws planned of each task; by method, why draws are left out."""

    tasks: Mapping[str, Estimate]
    planned: Mapping[str, int]
    reasons: Mapping[str, Counter[str]] = field(default_factory=dict)

    @property
    def mean(self) -> Estimate:
        return over_tasks(list(self.tasks.values())) if len(self.tasks) > 1 else next(iter(self.tasks.values()), Estimate())

    @property
    def with_value(self) -> list[str]:
        """Tasks that have a value."""
        return [task for task, one in self.tasks.items() if math.isfinite(one.mean)]

    @property
    def missing(self) -> str:
        """How many draws have a value, where some have none."""
        used, planned = self.mean.used, sum(self.planned.values())
        return f" ({used} of {planned} draws)" if 0 < used < planned else ""

    def __str__(self) -> str:
        """The mean over tasks, and in how many of them it lies above 0; in words where no draw has a value."""
        finite = [self.tasks[task].mean for task in self.with_value]
        return f"{self.mean}, above 0 in {sum(mean > 0 for mean in finite)} of {counted(len(finite), 'task')}" if finite else "no draw could be compared"


@dataclass(frozen=True)
class Findings:
    """What the paragraph of one trained model is made of."""

    settings: Sequence[Setting]
    without: Sequence[str]  # tasks in which one of the two methods has no cell
    gate: Compared  # balanced accuracy of ICL less that of zero-shot
    accuracies: Mapping[str, Compared]  # zero_shot, icl and the methods at their selected learning rates, cross-fitted
    rates: Mapping[str, Mapping[str, tuple[Selected, Selected]]]  # method -> task -> learning rates that the two folds select
    levels: Mapping[str, Compared]  # sim_aou of each method at R*, over the draws that both have
    norm: Compared  # their difference
    gain: Compared  # the same at equal improvement
    specific: Compared  # of layer-causal at R*: in-context less the largest empty context
    scale: Mapping[str, Compared]  # other_draw, other_task, random_delta
    trained_on: Mapping[str, Mapping[str, Compared]]  # method -> true and what else was trained on -> sim_aou at the learning rate nearest R*
    untrained: Mapping[str, Compared]  # initialisation -> the difference at R*
    contexts: Sequence[str]  # kinds of control contexts that were captured

    @property
    def is_on_same_tasks(self) -> bool:
        """Whether both differences are means over the same tasks: a method that never improves is no missing value, and the others' mean not that of all tasks."""
        return self.norm.with_value == self.gain.with_value

    @property
    def verdict(self) -> str:
        if not self.is_on_same_tasks:
            return "undecided"
        return verdict(self.norm.mean, self.gain.mean, self.specific.mean, self.settings[0].smallest_effect)


IN_WORDS = {
    "closer": "closer to ICL than vanilla",
    "closer, but not task-specific": "closer to ICL than vanilla, but not task-specific",
    "closer, task-specific or not": "closer to ICL than vanilla, whether in what is specific to the task is not known",
    "further": "further from ICL than vanilla",
    "not closer": "not closer to ICL than vanilla",
    "undecided": "neither shown to be closer to ICL than vanilla nor shown not to be (undecided)",
}


def verdict(norm: Estimate, gain: Estimate, specific: Estimate, effect: float) -> str:
    """Return closer, further, not closer or undecided, on 95 % intervals of both differences; of closer, whether it is specific to the task, if that is known."""
    both = (norm, gain)
    if not all(math.isfinite(one.lower) for one in both):
        return "undecided"
    if all(one.lower > 0 for one in both) and norm.mean >= effect:
        said = "closer"
    elif all(one.upper < 0 for one in both):
        said = "further"
    else:
        said = "not closer" if all(one.upper < effect for one in both) else "undecided"
    if said != "closer" or specific.lower > 0:
        return said
    return "closer, but not task-specific" if math.isfinite(specific.lower) else "closer, task-specific or not"


def _alone(one: Estimate, effect: float) -> str:
    """Return what one difference says by itself."""
    if not math.isfinite(one.lower):
        return "undecided"
    return "closer" if one.lower > 0 and one.mean >= effect else "further" if one.upper < 0 else "not closer" if one.upper < effect else "undecided"


def findings(frames: Frames) -> list[Findings]:
    """Return what is known of each trained model, protocol, number of demonstrations, R* and smallest effect under which both methods ran."""
    groups: dict[tuple[str, ...], list[Setting]] = {}
    without: dict[tuple[str, ...], list[str]] = {}
    untrained: dict[tuple[str, ...], dict[str, list[Setting]]] = {}
    for setting in frames.settings():
        if setting.train_on != "true":
            continue
        place = tuple(setting.first[[name for name in SETTING if name not in ("task", "num_queries", "init", "init_scheme")]].astype(str))
        place += (str(setting.matched_ratio), str(setting.smallest_effect))
        if not {BASE, METHOD} <= set(setting.methods):
            without.setdefault(place, []).append("" if setting.is_random else setting.named["task"])
        elif setting.is_random:
            untrained.setdefault(place, {}).setdefault(setting.named["init"], []).append(setting)
        else:
            groups.setdefault(place, []).append(setting)
    return [
        _found(frames, of_most_queries(settings), without.get(place, ()), {init: of_most_queries(some) for init, some in untrained.get(place, {}).items()})
        for place, settings in groups.items()
    ]


def _found(frames: Frames, settings: Sequence[Setting], without: Sequence[str], untrained: Mapping[str, Sequence[Setting]]) -> Findings:
    at_size = {setting.named["task"]: {method: matched(setting, method) for method in (BASE, METHOD)} for setting in settings}
    at_gain = {setting.named["task"]: at_equal_gain(frames, setting, (BASE, METHOD)) for setting in settings}
    chosen = {method: {setting.named["task"]: selected(frames, setting, method) for setting in settings} for method in (BASE, METHOD)}

    def over(
        quantity: Callable[[Setting], Estimate], some: Sequence[Setting] = settings, *, of: str = METHOD, reasons: Mapping[str, Counter[str]] | None = None
    ) -> Compared:
        found = {setting.named["task"]: quantity(setting) for setting in some}
        return Compared(found, {setting.named["task"]: setting.num_planned(of) for setting in some}, reasons or {})

    def level(method: str) -> Callable[[Setting], Estimate]:
        def of(setting: Setting) -> Estimate:
            here = at_size[setting.named["task"]]
            terms = dict(zip((BASE, METHOD), paired(here[BASE].terms, here[METHOD].terms), strict=True))
            return frames.contrast(terms[method], METRIC)

        return of

    def accuracy(method: str) -> Callable[[Setting], Estimate]:
        def of(setting: Setting) -> Estimate:
            picked = chosen[method][setting.named["task"]]
            return crossfit(frames, {fold: terms for fold, (_, terms) in picked.items()}, "balanced_accuracy") if picked else Estimate()

        return of

    accuracies = {
        "zero-shot": over(lambda setting: frames.estimate(setting.zero_shot, "balanced_accuracy"), of="zero_shot"),
        "in-context": over(lambda setting: frames.estimate(setting.icl, "balanced_accuracy")),
    }
    size_reasons = _by_method(at_size.values())
    gain_reasons = _by_method(of_fold for found in at_gain.values() for of_fold in found.values())
    tables = {setting.named["task"]: controls.data(frames, setting) for setting in settings}
    there = {name for table in tables.values() for name in table.get("against", ())}
    also = [name for name in controls.MEANING if name.startswith(controls.TRAINED_ON) and name in there]
    variants = {"true": controls.ICL} | {name.removeprefix(controls.TRAINED_ON): name for name in also} if also else {}

    def of(method: str, against: str) -> Callable[[Setting], Estimate]:
        return lambda setting: _line(tables[setting.named["task"]], method, against)

    return Findings(
        settings,
        sorted({*without} - {"", *at_size}),
        gate=over(lambda setting: _gate(frames, setting)),
        accuracies=accuracies | {method: over(accuracy(method)) for method in (BASE, METHOD)},
        rates={method: {task: (picked["B"][0], picked["A"][0]) for task, picked in of_tasks.items() if picked} for method, of_tasks in chosen.items()},
        levels={method: over(level(method)) for method in (BASE, METHOD)},
        norm=over(lambda setting: _at_size(frames, at_size[setting.named["task"]]), reasons=size_reasons),
        gain=over(lambda setting: _at_gain(frames, at_gain[setting.named["task"]]), reasons=gain_reasons),
        specific=over(lambda setting: _specific(frames, setting, at_size[setting.named["task"]][METHOD])),
        scale={
            "ICL with other demonstrations": over(lambda setting: _line(tables[setting.named["task"]], "icl", "other_draw")),
            "with another task's": over(lambda setting: _line(tables[setting.named["task"]], "icl", "other_task")),
        }
        | {f"random weights of the same effect as {method}'s": over(of(method, controls.RANDOM_DELTA)) for method in (METHOD, BASE)},
        trained_on={method: {name: over(of(method, against)) for name, against in variants.items()} for method in (BASE, METHOD)},
        untrained={init: _untrained(frames, some) for init, some in untrained.items()},
        contexts=controls.contexts(frames, settings),
    )


def _by_method(found: Iterable[Mapping[str, Matched]]) -> dict[str, Counter[str]]:
    every = list(found)
    return {method: sum((one[method].reasons for one in every), Counter()) for method in (BASE, METHOD)}


def _untrained(frames: Frames, settings: Sequence[Setting]) -> Compared:
    """Return the difference at R* on random weights."""
    at_size = {setting.named["task"]: {method: matched(setting, method) for method in (BASE, METHOD)} for setting in settings}
    found = {task: _at_size(frames, of_task) for task, of_task in at_size.items()}
    return Compared(found, {setting.named["task"]: setting.num_draws for setting in settings}, _by_method(at_size.values()))


def _gate(frames: Frames, setting: Setting) -> Estimate:
    """Return ICL's balanced accuracy less zero-shot's, paired by query."""
    icl = each(setting.icl)
    if icl.empty or len(setting.zero_shot) != 1:
        return Estimate()
    return frames.contrast(pd.concat([icl, icl.assign(key=setting.zero_shot["key"].iloc[0], weight=-1.0)]), "balanced_accuracy")


def _at_size(frames: Frames, found: Mapping[str, Matched]) -> Estimate:
    return frames.contrast(difference(found[METHOD].terms, found[BASE].terms), METRIC)


def _at_gain(frames: Frames, found: Mapping[str, Mapping[str, Matched]]) -> Estimate:
    return crossfit(frames, {fold: difference(of_fold[METHOD].terms, of_fold[BASE].terms) for fold, of_fold in found.items()}, METRIC)


def _specific(frames: Frames, setting: Setting, at: Matched) -> Estimate:
    """Return, at R*, the similarity with ICL's change less the largest with a context that teaches nothing, taken in each seed."""
    here = frames.controls[frames.controls["cell"].isin(at.terms["key"])]
    named = controls.by_name(frames, here, at.terms["key"].drop_duplicates(), METRIC, "all")
    return controls.task_specific(frames, {"all": at.terms}, {"all": named}, METRIC) or Estimate()


def _line(table: pd.DataFrame, method: str, against: str) -> Estimate:
    """Return the mean of a control of one task, without an interval."""
    if table.empty:
        return Estimate()
    rows = table[(table["method"] == method) & (table["metric"] == METRIC) & table["against"].map(controls.kind_of).eq(against)]
    rows = rows[rows["choice"].ne(SELECTED)]
    if rows.empty:
        return Estimate()
    used = min(int(rows["num_used"].sum()), int(rows["num_planned"].max()))
    return Estimate(float(rows["mean"].mean()), used=used, replicates=int(rows["num_replicates"].min()))


def passed(found: Findings) -> list[str]:
    """Return the tasks in which ICL's balanced accuracy lies above zero-shot's, with its interval."""
    return [task for task, gate in found.gate.tasks.items() if gate.lower > 0]


def paragraph(found: Findings) -> list[str]:
    """Return the sentences on one trained model, the verdict first."""
    first, ratio = found.settings[0], found.settings[0].matched_ratio
    tasks, seeds = [setting.named["task"] for setting in found.settings], min(setting.num_seeds(BASE, METHOD) for setting in found.settings)
    steps = " or ".join(dict.fromkeys(setting.last_step for setting in found.settings))
    protocol = "" if first.named["protocol"] == "clean" else f", protocol {first.named['protocol']}"
    protocol += f", {first.variant}" if first.variant else ""
    norm, gain = found.norm.mean, found.gain.mean
    said = [
        f"On {', '.join(tasks)} ({counted(seeds, 'seed')}), {first.model}, k = {first.named['k']}, step {steps}{protocol}: at equal size of update (R = {ratio:g}) "
        f"layer-causal finetuning is {IN_WORDS[found.verdict]}: {METRIC} {number(found.levels[METHOD].mean.mean)} against "
        f"{number(found.levels[BASE].mean.mean)}, difference {found.norm}; at equal improvement {found.gain}."
    ]
    alone = [_alone(norm, first.smallest_effect), _alone(gain, first.smallest_effect)]
    if found.verdict == "undecided" and alone != ["undecided"] * 2:
        same = "" if found.is_on_same_tasks or not found.gain.with_value else " over the same tasks"
        said.append(f"Undecided, as it takes both differences{same}: at equal size alone it would be {alone[0]}, at equal improvement alone {alone[1]}.")
    planned = sum(found.norm.planned.values())
    if (norm.used, gain.used) != (planned, planned):
        left = [_left_out(one.reasons, meaning) for one, meaning in ((found.norm, SIZE_REASONS), (found.gain, GAIN_REASONS))]
        said.append(
            f"Draws used: {norm.used} of {planned} at equal size{left[0]}, {gain.used} of {planned} at equal improvement{left[1]}; "
            "in brackets the draws of each method that have no such point, at equal improvement once for each fold."
        )
    if found.without:
        said.append(f"Left out, as one of the two methods has no cell there: {', '.join(found.without)}.")
    if any(setting.is_amended for setting in found.settings):
        said.append(
            f"A later sweep file has another R* or smallest effect: what stood in the first one before its run counts (R* = {ratio:g}, {first.smallest_effect:g})."
        )
    scale = [f"{name} {number(one.mean.mean)}{one.missing}" for name, one in found.scale.items() if math.isfinite(one.mean.mean)]
    if scale:
        said.append(f"For scale: {', '.join(scale)}.")
    elif found.contexts:
        said.append(f"Control contexts: {', '.join(found.contexts)}; none that shows ICL with other demonstrations or another task's, nor random weights.")
    else:
        said.append("No control context was captured: what unrelated changes score is not known.")
    if math.isfinite(found.specific.mean.mean):
        said.append(f"Specific to the task (ICL less the largest of {', '.join(controls.EMPTY)}): {found.specific.mean}{found.specific.missing}.")
    elif scale or found.contexts:
        said.append(f"How much of it is specific to the task is not known: that takes the control contexts {', '.join(controls.EMPTY)} of the cells around R*.")
    if found.trained_on[METHOD]:
        parts = [
            f"{method} {', '.join(f'{name} {number(one.mean.mean)}{one.missing}' for name, one in found.trained_on[method].items())}"
            for method in (METHOD, BASE)
        ]
        said.append(f"By what was trained on, at the learning rate nearest R*, {METRIC} with the ICL of the true demonstrations: {'; '.join(parts)}.")
    said.append(_in_words(found))
    has_icl = passed(found)
    which = f" ({', '.join(has_icl)})" if has_icl else ""
    said.append(
        f"ICL beats zero-shot, with its interval above 0, in {len(has_icl)} of {counted(len(tasks), 'task')}{which}; where it does not, no effect of ICL is shown."
    )
    said.append(_collapsed(found.settings))
    for init, one in found.untrained.items():
        said.append(f"On random weights ({init}) the difference at equal size is {one.mean}{one.missing}{_left_out(one.reasons, SIZE_REASONS)}.")
    fewest = min([seeds, *(task.replicates for one in (found.norm, found.gain) for task in one.tasks.values() if task.used)])
    if fewest < MIN_SEEDS:
        said.append(f"Descriptive: some figures are over {counted(fewest, 'seed')}, fewer than {MIN_SEEDS}.")
    return said


def _in_words(found: Findings) -> str:
    parts = [f"{name} {found.accuracies[name].mean}{found.accuracies[name].missing}" for name in ("zero-shot", "in-context")]
    for method in (BASE, METHOD):
        rates = sorted({one.learning_rate for of_task in found.rates[method].values() for one in of_task})
        at = rate(rates[0]) if len(rates) == 1 else f"{rate(rates[0])} to {rate(rates[-1])}" if rates else "none defined"
        edges = [task for task, of_task in found.rates[method].items() if any(one.is_edge for one in of_task)]
        at += f"; at the edge of its grid in {', '.join(edges)}: extend the grid" if edges else ""
        one = found.accuracies[method]
        parts.append(f"{method} {one.mean}{one.missing} (learning rate selected by nll_label on the other fold: {at})")
    return f"Balanced accuracy: {', '.join(parts)}."


def _left_out(reasons: Mapping[str, Counter[str]], meaning: Mapping[str, str]) -> str:
    """Return by method why draws are left out, in brackets; nothing where none is."""
    parts = []
    for method, counts in reasons.items():
        said = [f"{counts[name]} x {why}" for name, why in meaning.items() if counts[name]]
        parts += [f"{method}: {', '.join(said)}"] if said else []
    return f" ({'; '.join(parts)})" if parts else ""


def _collapsed(settings: Sequence[Setting]) -> str:
    icl = pd.concat([setting.icl for setting in settings])
    parts = [f"{int(icl['collapsed'].sum())} of {counted(len(icl), 'in-context cell')}"]
    for method in (BASE, METHOD):
        cells = pd.concat([setting.at_last_step(method) for setting in settings])
        parts.append(f"{int(cells['collapsed'].sum())} of {len(cells)} of {method} at the largest step")
    return f"Collapsed, one label predicted for nearly all queries: {', '.join(parts)}."


def data(every: Sequence[Findings]) -> pd.DataFrame:
    """Return one row per model, quantity and task (and over all tasks): mean, interval, draws used of draws planned, the verdict."""
    rows: list[dict[str, Any]] = []
    for found in every:
        named = {name: value for name, value in found.settings[0].named.items() if name not in ("task", "train_on", "num_queries")}
        quantities = {"ICL less zero-shot, balanced accuracy": found.gate, "D_norm": found.norm, "D_gain": found.gain, "task_specific": found.specific}
        quantities |= {f"balanced accuracy, {name}": one for name, one in found.accuracies.items()} | {
            f"{METRIC} at R*, {m}": one for m, one in found.levels.items()
        }
        quantities |= {f"scale: {name}": one for name, one in found.scale.items()} | {
            f"D_norm, random weights: {init}": one for init, one in found.untrained.items()
        }
        quantities |= {f"{METRIC} nearest R*, {m}, trained on {name}": one for m, of_name in found.trained_on.items() for name, one in of_name.items()}
        named |= {"matched_ratio": found.settings[0].matched_ratio, "smallest_effect": found.settings[0].smallest_effect}
        for quantity, one in quantities.items():
            for task, value in (*one.tasks.items(), (ALL_TASKS, one.mean)):
                planned = one.planned.get(task, sum(one.planned.values()))
                rows.append(named | {"quantity": quantity, "task": task} | value.columns | {"num_planned": planned, "verdict": found.verdict})
    return pd.DataFrame(rows)


__all__ = ["Findings", "data", "findings", "paragraph", "passed", "verdict"]
