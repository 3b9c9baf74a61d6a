"""What pydantic finds wrong with a model, as sentences that say what was required and what was got. Knows pydantic; knows nothing of sweeps or of TOML."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from iclgd_dist.toml_text import unknown

OURS = ("folder", "warnings", "text")  # fields that no file sets
Problem = tuple[tuple[Any, ...], str]  # the keys that lead to it, and a sentence


def problems_of(details: list[Any], model: type[BaseModel]) -> Iterator[Problem]:
    """Yield each problem that pydantic found with values for a model."""
    for detail in details:
        # What holds a bad item also lacks it: pydantic then says that the list is too short.
        if detail["type"] != "too_short" or not detail["input"]:
            yield from _problems(detail, model)


def unknown_key(keys: tuple[Any, ...], model: type[BaseModel]) -> str:
    """Return the message for a key that a model, or what it holds, does not have."""
    if len(keys) == 1:
        return unknown("key", keys[0], _keys(model))
    named = ".".join(key for key in keys[:-1] if not isinstance(key, int))
    header = f"[[{named}]]" if isinstance(keys[-2], int) else f"[{named}]"
    return unknown("key", keys[-1], _keys(_section(keys[:-1], model)), where=f" in {header}") + misplaced(keys[-1], model)


def misplaced(name: str, model: type[BaseModel]) -> str:
    """Return what to add to the message for a key that would be known in another place."""
    return f" ({name} of the sweep itself must stand above the first [section])" if name in _keys(model) else ""


def _keys(model: type[BaseModel]) -> list[str]:
    return [name for name in model.model_fields if name not in OURS]


def _section(keys: tuple[Any, ...], model: type[BaseModel]) -> type[BaseModel]:
    """Return the model that keys lead to from another."""
    for key in keys:
        if key in model.model_fields:
            model = _model_in(model.model_fields[key].annotation) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _problems(detail: Any, model: type[BaseModel]) -> Iterator[Problem]:
    keys = tuple(detail["loc"])
    name = ".".join(str(key) for key in keys if not isinstance(key, int) and key != "*")
    if detail["type"] == "extra_forbidden":
        yield keys, unknown_key(keys, model)
    elif detail["type"] != "value_error":
        yield _problem(detail, keys, name)
    else:
        for error in getattr(detail["ctx"]["error"], "problems", [detail["ctx"]["error"]]):
            message = str(error)
            yield (*keys, *getattr(error, "keys", ())), message if message.startswith(("unknown", name)) else f"{name} {message}"


def _problem(detail: Any, keys: tuple[Any, ...], name: str) -> Problem:
    kind, given = detail["type"], detail.get("ctx", {})
    if kind == "missing":
        return keys[:-1], f"{name} is required, got nothing"
    if kind == "too_short":
        return keys, f"{name}: at least 1 is required, got none"
    is_item = isinstance(keys[-1], int)
    required = {
        "int_type": "whole numbers" if is_item else "a whole number",
        "float_type": "numbers" if is_item else "a number",
        "finite_number": "finite",
        "string_type": "text",
        "bool_type": "true or false",
        "dict_type": f"a table, [{name}]",
        "model_type": f"tables, [[{name}]]" if is_item else f"a table, [{name}]",
        "literal_error": given.get("expected"),
        "greater_than": f"greater than {given.get('gt')}",
        "greater_than_equal": f"at least {given.get('ge')}",
        "less_than": f"less than {given.get('lt')}",
        "less_than_equal": f"at most {given.get('le')}",
        "string_too_short": "text that is not empty",
        "string_pattern_mismatch": "at most 80 letters, digits, '_', '-' and '.', the first a letter or digit",
    }.get(kind, detail["msg"])
    got = detail["input"]
    shown = "a table" if isinstance(got, dict) else str(got).lower() if isinstance(got, bool) else repr(got)[:80]
    return keys, f"{name} must be {required}, got {shown}"
