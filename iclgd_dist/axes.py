"""The axes of a sweep file: what a seed, a run or a list of learning rates is, what one task may have of its own; the controls, what is kept, and what is fixed before the run.

Knows types, ranges and messages. Knows nothing of tasks, models or files.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, field_validator

from iclgd_dist.protocol import Frozen

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]
Count = Annotated[StrictInt, Field(ge=1)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]  # strict: true is no number, nor is "1e-3"
Context = Literal["other_draw", "random_labels", "flipped_labels", "other_task", "shuffled_words", "separator", "shifted"]
TrainOn = Literal["true", "random_labels", "other_task", "shuffled_words"]


class SweepError(ValueError):
    """A sweep, or something it names, cannot be used as it stands. The command line prints it and exits with 2."""


class At(ValueError):
    """A problem of a field, with the keys inside it that lead to the place."""

    def __init__(self, message: str, *keys: str | int) -> None:
        super().__init__(message)
        self.keys = keys


class Several(ValueError):
    """All problems of one field."""

    def __init__(self, problems: Iterable[At]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(map(str, self.problems)))


def refuse(problems: Iterable[At]) -> None:
    """Raise the problems that there are, all at once."""
    if found := tuple(problems):
        raise Several(found)


def listed(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _pairs(value: Any) -> Any:
    if not (isinstance(value, list | tuple) and all(isinstance(run, list | tuple) and len(run) == 2 for run in value)):
        raise ValueError(f"must be pairs of a seed and an order, such as [[2, 0], [3, 1]], got {value!r:.80}")
    return value


def _all_distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    seen: set[Any] = set()
    for number, value in enumerate(values):
        if value in seen:
            raise At(f"must be distinct, got {json.dumps(value)} more than once", number)
        seen.add(value)
    return values


def twice(grid: list[Any]) -> list[str]:
    """Return what is in a list of a sweep file more than once, as text."""
    counts = Counter(repr(value) if isinstance(value, list | dict) else value for value in grid)
    return [str(value) for value, count in counts.items() if count > 1]


def taken(named: Iterable[Any], builtin: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield number and name of what has the name of something built in, or of something before it."""
    names = set(builtin)
    for number, each in enumerate(named):
        if each.name in names:
            yield number, each.name
        names.add(each.name)


def by_method(value: Any) -> Any:
    """Return learning rates as lists by method; "*" stands for every method."""
    return {method: listed(rates) for method, rates in (value if isinstance(value, dict) else {"*": value}).items()}


Seeds = Annotated[tuple[Seed, ...], Field(min_length=1), BeforeValidator(listed), AfterValidator(_all_distinct)]
Runs = Annotated[tuple[tuple[Seed, Annotated[StrictInt, Field(ge=0)]], ...], Field(min_length=1), BeforeValidator(_pairs), AfterValidator(_all_distinct)]
Rates = dict[str, Annotated[tuple[Number, ...], Field(min_length=1)]]


class TaskAxes(Frozen):
    """What one task has instead of the sweep's own."""

    runs: Runs | None = None
    learning_rates: Annotated[Rates, BeforeValidator(by_method)] | None = None  # methods that are not named keep the sweep's


class Controls(Frozen):
    """What a similarity is held against. Only `train_on` makes cells; the others add figures to rows."""

    zero_learning_rate: StrictBool = False  # allow learning rate 0: the control that must change nothing
    contexts: tuple[Context, ...] = ()  # true = all of them, or a list of names
    control_task: str = "trec"  # of other_task; for that task itself trec, or mr_snippets
    train_on: tuple[TrainOn, ...] = ("true",)  # what finetuning sees: a grid axis; ICL keeps the true demonstrations
    random_delta: StrictBool = False  # random updates of the same effect, for the cells that a report cites

    @field_validator("contexts", mode="before")
    @classmethod
    def _all_or_named(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return get_args(Context) if value else ()
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"must be true, false or a list of names, got {value!r:.80}")
        return listed(value)

    @field_validator("train_on", mode="before")
    @classmethod
    def _at_least_one(cls, value: Any) -> Any:
        if value == []:
            raise ValueError("must name at least 1, got none")
        return listed(value)

    @field_validator("contexts", "train_on")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(names))

    @property
    def need_other_task(self) -> bool:
        return "other_task" in (*self.contexts, *self.train_on)


class Measures(Frozen):
    """What is measured beside the two papers' figures. Not part of a cell's key: `iclgd measure` fills in what committed cells lack."""

    calibration: StrictBool = False  # prompts without content, for contextual calibration; the other figures of calibration are always there
    outputs: StrictBool = False  # next-token distributions compared with ICL's, over the whole vocabulary
    spectra: StrictBool = False  # ranks of updates and of the changes they make, and the directions that these share with ICL's
    geometry: StrictBool = False  # clusters and intrinsic dimension of the attention outputs
    supervised_icl: StrictBool = False  # finetuned weights with the demonstrations in the prompt too; as much work as every cell's captures again
    orders: StrictBool = False  # each finetuned cell against ICL in the seed's other orders; needs [capture] keep


class Capture(Frozen):
    """What is kept beside the figures: captures, to evaluate metrics later, and the texts, for whoever reads the page. Not part of a cell's key."""

    keep: Literal["none", "final_step", "all"] = "none"
    texts: StrictBool = True  # prompts and demonstrations, once for each zero-shot and in-context cell


class Analysis(Frozen):
    """Fixed before the run: the smallest difference that matters, and the update ratio at which methods are compared."""

    smallest_effect: Annotated[Number, Field(gt=0)] = 0.02
    matched_ratio: Annotated[Number, Field(gt=0)] = 0.5
