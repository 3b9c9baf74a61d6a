"""Search for learning rates by ask and tell: each round asks a few for every study, runs them as blocks like any others, and tells what they scored on fold A.

A study is one method of one model, protocol, task and number of demonstrations. Nothing but the store remembers a search: asked again in the same order, it
answers known learning rates from there, so the same command resumes. Knows Optuna and rungs; nothing of Ray, nor of how a metric is read from the store.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import mean
from typing import Any

import numpy as np

from iclgd_dist.axes import Controls, Measures, SweepError, TaskAxes
from iclgd_dist.blocks import WORST, Block, Judged, single_lanes, with_cells
from iclgd_dist.config import Sweep
from iclgd_dist.encoding import Encoded
from iclgd_dist.model_spec import ModelSpec
from iclgd_dist.plan import Plan, make_plan
from iclgd_dist.protocol import Protocol
from iclgd_dist.search_spec import Rung, Search

DIGITS = 3  # of a learning rate that is asked for: its cells keep their keys, and people can read it
# Key -> metric -> value on fold A, for the cells that are there; None where it is undefined, as in a diverged cell.
Judge = Callable[[Sequence[str]], Mapping[str, Mapping[str, float | None]]]


@dataclass(frozen=True)
class Place:
    """Where a study looks: all methods of it train in the same blocks."""

    model: ModelSpec
    protocol: Protocol
    num_demonstrations: int
    task: str


@dataclass(frozen=True)
class Score:
    """What a learning rate came to at one step on some evidence; smaller is better. `violation` above 0: a constraint does not hold."""

    learning_rate: float
    step: int
    objective: float  # the metric itself, mean over seeds; NaN where it is undefined in one of them
    loss: float  # the objective, signed; infinite where it is undefined
    violation: float

    @property
    def order(self) -> tuple[bool, float, float, float, int]:
        """Feasible before infeasible, then by loss; of equal ones the smaller learning rate."""
        is_missed = self.violation > 0
        return (is_missed, self.violation if is_missed else 0.0, self.loss, self.learning_rate, self.step)


@dataclass
class Study:
    """One search: what was asked, and what it scored on each rung."""

    place: Place
    method: str
    search: Search
    number: int  # its sampler's own seed
    scores: list[dict[float, list[Score]]] = field(default_factory=list)  # rung -> learning rate -> its steps; none where it could not be computed
    keys: set[str] = field(default_factory=set)  # of all cells that were asked for, baselines included

    def __post_init__(self) -> None:
        self._ask = _sampler(self.search, self.method, self.number)
        next(self._ask)

    def ask(self) -> list[float]:
        """Return the learning rates of the next round on the first rung; none when all samples were asked for."""
        try:
            return self._ask.send([self.judged(found) for found in self.scores[0].values() if found])
        except StopIteration:
            return []

    def judged(self, found: Sequence[Score]) -> Score:
        """Return the score that stands for a learning rate: at its last step, or at its best one."""
        return max(found, key=lambda score: score.step) if self.search.step == "last" else min(found, key=lambda score: score.order)

    def ranking(self, rung: int) -> list[Score]:
        """Return what the learning rates of a rung scored, the best first; those that a scheduler stopped stand behind the others."""
        found = [self.judged(scores) for scores in self.scores[rung].values() if scores]
        last = max((score.step for score in found), default=0)
        return sorted(found, key=lambda score: (self.search.step == "last" and score.step < last, score.order))

    def promoted(self, rung: int) -> list[float]:
        """Return the learning rates that a rung evaluates: the best of the one below."""
        ranked = self.ranking(rung - 1)
        return sorted(score.learning_rate for score in ranked[: max(1, math.ceil(len(ranked) * self.search.keep))])

    @property
    def best(self) -> Score | None:
        """The best that holds all constraints, on the most evidence that there is: a search that was stopped has an empty rung. None where none does."""
        ranked = next((ranked for rung in reversed(range(len(self.scores))) if (ranked := self.ranking(rung))), [])
        found = [score for score in ranked if score.violation <= 0 and math.isfinite(score.loss)]
        return found[0] if found else None

    @property
    def mark(self) -> str:
        """What must be known before the best is believed; empty where it lies inside what was tried."""
        tried = [scores for scores in self.scores[0].values() if scores]
        if self.best is None:
            is_known = any(math.isfinite(score.loss) for scores in tried for score in scores)
            return "nothing was computed" if not tried else "none holds all constraints" if is_known else f"{self.search.objective} is defined nowhere"
        rates = sorted(scores[0].learning_rate for scores in tried)
        if self.best.learning_rate not in (rates[0], rates[-1]):
            return ""
        ends = self.search.learning_rates[self.method]
        away = min(abs(math.log(self.best.learning_rate / end)) for end in ends)  # beyond the best, what was not tried
        is_tried = len(rates) > 1 and away <= 0.5 * math.log(ends[1] / ends[0]) / len(rates)
        return "at the edge of its range: widen it" if is_tried else "nothing beyond it was tried: raise samples"


def rungs_of(sweep: Sweep) -> list[Rung]:
    """Return the rungs of a sweep's search; the last has all queries and all seeds."""
    assert sweep.search is not None
    whole = Rung(num_queries=sweep.num_queries, num_seeds=max(len(_seeds(sweep, task)) for task in sweep.tasks))
    return [*(rung for rung in sweep.search.rungs if rung != whole), whole]


