"""Whether a store's texts and records are such as this version, or an older one, writes: a store may come from somebody else. Knows their shape, nothing of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pyarrow.compute as pc
from pydantic import BaseModel, TypeAdapter, ValidationError, model_validator

from iclgd_dist.store import Results, StoreError

REQUIRED = ("kind", "model", "task", "num_queries", "query_seed", "protocol")  # of every cell
OF_A_DRAW = ("num_demonstrations", "seed", "order")  # of every cell that is not zero-shot
OF_A_TRAINING = ("method", "learning_rate", "step", "train_on")


class _Protocol(BaseModel):
    preset: str = "clean"
    record_position: Literal["last_prompt", "label"] = "last_prompt"
    sink: str = "auto"
    sink_token: str | None = None
    separator: str = "newline"


class _Model(BaseModel):
    source: str
    init: str = "trained"
    init_scheme: str | None = None
    init_seeds: list[int] = []


class _Axes(BaseModel):
    runs: list[tuple[int, int]] | None = None


class _Analysis(BaseModel):
    smallest_effect: float = 0.0
    matched_ratio: float = 0.0


class _Sweep(BaseModel):
    """What the analysis reads of a resolved sweep; what older ones lack has a default."""

    name: str = ""
    tasks: list[str] = []
    models: list[_Model] = []
    seeds: list[int] = []
    orders: int = 1
    runs: list[tuple[int, int]] = []
    num_queries: int = 0
    query_seed: int = 0
    num_demonstrations: list[int] | int = 0
    per_task: dict[str, _Axes] = {}
    protocol: dict[str, Any] = {}
    protocols: list[dict[str, Any]] = []
    analysis: _Analysis = _Analysis()

    @model_validator(mode="after")
    def _is_whole(self) -> _Sweep:
        required = {"name", "models", "num_queries", "query_seed", "num_demonstrations", *(() if self.runs else ("seeds", "orders"))}
        if self.tasks and (lacking := required - self.model_fields_set):
            raise ValueError(f"lacks {', '.join(sorted(lacking))}")
        return self


def check(results: Results, sweeps: Sequence[Mapping[str, Any]], where: object) -> None:
    """Errors: StoreError for cells or sweeps that no version writes."""
    cells = results.cells
    for columns, kinds in ((REQUIRED, None), (OF_A_DRAW, ("icl", "finetuned")), (OF_A_TRAINING, ("finetuned",))):
        rows = cells if kinds is None else cells.filter(pc.is_in(cells["kind"], pc.cast(list(kinds), "string")))
        for column in columns:
            if rows[column].null_count:
                raise StoreError(f"is damaged: cells without {column}", where)
    years = pc.min_max(pc.year(cells["created_at"])).as_py().values()
    if any(year is not None and not 1 <= year <= 9999 for year in years):
        raise StoreError("is damaged: cells of a year beyond 9999 or before 1", where)
    for column, shape in (("protocol", _Protocol), ("method_options", dict[str, Any]), ("versions", dict[str, Any])):
        for text in pc.unique(cells[column].drop_null()).to_pylist():
            _validate(shape, text, f"{column} of a cell", where)
    for sweep in sweeps:
        _validate(_Sweep, json.dumps(sweep.get("resolved", {})), "a sweep", where)


def _validate(shape: Any, text: str, what: str, where: object) -> None:
    try:
        TypeAdapter(shape).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise StoreError(f"is damaged: {'.'.join([what, *map(str, first['loc'])])}: {first['msg']}", where) from None
