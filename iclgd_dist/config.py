"""The sweep file: TOML in, one frozen `Sweep` out, or one message that names every problem.

Knows names, ranges and defaults. Knows nothing of models, data, torch or Ray: a sweep file can be checked anywhere, in milliseconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictInt, ValidationError, ValidationInfo, field_validator

from iclgd_dist import patterns
from iclgd_dist.axes import (
    Analysis,
    At,
    Capture,
    Controls,
    Count,
    Measures,
    Name,
    Rates,
    Runs,
    Seed,
    Seeds,
    SweepError,
    TaskAxes,
    by_method,
    listed,
    refuse,
    taken,
    twice,
)
from iclgd_dist.complaints import OURS, Problem, misplaced, problems_of, unknown_key
from iclgd_dist.extensions import BUILTIN, METHODS, MethodSpec, MetricSpec
from iclgd_dist.model_spec import ModelSpec
from iclgd_dist.protocol import NUM_SEPARATE_ORDERS, Frozen, Protocol
from iclgd_dist.resources import Resources
from iclgd_dist.search_spec import Search
from iclgd_dist.task_spec import OwnTask
from iclgd_dist.toml_text import is_deep, line_of, not_toml, statements, unknown

EMBEDDED_TASKS = ("mr_snippets", "trec", "subj_snippets", "sst5_snippets", "bbc_news", "sms_spam")
GENERATED_TASKS = patterns.NAMES
HUB_TASKS = ("sst2", "sst5", "mr", "subj", "agnews", "cb", "trec_hub", "rte")
TASKS = (*EMBEDDED_TASKS, *GENERATED_TASKS, *HUB_TASKS)
MAX_CELLS_UNASKED = 100_000
MAX_FILE_BYTES = 1_000_000
MAX_PROBLEMS = 100  # told of one file


class Sweep(Frozen):
    """One question: every combination of the axes is a cell."""

    # What another field is checked against stands above it.
    folder: Path = Path()  # of the sweep file: what relative file names start from; not a key of the file
    name: Name
    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1)]
    task: tuple[OwnTask, ...] = ()
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    method: tuple[MethodSpec, ...] = ()
    metric: tuple[MetricSpec, ...] = ()
    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("vanilla", "layer_causal")
    runs: Runs = ()  # [seed, order] pairs, instead of every seed in every order
    seeds: Seeds = ()
    orders: Count = 1  # of each seed: 0 (as drawn) and permutations
    num_demonstrations: Annotated[tuple[Count, ...], Field(min_length=1)] = (16,)
    num_queries: Annotated[StrictInt, Field(ge=2)] = 200
    query_seed: Seed = 1
    steps: Annotated[tuple[Count, ...], Field(min_length=1)]
    controls: Controls = Controls()
    search: Search | None = None  # where `iclgd tune` looks for learning rates
    learning_rates: Rates = Field(default_factory=dict, validate_default=True)  # one list in the file holds for every method; may lack what [search] has
    per_task: dict[str, TaskAxes] = Field(default_factory=dict)  # [per_task.sst2] holds for that task alone
    protocol: Protocol = Protocol()
    protocols: tuple[Protocol, ...] = ()  # [[protocols]] instead of [protocol]: every cell under each of them
    measures: Measures = Measures()
    analysis: Analysis = Analysis()
    resources: Resources = Resources()
    capture: Annotated[Capture, Field(validate_default=True)] = Capture()
    warnings: tuple[str, ...] = ()  # found while reading; not a key of the file

    @field_validator("tasks", "methods", "num_demonstrations", "steps", "models", "task", "method", "metric", mode="before")
    @classmethod
    def _list_or_one(cls, value: Any) -> Any:
        return listed(value)

    @field_validator("models")
    @classmethod
    def _distinct(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        """Return each model once, and an untrained one once for each of its seeds."""
        seeded = (m.model_copy(update={"init_seeds": (seed,)}) if seed is not None else m for m in models for seed in m.init_seeds or (None,))
        return tuple(dict.fromkeys(seeded))

    @field_validator("task")
    @classmethod
    def _names_of_their_own(cls, own_tasks: tuple[OwnTask, ...]) -> tuple[OwnTask, ...]:
        refuse(At(f"{name!r} is the name of another task; choose one of its own", number, "name") for number, name in taken(own_tasks, TASKS))
        return own_tasks

    @field_validator("method", "metric")
    @classmethod
    def _code_is_there(cls, added: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        found, problems = [], []
        builtin = (*METHODS, "zero_shot", "icl", "in-context") if info.field_name == "method" else _columns() if added else ()
        problems += [At(f"{name!r} is the name of something else; choose one of its own", number, "name") for number, name in taken(added, builtin)]
        for number, each in enumerate(added):
            try:
                found.append(each.with_text(info.data["folder"]))
            except ValueError as error:
                problems.append(At(str(error), number, "code"))
        refuse(problems)
        return tuple(found)

    @field_validator("tasks", "methods")
    @classmethod
    def _known(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        what = "method" if info.field_name == "methods" else "task"
        if what in info.data:  # a faulty [[task]] or [[method]] may be the one that is meant
            builtin = METHODS if what == "method" else TASKS
            known = dict.fromkeys((*builtin, *(own.name for own in info.data[what])))
            refuse(At(unknown(what, name, known), number) for number, name in enumerate(names) if name not in known)
        return tuple(dict.fromkeys(names))

    @field_validator("num_demonstrations", "steps")
    @classmethod
    def _ascending(cls, values: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        if info.field_name == "steps":
            k = max(info.data.get("num_demonstrations", values))
            own = {method.name: method for method in info.data.get("method", ())}
            specs = [own.get(name) or BUILTIN[name] for name in info.data.get("methods", ()) if name in own or name in BUILTIN] or list(BUILTIN.values())
            most = max(specs, key=lambda spec: spec.num_updates(k))
            beyond = f"must lie in 1..{most.num_updates(k)} ({k} demonstrations / batch {most.batch_size} x {most.epochs} epoch{'s' * (most.epochs > 1)}), got"
            refuse(At(f"{beyond} {value}", number) for number, value in enumerate(values) if value > most.num_updates(k))
        return tuple(sorted(set(values)))

    @field_validator("controls")
    @classmethod
    def _known_control_task(cls, controls: Controls, info: ValidationInfo) -> Controls:
        known = (*TASKS, *(own.name for own in info.data.get("task", ())))
        if "task" in info.data and controls.control_task not in known:
            raise At(unknown("task", controls.control_task, known), "control_task")
        return controls

    @field_validator("search")
    @classmethod
    def _of_this_sweep(cls, search: Search | None, info: ValidationInfo) -> Search | None:
        seeds = {seed for seed, _ in info.data.get("runs", ())} or info.data.get("seeds", ())
        if search is not None:
            own = {method.name: method for method in info.data.get("method", ())}
            search.check(info.data.get("methods"), own=own, num_queries=info.data.get("num_queries"), num_seeds=len(seeds))
        return search

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _for_each_method(cls, value: Any, info: ValidationInfo) -> Any:
        known = _methods(info)
        strangers = [name for name in value if name not in known] if isinstance(value, dict) and "method" in info.data else []
        refuse(At(f"learning_rates: {unknown('method', name, known)}{misplaced(name, cls)}", name) for name in strangers)
        return by_method(value)

    @field_validator("learning_rates")
    @classmethod
    def _positive_rates(cls, lists: dict[str, tuple[float, ...]], info: ValidationInfo) -> dict[str, tuple[float, ...]]:
        refuse(_not_positive(lists, info, "learning_rates"))
        methods, search = info.data.get("methods", ()), info.data.get("search")
        lacking = [method for method in methods if method not in lists and "*" not in lists and not (search and method in search.learning_rates)]
        if lacking and not lists:
            raise ValueError("is required, got nothing")
        refuse(At(f"learning_rates.{method} is required, as {method!r} is one of the methods; got none") for method in lacking)
        return {method: tuple(sorted(set(lists.get(method) or lists.get("*", ())))) for method in methods}

    @field_validator("per_task")
    @classmethod
    def _of_tasks(cls, per_task: dict[str, TaskAxes], info: ValidationInfo) -> dict[str, TaskAxes]:
        tasks, general = info.data.get("tasks", tuple(per_task)), info.data.get("learning_rates", {})
        found = {}
        refuse(At(unknown("task", name, tasks), name) for name in per_task if name not in tasks)
        for name, axes in per_task.items():
            rates = axes.learning_rates
            if rates is not None:
                named, keys = f"per_task.{name}.learning_rates", (name, "learning_rates")
                refuse(At(f"{named}: {unknown('method', each, _methods(info))}", *keys, each) for each in rates if each not in (*_methods(info), "*"))
                refuse(_not_positive(rates, info, named, *keys))
                rates = {method: tuple(sorted(set(rates.get(method) or rates.get("*") or values))) for method, values in general.items()}
            found[name] = axes.model_copy(update={"learning_rates": rates})
        return found

    @field_validator("protocols")
    @classmethod
    def _one_axis(cls, protocols: tuple[Protocol, ...], info: ValidationInfo) -> tuple[Protocol, ...]:
        if protocols and info.data.get("protocol", Protocol()) != Protocol():
            raise ValueError("are instead of [protocol]: write each protocol as a [[protocols]] of its own")
        for number, protocol in enumerate(protocols):
            cls._enough_permutations(protocol, info, number)
        return tuple(dict.fromkeys(protocols))

    @field_validator("protocol")
    @classmethod
    def _permutations(cls, protocol: Protocol, info: ValidationInfo) -> Protocol:
        return cls._enough_permutations(protocol, info)

    @classmethod
    def _enough_permutations(cls, protocol: Protocol, info: ValidationInfo, *keys: int) -> Protocol:
        runs = [*info.data.get("runs", ()), *(run for axes in info.data.get("per_task", {}).values() for run in axes.runs or ())]
        seed = max((*info.data.get("seeds", ()), *(seed for seed, _ in runs)), default=0)
        order = max((info.data.get("orders", 1) - 1, *(order for _, order in runs)))
        if protocol.order_rule == "separate" and (order >= NUM_SEPARATE_ORDERS or seed >= 2**32):
            raise At(
                f'protocol.order_rule = "separate" has orders 0 to {NUM_SEPARATE_ORDERS - 1} and seeds below 2**32, got order {order}, seed {seed}',
                *keys,
                "order_rule",
            )
        return protocol

    @field_validator("capture")
    @classmethod
    def _keeps_what_is_crossed(cls, capture: Capture, info: ValidationInfo) -> Capture:
        if "measures" in info.data and info.data["measures"].orders and capture.keep == "none":
            raise At('capture.keep must be "final_step" or "all" where [measures] orders = true, got "none"', "keep")
        return capture

    @field_validator("measures")
    @classmethod
    def _several_orders(cls, measures: Measures, info: ValidationInfo) -> Measures:
        if not measures.orders:
            return measures
        seeds = Counter(seed for seed, _ in info.data.get("runs", ()))
        if {"runs", "orders"} <= info.data.keys() and info.data["orders"] < 2 and max(seeds.values(), default=1) < 2:
            raise At("measures.orders compares orders of the same seed, got one order for each; raise orders", "orders")
        protocols = (*info.data.get("protocols", ()), *([] if info.data.get("protocols") else [info.data.get("protocol", Protocol())]))
        if any(protocol.order_rule == "separate" for protocol in protocols):
            raise At('measures.orders needs [protocol] order_rule = "shared": "separate" trains in another order than the context shows', "orders")
        return measures

    def of_each_protocol(self) -> tuple[Sweep, ...]:
        """Return a sweep of one protocol for each of them."""
        return tuple(self.model_copy(update={"protocol": protocol, "protocols": ()}) for protocol in self.protocols) or (self,)

    def num_runs(self, task: str) -> int:
        return len(self._own(task).runs or self.runs) or len(self.seeds) * self.orders

    def runs_of(self, task: str) -> tuple[tuple[int, int], ...]:
        """Return the (seed, order) pairs of a task."""
        return self._own(task).runs or self.runs or tuple(product(self.seeds, range(self.orders)))

    def rates_of(self, task: str) -> dict[str, tuple[float, ...]]:
        """Return the learning rates of each method on a task."""
        return self._own(task).learning_rates or self.learning_rates

    def _own(self, task: str) -> TaskAxes:
        return self.per_task.get(task, TaskAxes())

    def control_task_of(self, task: str) -> str:
        """Return the task that `other_task` takes demonstrations from: never the task itself."""
        same = ("trec", "trec_hub") if task in ("trec", "trec_hub") else (task,)
        return next(name for name in (self.controls.control_task, "trec", "mr_snippets") if name not in same)

    def method_spec(self, name: str) -> MethodSpec:
        return next((own for own in self.method if own.name == name), None) or BUILTIN[name]

    def steps_of(self, method: str, num_demonstrations: int) -> list[int]:
        """Return the steps at which a method is probed: those that its updates reach."""
        return [step for step in self.steps if step <= self.method_spec(method).num_updates(num_demonstrations)]

    def own_task(self, name: str) -> OwnTask | None:
        return next((own for own in self.task if own.name == name), None)

    def resolved(self) -> dict[str, Any]:
        """Return the sweep with every default filled in, as plain JSON values."""
        return self.model_dump(mode="json", exclude={"folder": True, "warnings": True, "method": {"__all__": {"text"}}, "metric": {"__all__": {"text"}}})

    def digest(self) -> str:
        """Return 16 hex digits that name what is swept: the same for the same cells, whatever the file looks like and whatever runs it."""
        used = {*self.tasks, *(self.control_task_of(name) for name in self.tasks if self.controls.need_other_task)}
        values = self.resolved() | {"resources": None, "capture": None, "task": [own.model_dump() for own in self.task if own.name in used]}
        del values["search"], values["measures"]
        values |= {axis: sorted(values[axis], key=json.dumps) for axis in ("models", "task", "tasks", "methods")}
        values |= dict.fromkeys(("seeds", "orders", "learning_rates", "per_task"))
        values |= {"runs": {task: sorted(self.runs_of(task)) for task in self.tasks}, "rates": {task: self.rates_of(task) for task in self.tasks}}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file.

    Errors: SweepError naming the file, the line where there is one, what was required and what was got; all problems at once.
    """
    path = Path(path)
    text = _read(path)
    if is_deep(text):
        raise SweepError(f"{path}: is nested too deeply: a key has more than 100 parts")
    try:
        values = tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError is one, and so is what Python says of a number of thousands of digits
        raise SweepError(not_toml(path, text, str(error))) from None
    except RecursionError:
        raise SweepError(f"{path}: is nested too deeply") from None
    found: list[Problem] = [((name,), unknown_key((name,), Sweep)) for name in OURS if name in values]
    added = [(name, number, each) for name in ("method", "metric") if isinstance(values.get(name), list) for number, each in enumerate(values[name])]
    found += [((name, number, "text"), unknown_key((name, number, "text"), Sweep)) for name, number, each in added if isinstance(each, dict) and "text" in each]
    if "runs" not in values and "seeds" not in values:
        found.append(((), "seeds is required, got nothing"))
    if "runs" in values and (others := [name for name in ("seeds", "orders") if name in values]):
        found.append((("runs",), f"runs must stand alone: it takes the place of seeds and orders, got {' and '.join(others)} too"))
    try:
        sweep = Sweep.model_validate(values | {"folder": path.resolve().parent, "warnings": _warnings(values)})
    except ValidationError as error:
        found += problems_of(error.errors(), Sweep)
    if found:
        lines = list(statements(text))
        placed = sorted({(line_of(lines, keys), message) for keys, message in found[:MAX_PROBLEMS]})
        more = [f"{path}: and {len(found) - MAX_PROBLEMS:,} problems more"] if len(found) > MAX_PROBLEMS else []
        raise SweepError("\n".join([*(f"{path}:{line}: {message}" for line, message in placed), *more]))
    return sweep


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise SweepError(f"{path}: is {'a directory' if path.is_dir() else 'no regular file'}; a sweep file (.toml) is required")
        if (size := path.stat().st_size) >= MAX_FILE_BYTES:
            raise SweepError(f"{path}: a sweep file has less than {MAX_FILE_BYTES:,} bytes, got {size:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        others = [str(other) for folder in (path.parent, path.parent / "sweeps") for other in folder.glob("*.toml")]
        near = difflib.get_close_matches(str(path), others, n=1, cutoff=0.5)
        raise SweepError(f"{path}: no such file" + (f"; did you mean {near[0]}?" if near else "")) from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SweepError(f"{path}:{line}: must be UTF-8, got byte 0x{error.object[error.start]:02x}") from None
    except OSError as error:
        raise SweepError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise SweepError(f"{path}: is empty; see sweeps/demo.toml for an example")
    return text.replace("\r\n", "\n")


def _warnings(values: dict[str, Any]) -> tuple[str, ...]:
    """Return what may be a mistake: a value of a grid that is written twice (it is one cell), and what is asked for and not run."""
    rates = values.get("learning_rates")
    grids = {name: values.get(name) for name in ("models", "tasks", "methods", "num_demonstrations", "steps")}
    grids |= {f"learning_rates.{method}": grid for method, grid in rates.items()} if isinstance(rates, dict) else {"learning_rates": rates}
    controls = values.get("controls")
    grids["controls.train_on"] = controls.get("train_on") if isinstance(controls, dict) else None
    repeated = {name: twice(grid) for name, grid in grids.items() if isinstance(grid, list)}
    said = [f"{name}: {', '.join(twice)} is there more than once and counts once" for name, twice in repeated.items() if twice]
    methods = values.get("methods", ("vanilla", "layer_causal"))
    if isinstance(methods, list | tuple):
        own = [str(each.get("name")) for each in values.get("method", ()) if isinstance(each, dict)]
        said += [f"method {name!r} is not among methods and is not run" for name in own if name not in methods]
        said += [f"learning_rates.{name}: {name!r} is not among methods" for name in (rates if isinstance(rates, dict) else ()) if name not in methods]
    controls = values.get("controls", {})
    if isinstance(controls, dict) and controls.get("random_delta") is True and "true" not in listed(controls.get("train_on", "true")):
        said.append('controls.random_delta: is made for what was trained on the demonstrations; train_on lacks "true"')
    return tuple(said)


def _columns() -> tuple[str, ...]:
    """Return what a metric of one's own cannot be called."""
    from iclgd_dist.schema import EXAMPLE, LAYER, OUTCOME  # imports pyarrow, which most sweep files do not need

    return ("alpha", *(name for name, *_ in (*OUTCOME, *LAYER, *EXAMPLE)))


def _methods(info: ValidationInfo) -> tuple[str, ...]:
    return (*METHODS, *(own.name for own in info.data.get("method", ())))


def _not_positive(lists: dict[str, tuple[float, ...]], info: ValidationInfo, named: str, *keys: str) -> Iterator[At]:
    """Yield a problem for each learning rate that is negative, or 0 where that control is not asked for."""
    for method, rates in lists.items():
        for number, rate in enumerate(rates):
            if rate < 0 or (rate == 0 and "controls" in info.data and not info.data["controls"].zero_learning_rate):
                of_method = named if method == "*" else f"{named}.{method}"
                way_out = "; [controls] zero_learning_rate = true allows 0 as a control" if rate == 0 else ""
                yield At(f"{of_method} must be greater than 0, got {rate:g}{way_out}", *keys, method, number)