def num_cells_at_most(sweep: Sweep) -> int:
    """Return how many finetuned cells a search evaluates if no two samples are the same."""
    assert sweep.search is not None
    num, rungs = 0, rungs_of(sweep)
    for study in studies_of(sweep):
        steps, samples = len(sweep.steps_of(study.method, study.place.num_demonstrations)), sweep.search.samples
        for rung in rungs:
            seeds = _seeds(sweep, study.place.task)[: rung.num_seeds]
            num += samples * steps * sum(seed in seeds for seed, _ in sweep.runs_of(study.place.task))
            samples = max(1, math.ceil(samples * sweep.search.keep))
    return num


def studies_of(sweep: Sweep) -> list[Study]:
    """Errors: SweepError where ASHA would compare one draw with another."""
    assert sweep.search is not None
    if sweep.search.scheduler == "asha" and (many := [task for task in sweep.tasks if len(sweep.runs_of(task)) > 1]):
        raise SweepError(
            f'[search] scheduler = "asha" compares trials of one draw: one seed and one order are required, {many[0]} has {len(sweep.runs_of(many[0]))}; '
            "search on one, then put what was found into [learning_rates] with all seeds"
        )
    protocols = sweep.protocols or (sweep.protocol,)
    places = [Place(*where) for where in product(sweep.models, protocols, sweep.num_demonstrations, sweep.tasks)]
    searched = [(place, method) for place in places for method in sweep.methods if method in sweep.search.learning_rates]
    return [Study(place, method, sweep.search, _number_of(place, method)) for place, method in searched]


def _number_of(place: Place, method: str) -> int:
    """Return the number that a study has in every sweep: one that is added, or comes first now, changes nothing of what the others ask."""
    named = [place.model.model_dump_json(exclude_defaults=True), place.protocol.model_dump_json(exclude_defaults=True)]
    return int(hashlib.sha256(json.dumps([*named, place.num_demonstrations, place.task, method]).encode()).hexdigest()[:8], 16)


def rounds(
    sweep: Sweep,
    studies: Sequence[Study],
    finished: Callable[[], set[str]],
    judge: Judge,
    run: Callable[[Plan, str], int],
    stopped: Callable[[], Collection[str]] = tuple,
) -> Iterator[int]:
    """Run a search to its end and yield the exit code of each round. A round that was stopped is the last one.

    `run` computes a plan's cells and returns an exit code; its second argument says in words which round it is. `stopped`: names of blocks that a scheduler
    stopped; they are not run again.
    """
    rungs = rungs_of(sweep)
    for number, rung in enumerate(rungs):
        for study in studies:
            study.scores.append({})
        turn = 0
        while wanted := {at: rates for at, study in enumerate(studies) if (rates := study.ask() if not number else study.promoted(number) if not turn else [])}:
            turn += 1
            whole, plan = _planned(sweep, rung, {at: (studies[at], rates) for at, rates in wanted.items()}, finished())
            if sweep.search and sweep.search.scheduler == "asha":
                plan = _one_by_one(sweep.search, plan, stopped(), sweep.steps, whole, judge)
            said = f"rung {number + 1} of {len(rungs)}: {rung.num_queries} queries, {rung.num_seeds} seeds; round {turn}"
            code = run(plan, said) if plan.blocks else 0
            _judge(studies, wanted, number, whole, judge)
            yield code


