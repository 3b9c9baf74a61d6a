"""The sweep file: TOML in, one frozen `Sweep` out, or one message that names every problem.

Knows names, ranges and defaults. Knows nothing of models, data, torch or Ray: a sweep file can be checked anywhere, in milliseconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError, field_validator, model_validator

EMBEDDED_TASKS = ("mr_snippets", "trec", "subj_snippets", "sst5_snippets", "bbc_news", "sms_spam")
HUB_TASKS = ("sst2", "sst5", "mr", "subj", "agnews", "cb", "trec_hub", "rte")
METHOD_VERSIONS = {"vanilla": 1, "layer_causal": 1}  # raised when a method's numbers change; part of a cell's key
METHODS = tuple(METHOD_VERSIONS)
MAX_CELLS_UNASKED = 100_000
MAX_FILE_BYTES = 1_000_000

DType = Literal["float64", "float32", "bfloat16", "float16"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]


class SweepError(ValueError):
    """A sweep, or something it names, cannot be used as it stands. The command line prints it and exits with 2."""


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSpec(Frozen):
    """Where a model comes from and the dtypes it is kept and computed in."""

    source: Annotated[str, Field(min_length=1)]  # hub id, directory, .gguf file or pkg://package/file.gguf
    revision: str | None = None  # hub only: branch, tag or commit
    storage_dtype: DType | None = None  # weights are rounded to it; None = as stored in the files
    compute_dtype: DType = "float32"


class Protocol(Frozen):
    """How prompts are built and where states are recorded. Every switch is part of a cell's key."""

    preset: Literal["clean"] = "clean"
    sink: Literal["auto", "bos", "eos"] = "auto"  # the one token every sequence starts with; auto = bos, else eos
    separator: Literal["newline", "eos", "none"] = "newline"  # after the sink and after each demonstration


class Controls(Frozen):
    zero_learning_rate: StrictBool = False  # allow learning rate 0: the control that must change nothing


class Analysis(Frozen):
    """Fixed before the run: the smallest difference that matters, and the update ratio at which methods are compared."""

    smallest_effect: Annotated[float, Field(gt=0)] = 0.02
    matched_ratio: Annotated[float, Field(gt=0)] = 0.5


class Resources(Frozen):
    """What one actor needs, and how it packs its work. None of it is part of a cell's key."""

    cpus_per_actor: Annotated[StrictInt, Field(ge=1)] = 1
    gpus_per_actor: Annotated[StrictInt, Field(ge=0)] = 0
    max_actors: Annotated[StrictInt, Field(ge=1)] | None = None  # None = as many as fit the cluster
    device_map: Literal["auto", "balanced", "sequential", "cpu", "disk"] = "auto"
    max_memory: dict[str, str] = Field(default_factory=dict)  # per device, e.g. {"0" = "70GiB", "cpu" = "100GiB"}
    tokens_per_batch: Annotated[StrictInt, Field(ge=1)] = 4096  # padded tokens of one micro-batch, over all lanes


class OwnTask(Frozen):
    """A labelled file of the user's: one row per example, a template, one word per label."""

    name: Name
    file: str  # .csv, .tsv, .jsonl or .parquet; relative to the sweep file
    query_file: str | None = None  # None = the rows of `file` are split by the hash of their text
    template: str  # e.g. "Review: {text} Sentiment:"; fields in braces are columns
    label_field: str = "label"
    labels: dict[str, str]  # value in the data -> word the model predicts

    @field_validator("template")
    @classmethod
    def _has_a_field(cls, template: str) -> str:
        if not re.search(r"\{[^{}]+\}", template):
            raise ValueError("must hold at least one {column}")
        return template

    @field_validator("labels")
    @classmethod
    def _two_words(cls, labels: dict[str, str]) -> dict[str, str]:
        words = [word.strip() for word in labels.values()]
        if len(words) < 2:
            raise ValueError(f"must name at least 2 labels, got {len(words)}")
        if "" in words or len(set(words)) < len(words):
            raise ValueError(f"must map each label to its own non-empty word, got {list(labels.values())}")
        return labels


