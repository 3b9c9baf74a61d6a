"""The sweep file's [search]: where `iclgd tune` looks for learning rates, by what it judges them, and how far it goes. None of it is part of a cell's key."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from iclgd_dist.axes import At, Count, Number, Seed, listed, refuse
from iclgd_dist.protocol import Frozen
from iclgd_dist.toml_text import unknown

BASELINES = ("zero_shot", "icl")  # that a constraint may compare a cell with
SMALLER_IS_BETTER = ("nll_", "kl_", "ece", "brier")  # beginnings of the names of metrics that a search makes small unless told otherwise
AGAINST_BASELINES = ("rec2ftp", "rec2ftp_base", "jaccard_changed", "agreement_icl", "kappa_icl", "kl_label_icl")  # of a fold, which compare a cell with these
_COMPARED = {">=": operator.ge, "<=": operator.le}
_CONSTRAINT = re.compile(r"\s*([a-z]\w*)\s*(>=|<=)\s*([A-Za-z_]\w*|[-+0-9.eE]+)\s*")

Range = tuple[Annotated[Number, Field(gt=0)], Annotated[Number, Field(gt=0)]]


class Rung(Frozen):
    """How much evidence a learning rate is judged by: the first queries of the draw, the first seeds of the sweep."""

    num_queries: Annotated[int, Field(strict=True, ge=2)]
    num_seeds: Count = 1


@dataclass(frozen=True)
class Constraint:
    """What a cell must fulfil beside its objective: a metric against a number, or against the same metric of a baseline."""

    metric: str
    sign: str
    bound: float | str  # a number, or one of BASELINES

    def violation(self, value: float, bound: float) -> float:
        """Return by how much it is missed; not above 0 where it holds."""
        return bound - value if self.sign == ">=" else value - bound

    @staticmethod
    def of(text: str) -> Constraint:
        """Errors: ValueError for what is no constraint."""
        match = _CONSTRAINT.fullmatch(text)
        bound: float | str | None = None
        if match:
            with contextlib.suppress(ValueError):
                bound = match[3] if match[3] in BASELINES else float(match[3])
        if match is None or bound is None or (isinstance(bound, float) and not math.isfinite(bound)):
            raise ValueError(f'must be like "balanced_accuracy >= zero_shot" or "update_ratio <= 1.0", got {text!r:.80}')
        return Constraint(match[1], match[2], bound)


class Search(Frozen):
    """What `iclgd tune` does for each model, protocol, task, number of demonstrations and method."""

    learning_rates: Annotated[dict[str, Range], Field(min_length=1)]  # method -> lowest and highest; log-uniform between them
    sampler: Literal["tpe", "random", "grid"] = "tpe"  # grid: evenly spaced in log
    objective: str = "nll_label"  # a metric of a cell, on fold A; reports are on fold B
    goal: Literal["min", "max"] | None = None  # by default max, and min for nll_*, kl_*, ece* and brier*
    step: Literal["last", "best"] = "last"  # judge a learning rate at s = k, or at the best of its steps
    constraints: tuple[str, ...] = ()  # "balanced_accuracy >= zero_shot": a metric against a number, zero_shot or icl
    samples: Count = 12  # learning rates
    per_round: Count = 4  # asked for at once: they train together
    seed: Seed = 1  # of the sampler
    rungs: tuple[Rung, ...] = ()  # growing evidence: each rung evaluates the best of the one before; by default everything at once
    keep: Annotated[Number, Field(gt=0, lt=1)] = 0.5  # share of the learning rates that goes on to the next rung
    # asha: every learning rate is a trial of its own that reports each probed step to Ray Tune's ASHA, which stops those behind; all are asked for at once
    scheduler: Literal["none", "asha"] = "none"
    reduction_factor: Annotated[int, Field(strict=True, ge=2)] = 2  # of asha: one in so many goes on from rung to rung

    @field_validator("constraints", "rungs", mode="before")
    @classmethod
    def _list_or_one(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _ends(cls, ranges: Any) -> Any:
        wrong = {name: ends for name, ends in ranges.items() if not isinstance(ends, list | tuple) or len(ends) != 2} if isinstance(ranges, dict) else {}
        refuse(At(f"search.learning_rates.{name} must be a lowest and a highest learning rate, got {ends!r:.80}", name) for name, ends in wrong.items())
        return ranges

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, ranges: dict[str, Range]) -> dict[str, Range]:
        wrong = {name: ends for name, ends in ranges.items() if ends[0] >= ends[1]}
        refuse(At(f"search.learning_rates.{name} must be a lower and a higher learning rate, got [{a:g}, {b:g}]", name) for name, (a, b) in wrong.items())
        return ranges

    @field_validator("constraints")
    @classmethod
    def _readable(cls, constraints: tuple[str, ...]) -> tuple[str, ...]:
        for number, text in enumerate(constraints):
            try:
                Constraint.of(text)
            except ValueError as error:
                raise At(str(error), number) from None
        return constraints

    @field_validator("rungs")
    @classmethod
    def _growing(cls, rungs: tuple[Rung, ...]) -> tuple[Rung, ...]:
        for number, (before, rung) in enumerate(itertools.pairwise(rungs), 1):
            if rung == before or rung.num_queries < before.num_queries or rung.num_seeds < before.num_seeds:
                raise At("must grow from rung to rung in queries or in seeds, and shrink in neither", number)
        return rungs

    def check(self, methods: Sequence[str] | None, *, own: Mapping[str, Any], num_queries: int | None, num_seeds: int) -> None:
        """Errors: for each method, metric or rung that the sweep around it does not have, and where asha has nothing to stop. `own`: [[method]] by name."""
        refuse(self._problems(methods, own, num_queries, num_seeds))

    def _problems(self, methods: Sequence[str] | None, own: Mapping[str, Any], num_queries: int | None, num_seeds: int) -> Iterator[At]:
        strangers = [method for method in self.learning_rates if methods and method not in methods]
        for method in strangers:
            yield At(f"search.learning_rates: {unknown('method', method, methods or ())}", "learning_rates", method)
        known = _judged()
        for keys, metric in ((("objective",), self.objective), *((("constraints", n), bound.metric) for n, bound in enumerate(self.bounds))):
            if metric not in known:
                yield At(f"search: {unknown('metric', metric, known)}", *keys)
        of_baselines = [name for name in _of_a_fold() if name not in AGAINST_BASELINES]
        for number, bound in enumerate(self.bounds):
            if isinstance(bound.bound, str) and bound.metric in known and bound.metric not in of_baselines:
                yield At(f"search.constraints: {bound.bound} has no {bound.metric}; it has {', '.join(of_baselines)}", "constraints", number)
        for number, rung in enumerate(self.rungs):
            for name, limit in (("num_queries", num_queries), ("num_seeds", num_seeds)):
                if limit and getattr(rung, name) > limit:
                    yield At(f"search.rungs: {name} must be at most the sweep's {limit}, got {getattr(rung, name)}", "rungs", number)
        if self.scheduler == "asha":
            yield from self._problems_of_asha(own, [method for method in self.learning_rates if method not in strangers], is_known=self.objective in known)

    def _problems_of_asha(self, own: Mapping[str, Any], methods: Sequence[str], *, is_known: bool) -> Iterator[At]:
        """Stopping early pays where training costs more than looking at a step: for the user's own rules and for whole layers that learn."""
        for method in methods:
            spec = own.get(method)
            if spec is None or not (spec.code or (spec.weights in ("mlp", "all_linear") and not spec.is_bottom_up)):
                yield At(
                    f'search.scheduler: "asha" is for methods that yield step by step and whose training dominates: code of your own, or a variation of '
                    f'vanilla with weights = "all_linear" or "mlp"; {method!r} is none, and its steps are almost free: leave scheduler out',
                    "scheduler",
                )
        if is_known and self.objective not in _of_a_fold():
            yield At(
                f'search.objective: with scheduler = "asha" it must be known of a fold at each step: {", ".join(_of_a_fold())}; got {self.objective!r}',
                "objective",
            )
        if self.constraints:
            yield At('search.constraints: scheduler = "asha" stops by the objective alone: leave constraints out', "constraints")
        if self.sampler == "tpe":
            yield At(
                'search.sampler: with scheduler = "asha" all learning rates are asked for at once, and "tpe" learns nothing: set "random" or "grid"', "sampler"
            )

    @property
    def sign(self) -> float:
        """What the objective is multiplied by to be made small."""
        goal = self.goal or ("min" if self.objective.startswith(SMALLER_IS_BETTER) else "max")
        return 1.0 if goal == "min" else -1.0

    @property
    def bounds(self) -> tuple[Constraint, ...]:
        return tuple(map(Constraint.of, self.constraints))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric that judging a cell needs."""
        return tuple(dict.fromkeys((self.objective, *(bound.metric for bound in self.bounds))))


def _of_a_fold() -> tuple[str, ...]:
    from iclgd_dist.schema import FOLD, f64

    return tuple(name for name, kind, _ in FOLD if kind == f64)


def _judged() -> tuple[str, ...]:
    """Return the metrics of a cell that are known on a fold: those of the fold, and those of its layers that are."""
    from iclgd_dist.schema import POOLED, SIMILARITIES  # imports pyarrow, which most sweep files do not need

    return (*_of_a_fold(), *SIMILARITIES, *POOLED, "update_ratio", "relative_update", "update_norm")