def _planned(sweep: Sweep, rung: Rung, wanted: Mapping[int, tuple[Study, list[float]]], finished: set[str]) -> tuple[dict[Place, list[Block]], Plan]:
    """Return the whole blocks of a round by place, and the plan of what is missing of them."""
    whole: dict[Place, list[Block]] = {}
    plans = []
    together: dict[tuple[Any, ...], dict[Place, dict[str, list[float]]]] = {}  # tasks of one model, protocol and k are one plan
    for study, rates in wanted.values():
        place = study.place
        together.setdefault((place.model, place.protocol, place.num_demonstrations), {}).setdefault(place, {})[study.method] = rates
    for rates_of in together.values():
        by_task = {place.task: whole.setdefault(place, []) for place in rates_of}

        def missing(block: Block, encoded: Encoded, by_task: Mapping[str, list[Block]] = by_task) -> Block | None:
            by_task[block.draw.task].append(block)
            cells = tuple(cell for cell in block.cells if cell.key not in finished)
            return with_cells(replace(block, origin="search"), cells, encoded) if cells else None

        plans.append(make_plan(_narrowed(sweep, rung, rates_of), choose=missing))
    joined = tuple(block for plan in plans for block in plan.blocks)
    return whole, replace(plans[0], blocks=joined).of_blocks()


def _one_by_one(search: Search, plan: Plan, stopped: Collection[str], steps: Sequence[int], whole: Mapping[Place, Sequence[Block]], judge: Judge) -> Plan:
    """Return the plan with a block for each learning rate, which reports what it is judged by, and knows what is there already of the same study.

    Left out are those that were stopped before and whose first step is still there: what was forgotten, or set aside, is asked for again.
    """
    kept: list[Block] = []
    figures = judge([cell.key for blocks in whole.values() for block in blocks for cell in block.cells])

    def judged(lane: Block) -> Judged:
        (method, train_on), place = lane.trained()[0], (lane.spec, lane.protocol, lane.draw)
        cells = next(block.cells for blocks in whole.values() for block in blocks if (block.spec, block.protocol, block.draw) == place)
        known = []
        for cell in cells:
            if cell.key in figures and (cell.method, cell.train_on) == (method, train_on) and cell.learning_rate is not None and cell.step is not None:
                value = figures[cell.key][search.objective]
                known.append((cell.learning_rate, cell.step, WORST if value is None else search.sign * value))
        return Judged(search.objective, search.sign, search.reduction_factor, tuple(steps), tuple(sorted(known)))

    for block in plan.blocks:
        lanes = single_lanes(block)
        first = {lane.name: min((cell.step for cell in lane.cells if cell.step is not None), default=0) for lane in lanes}
        run = [lane for lane in lanes if lane.name not in stopped or first[lane.name] <= min(steps)]
        baselines = tuple(cell for cell in block.cells if cell.kind != "finetuned")
        if baselines and lanes[0] not in run:  # they ride with the first
            run = [replace(run[0], cells=(*baselines, *run[0].cells)), *run[1:]] if run else [replace(block, cells=baselines)]
        kept += [replace(lane, judged=judged(lane)) if lane.trained() else lane for lane in run]
    return replace(plan, blocks=tuple(kept)).of_blocks()


def _narrowed(sweep: Sweep, rung: Rung, rates_of: Mapping[Place, Mapping[str, list[float]]]) -> Sweep:
    """Return the sweep of some tasks with these learning rates, on a rung's evidence. Controls are for what is reported: `iclgd measure` adds them."""
    place = next(iter(rates_of))
    methods = tuple(dict.fromkeys(method for rates in rates_of.values() for method in rates))
    axes = {}
    for where, rates in rates_of.items():
        seeds = _seeds(sweep, where.task)[: rung.num_seeds]
        runs = tuple(run for run in sweep.runs_of(where.task) if run[0] in seeds)
        axes[where.task] = TaskAxes(runs=runs, learning_rates={method: tuple(rates.get(method, ())) for method in methods})
    narrow: dict[str, Any] = {"models": (place.model,), "protocol": place.protocol, "protocols": (), "tasks": tuple(axes), "methods": methods}
    narrow |= {
        "num_demonstrations": (place.num_demonstrations,),
        "steps": tuple(step for step in sweep.steps if any(step in sweep.steps_of(method, place.num_demonstrations) for method in methods)),
    }
    narrow |= {"num_queries": rung.num_queries, "per_task": axes, "learning_rates": dict.fromkeys(methods, ())}
    return sweep.model_copy(update=narrow | {"controls": Controls(control_task=sweep.controls.control_task), "measures": Measures()})


def _seeds(sweep: Sweep, task: str) -> list[int]:
    return list(dict.fromkeys(seed for seed, _ in sweep.runs_of(task)))


