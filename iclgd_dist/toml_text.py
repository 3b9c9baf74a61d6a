"""Where in a TOML text something stands, and sentences for what is wrong with it. Knows TOML's syntax; knows nothing of sweeps."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MAX_PARSED_CHARACTERS = 3_000_000  # to find a line: a second or so
_DEEP_KEY = re.compile(r"""(?:\.[ \t]*+(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+){100}""")
Statement = tuple[int, tuple[Any, ...], str]  # first line, keys that it sets, text


def is_deep(text: str) -> bool:
    """Say whether a dotted key has more than 100 parts: TOML's parser takes their number squared."""
    return _DEEP_KEY.search(text) is not None


def meant(got: str, known: Iterable[str], *, ending: str = "") -> str:
    """Return a question for the nearest name that is known, with an ending that all have; an empty text where none is near."""
    plain = {name.replace("_", "").replace("-", "").lower(): name for name in known}
    near = difflib.get_close_matches(got.replace("_", "").replace("-", "").lower(), plain, n=1, cutoff=0.6)
    return f"; did you mean {plain[near[0]] + ending!r}?" if near else ""


def unknown(what: str, got: str, known: Iterable[str], *, where: str = "") -> str:
    """Return the message for a name that is not known, with the nearest one that is."""
    return f"unknown {what} {got!r}{where}{meant(got, known)}; known: {', '.join(sorted(known))}"


def not_toml(path: Path, text: str, said: str) -> str:
    """Return TOML's complaint with line and column in front; a key that is set twice is named."""
    found = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", said, re.DOTALL)
    what, line, column = found.groups() if found else (said, "", "")
    if what == "Cannot overwrite a value":
        what = f"{text.splitlines()[int(line) - 1].split('=')[0].strip()} is set twice"
    return ":".join(filter(None, (str(path), line, column))) + f": is not TOML: {what}"


def line_of(statements: Iterable[Statement], keys: tuple[Any, ...]) -> int:
    """Return the line that sets what `keys` lead to, or as much of it as is there; TOML's parser does not tell."""
    keys, best, found = tuple(key for key in keys if key != "*"), 1, 0
    for line, path, statement in statements:
        shared = next((n for n, (a, b) in enumerate(zip(path, keys, strict=False)) if a != b), min(len(path), len(keys)))
        if shared > found:
            best, found = line, shared
            if shared == len(path) < len(keys) and isinstance(keys[shared], int):
                best += _lines_before(statement, keys[shared])
    return best


def statements(text: str) -> Iterator[Statement]:
    """Yield each header and each key that is set; the keys of [[table]] end in its number. Ends early where parsing line by line would take long."""
    table: tuple[Any, ...] = ()
    counts: dict[tuple[Any, ...], int] = {}
    first, lines, num_parsed = 1, text.split("\n"), 0
    for last in range(1, len(lines) + 1):
        statement = "\n".join(lines[first - 1 : last])
        num_parsed += len(statement)
        if num_parsed > MAX_PARSED_CHARACTERS:
            return
        try:
            value = tomllib.loads(statement)
        except tomllib.TOMLDecodeError:
            continue  # a value that goes on in the next line
        is_header = statement.lstrip().startswith("[")
        path = () if is_header else table
        while isinstance(value, dict) and len(value) == 1:
            ((name, value),) = value.items()
            path += (name,)
            if is_header and isinstance(value, list):
                counts[path] = counts.get(path, 0) + 1
            path += (counts[path] - 1,) if is_header and path in counts else ()
        table = path if is_header else table
        yield first, path, statement
        first = last + 1


def _lines_before(statement: str, item: int) -> int:
    """Return how many lines of `key = [...]` come before the one that holds an item of the list."""
    lines = statement.split("\n")
    for number in range(min(len(lines) - 1, MAX_PARSED_CHARACTERS // len(statement))):
        try:
            value = tomllib.loads("\n".join(lines[: number + 1]) + "\n]")
            while isinstance(value, dict):
                (value,) = value.values()
        except ValueError:  # not the end of an item (TOMLDecodeError is a ValueError), or no list
            continue
        if len(value) > item:
            return number
    return len(lines) - 1 if len(lines) * len(statement) <= MAX_PARSED_CHARACTERS else 0