class Sweep(Frozen):
    """One question: every combination of the axes is a cell."""

    name: Name
    models: Annotated[tuple[ModelSpec, ...], Field(min_length=1)]
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    methods: Annotated[tuple[str, ...], Field(min_length=1)] = METHODS
    seeds: Annotated[tuple[StrictInt, ...], Field(min_length=1)]
    orders: Annotated[StrictInt, Field(ge=1)] = 1
    num_demonstrations: Annotated[tuple[StrictInt, ...], Field(min_length=1)] = (16,)
    num_queries: Annotated[StrictInt, Field(ge=2)] = 200
    query_seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 1
    steps: Annotated[tuple[StrictInt, ...], Field(min_length=1)]
    learning_rates: dict[str, tuple[float, ...]]
    protocol: Protocol = Protocol()
    controls: Controls = Controls()
    analysis: Analysis = Analysis()
    resources: Resources = Resources()
    task: tuple[OwnTask, ...] = ()
    folder: Path = Path()  # of the sweep file: what relative file names start from; not a key of the file
    warnings: tuple[str, ...] = ()  # found while reading; not a key of the file

    @field_validator("tasks", "methods", "seeds", "num_demonstrations", "steps", "models", mode="before")
    @classmethod
    def _list_or_one(cls, value: Any) -> Any:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        for seed in seeds:
            if not 0 <= seed < 2**63:
                raise ValueError(f"must lie in 0..2**63-1, got {seed}")
        if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
            raise ValueError(f"must be distinct, got {repeated} more than once")
        return seeds

    @field_validator("num_demonstrations", "steps")
    @classmethod
    def _positive(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if bad := [value for value in values if value < 1]:
            raise ValueError(f"must be at least 1, got {bad[0]}")
        return tuple(sorted(set(values)))

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            if method not in METHODS:
                raise ValueError(unknown("method", method, METHODS))
        return tuple(dict.fromkeys(methods))

    @field_validator("learning_rates", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        lists = value if isinstance(value, dict) else {"*": value}
        for name, rates in lists.items():
            for rate in rates if isinstance(rates, list | tuple) else [rates]:
                if isinstance(rate, bool) or not isinstance(rate, int | float):
                    raise ValueError(f"must be numbers, got {rate!r}" + (f" for {name}" if name != "*" else ""))
        return {name: rates if isinstance(rates, list | tuple) else [rates] for name, rates in lists.items()}

    @model_validator(mode="after")
    def _together(self) -> Sweep:
        tasks = (*EMBEDDED_TASKS, *HUB_TASKS, *(own.name for own in self.task))
        for own in self.task:
            if own.name in (*EMBEDDED_TASKS, *HUB_TASKS):
                raise ValueError(f"[[task]] name {own.name!r} is taken by a built-in task; choose another")
        for task in self.tasks:
            if task not in tasks:
                raise ValueError(unknown("task", task, tasks))
        if max(self.steps) > max(self.num_demonstrations):
            k = max(self.num_demonstrations)
            raise ValueError(f"steps must lie in 1..{k} ({k} demonstrations / batch 1 x 1 epoch), got {max(self.steps)}")
        rates = self.learning_rates
        rates = dict.fromkeys(self.methods, rates["*"]) if "*" in rates else rates
        for method in rates:
            if method not in METHODS:
                raise ValueError(f"learning_rates: {unknown('method', method, METHODS)}")
        for method in self.methods:
            if not rates.get(method):
                raise ValueError(f"learning_rates for {method!r}: at least one is required, got none")
            for rate in rates[method]:
                if not math.isfinite(rate) or rate < 0:
                    raise ValueError(f"learning_rates for {method!r}: must be finite and positive, got {rate}")
                if rate == 0 and not self.controls.zero_learning_rate:
                    raise ValueError("learning rate 0 changes nothing: set [controls] zero_learning_rate = true to run it as a control")
        # Grid values are sorted and distinct, so that the same grid written twice is the same grid.
        object.__setattr__(self, "learning_rates", {m: tuple(sorted({float(r) for r in rates[m]})) for m in self.methods})
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        return self

    def own_task(self, name: str) -> OwnTask | None:
        return next((own for own in self.task if own.name == name), None)

    def resolved(self) -> dict[str, Any]:
        """Return the sweep with every default filled in, as plain JSON values."""
        return self.model_dump(mode="json", exclude={"folder", "warnings"})

    def digest(self) -> str:
        """Return 16 hex digits that name what is swept: the same for the same meaning, whatever the file looks like."""
        return hashlib.sha256(json.dumps(self.resolved(), sort_keys=True).encode()).hexdigest()[:16]


def unknown(what: str, got: str, known: tuple[str, ...] | list[str]) -> str:
    """Return the message for a name that is not known, with the nearest one that is."""
    near = difflib.get_close_matches(got.lower().replace("-", "").replace("_", ""), [k.replace("_", "") for k in known], n=1, cutoff=0.6)
    meant = next((f"; did you mean {k!r}?" for k in known if near and k.replace("_", "") == near[0]), "")
    return f"unknown {what} {got!r}{meant} known: {', '.join(sorted(known))}" if meant else f"unknown {what} {got!r}; known: {', '.join(sorted(known))}"


def load_sweep(path: str | Path) -> Sweep:
    """Read and check a sweep file.

    Errors: SweepError naming the file, the line where there is one, what was required and what was got; all problems at once.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise SweepError(f"{path}: is a directory; a sweep file (.toml) is required")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SweepError(f"{path}: a sweep file is at most {MAX_FILE_BYTES:,} bytes, got {path.stat().st_size:,}")
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise SweepError(f"{path}: no such file" + _near_file(path)) from None
    except UnicodeDecodeError as error:
        raise SweepError(f"{path}: must be UTF-8, got byte 0x{error.object[error.start]:02x} at offset {error.start}") from None
    except OSError as error:
        raise SweepError(f"{path}: cannot be read: {error.strerror}") from None
    if not text.strip():
        raise SweepError(f"{path}: is empty; see sweeps/demo.toml for an example")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SweepError(f"{path}: is not TOML: {error}") from None
    except RecursionError:
        raise SweepError(f"{path}: is nested too deeply") from None
    problems = _forbidden(values, {"folder", "warnings"})
    try:
        sweep = Sweep.model_validate(values | {"folder": path.resolve().parent, "warnings": _duplicates(values)})
    except ValidationError as error:
        problems += [_sentence(detail, values) for detail in error.errors()]
    if problems:
        raise SweepError("\n".join(f"{path}:{_line(text, keys)}: {message}" for keys, message in dict.fromkeys(problems)))
    return sweep


def _near_file(path: Path) -> str:
    others = [str(other) for other in path.parent.glob("*.toml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(str(path), others, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _forbidden(values: dict[str, Any], names: set[str]) -> list[tuple[tuple[Any, ...], str]]:
    return [((name,), _unknown_key((name,), name)) for name in values if name in names]


def _duplicates(values: dict[str, Any]) -> tuple[str, ...]:
    """Return a warning for each grid value that is written twice: it is one cell."""
    found = []
    rates = values.get("learning_rates", [])
    lists = rates if isinstance(rates, dict) else {"": rates}
    named = {f"learning_rates{'.' if m else ''}{m}": r for m, r in lists.items()} | {key: values.get(key) for key in ("steps", "num_demonstrations", "tasks")}
    for name, grid in named.items():
        if isinstance(grid, list) and (twice := sorted({str(v) for v in grid if grid.count(v) > 1})):
            found.append(f"{name}: {', '.join(twice)} is there more than once and counts once")
    return tuple(found)


def _fields(keys: tuple[Any, ...]) -> list[str]:
    """Return the keys that are known at the place in the file that `keys` leads to."""
    model: Any = Sweep
    sections = {"models": ModelSpec, "protocol": Protocol, "controls": Controls, "analysis": Analysis, "resources": Resources, "task": OwnTask}
    if len(keys) > 1 and keys[0] in sections:
        model = sections[keys[0]]
    return [name for name in model.model_fields if name not in ("folder", "warnings")]


def _unknown_key(keys: tuple[Any, ...], name: str) -> str:
    where = f" in [{keys[0]}]" if len(keys) > 1 else ""
    return unknown("key", name, _fields(keys)) + where


def _sentence(detail: Any, values: dict[str, Any]) -> tuple[tuple[Any, ...], str]:
    keys = tuple(detail["loc"])
    name = ".".join(str(key) for key in keys if not isinstance(key, int))
    if detail["type"] == "extra_forbidden":
        return keys, _unknown_key(keys, str(keys[-1]))
    if detail["type"] == "missing":
        return keys[:-1], f"{name} is required, got nothing"
    if detail["type"] == "value_error":
        message = str(detail["ctx"]["error"])
        return keys, f"{name} {message}" if name and not message.startswith(("unknown", name)) else message
    got = detail["input"]
    shown = f", got {got!r}" if not isinstance(got, dict) else ""
    return keys, f"{name}: {detail['msg'][0].lower()}{detail['msg'][1:]}{shown[:200]}"


def _line(text: str, keys: tuple[Any, ...]) -> int:
    """Return the line on which the last of `keys` is set (1 where it is not): TOML's parser does not tell."""
    lines, start = text.splitlines(), 0
    names = [str(key) for key in keys if not isinstance(key, int)]
    if names and any(isinstance(key, int) for key in keys[:2]):
        headers = [n for n, line in enumerate(lines) if re.match(rf"\s*\[\[\s*{re.escape(names[0])}\s*\]\]", line)]
        position = next(key for key in keys if isinstance(key, int))
        start = headers[position] if position < len(headers) else 0
    for name in reversed(names):
        pattern = rf"\s*(\[+\s*)?(\"?{re.escape(name)}\"?)\s*(=|\]|\.)"
        for number, line in enumerate(lines[start:], start + 1):
            if re.match(pattern, line):
                return number
    return 1