def _judge(studies: Sequence[Study], wanted: Mapping[int, list[float]], rung: int, whole: Mapping[Place, list[Block]], judge: Judge) -> None:
    """Read what a round's cells scored and write it into their studies."""
    figures = judge([cell.key for blocks in whole.values() for block in blocks for cell in block.cells])
    for at, rates in wanted.items():
        study = studies[at]
        blocks = whole[study.place]
        study.keys |= {cell.key for block in blocks for cell in block.cells if cell.method in (None, study.method)}
        for rate in rates:
            study.scores[rung][rate] = list(_scores(study, rate, blocks, figures))


def _scores(study: Study, rate: float, blocks: Sequence[Block], figures: Mapping[str, Mapping[str, float | None]]) -> Iterator[Score]:
    """Yield the score of each step of a learning rate whose cells are all there: means over the seeds of means over their orders."""
    search = study.search
    for step in blocks[0].steps(study.method):
        found: dict[int, list[tuple[float, ...]]] = {}
        for block in blocks:
            key = next(c.key for c in block.cells if (c.method, c.learning_rate, c.step) == (study.method, rate, step))
            baselines = {cell.kind: cell.key for cell in block.cells if cell.kind != "finetuned"}
            if not {key, *baselines.values()} <= figures.keys():
                return  # one of them could not be computed
            line = [_number(figures[key][search.objective])]
            for bound in search.bounds:
                limit = figures[baselines[bound.bound]][bound.metric] if isinstance(bound.bound, str) else bound.bound
                line.append(bound.violation(_number(figures[key][bound.metric]), _number(limit)))
            found.setdefault(block.seed, []).append(tuple(line))
        of_seeds = [[mean(column) for column in zip(*lines, strict=True)] for lines in found.values()]
        objective, *violations = [mean(column) for column in zip(*of_seeds, strict=True)]
        is_missed = [math.inf if math.isnan(violation) else violation for violation in violations]
        loss = math.inf if math.isnan(objective) else search.sign * objective
        yield Score(rate, step, objective, loss, max(is_missed, default=0.0))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _sampler(search: Search, method: str, number: int) -> Generator[list[float], Sequence[Score], None]:
    """Yield learning rates, a round at a time; what is sent is every score so far. The first thing yielded is nothing."""
    lowest, highest = search.learning_rates[method]
    span = math.log(highest / lowest)
    random = np.random.default_rng((search.seed, number))

    def rates(places: Sequence[float]) -> list[float]:
        return sorted({float(f"{lowest * math.exp(span * place):.{DIGITS - 1}e}") for place in places})

    told: Sequence[Score] = yield []
    per_round = search.samples if search.scheduler == "asha" else search.per_round  # which compares those of one round
    count = min(per_round, search.samples)
    if search.sampler == "grid":
        places = np.linspace(0, 1, search.samples).tolist() if search.samples > 1 else [0.5]
        for first in range(0, search.samples, per_round):
            told = yield rates(places[first : first + per_round])
        return
    # The first round covers the range evenly, with a place of its own for each sampler's seed.
    told = yield rates([(n + random.random()) / count for n in range(count)])
    suggest = _tpe(search, lowest, highest, number) if search.sampler == "tpe" else None
    num_asked = count
    while count := min(per_round, search.samples - num_asked):
        told = yield suggest(told, count, num_asked) if suggest else rates([random.random() for _ in range(count)])
        num_asked += count


def check_sampler(search: Search) -> None:
    """Errors: SweepError where the sampler needs a package that is not installed."""
    if search.sampler == "tpe" and importlib.util.find_spec("optuna") is None:
        raise SweepError('[search] sampler = "tpe" needs Optuna: pip install \'iclgd-dist[search]\', or set sampler = "random"')


def _tpe(search: Search, lowest: float, highest: float, number: int) -> Callable[[Sequence[Score], int, int], list[float]]:
    check_sampler(search)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space: dict[str, Any] = {"learning_rate": optuna.distributions.FloatDistribution(lowest, highest, log=True)}

    def suggest(told: Sequence[Score], count: int, num_asked: int) -> list[float]:
        # Made anew from all that is known: what a study would remember beside it is nothing that a resumed search, or one of more samples, could not know.
        seed = int(np.random.default_rng((search.seed, number, num_asked)).integers(2**31))
        constraints = (lambda trial: (0.0,)) if search.constraints else None  # of no trial: all are told with theirs
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=1, constant_liar=True, constraints_func=constraints))
        for score in told:
            made = {"learning_rate": min(max(score.learning_rate, lowest), highest)}
            study.add_trial(optuna.trial.create_trial(params=made, distributions=space, value=score.loss, system_attrs={"constraints": (score.violation,)}))
        asked = [study.ask(space).params["learning_rate"] for _ in range(count)]
        return sorted({float(f"{rate:.{DIGITS - 1}e}") for rate in asked})

    return suggest
