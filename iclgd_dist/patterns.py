"""Tasks that are generated in pairs: with an implicit pattern that makes the answer plain to see, and without it, in the same words.

Knows rules and hashes; reads nothing and draws nothing: row n of a task is the same for ever and everywhere.
Source: Yin et al. 2024 (arXiv 2410.04691): expressions with a vanishing term, Booleans with a constant, relations of cities, code with dead branches and
linear systems with dependent rows. Their data are not here: these are of the same kinds, with one word or digit for an answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

NUM_ROWS = 2_400  # of a task, before repeated ones are left out
DIGITS = {str(digit): str(digit) for digit in range(10)}
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}
CITIES = ("Paris", "Rome", "Cairo", "Lima", "Oslo", "Delhi", "Tokyo", "Berlin", "Madrid", "Lagos", "Boston", "Sydney", "Vienna", "Dublin", "Athens", "Seoul")
T = TypeVar("T")


@dataclass(frozen=True)
class _Die:
    """What chooses for one row: each choice is a hash of the task, the row and the number of the choice."""

    key: str

    def __call__(self, what: str, options: Sequence[T]) -> T:
        return options[int(hashlib.sha256(f"{self.key}:{what}".encode()).hexdigest(), 16) % len(options)]


@dataclass(frozen=True)
class Pattern:
    """One kind of task; `make(die, has_pattern, number)` returns text and label of a row. Labels take turns with the number."""

    make: Callable[[_Die, bool, int], tuple[str, str]]
    template: str
    words: dict[str, str]
    with_pattern: str  # what holds then
    without: str


def _expression(die: _Die, has_pattern: bool, turn: int) -> tuple[str, str]:
    value = turn % 10
    # a and b apart, c and d alike or apart by as little as brings the sum back into 0..9.
    for attempt in range(200):
        a, b, c = (die(f"{name}{attempt}", range(1, 10)) for name in "abc")
        d = c if has_pattern else die(f"d{attempt}", range(1, 10))
        rest = value - (a - b) * (c - d)
        if a != b and (c == d) == has_pattern and 0 <= rest <= 9:
            return f"({a} - {b}) * ({c} - {d}) + {rest}", str(value)
    raise AssertionError(f"no expression of value {value}")


def _boolean(die: _Die, has_pattern: bool, turn: int) -> tuple[str, str]:
    value = turn % 2 == 0
    for attempt in range(200):
        text, inner = "", False
        for place in range(5):
            truth, is_denied = die(f"term{place}.{attempt}", [(truth, is_denied) for truth in (True, False) for is_denied in (True, False)])
            operator = die(f"operator{place}.{attempt}", ("and", "or"))
            term, holds = f"(not {truth})" if is_denied else str(truth), truth != is_denied
            text, inner = (f"({text} {operator} {term})", _joined(inner, operator, holds)) if place else (term, holds)
        # With the pattern the constant that decides; without it the one that leaves the rest as it is.
        operator, constant = ("or" if value else "and", value) if has_pattern else die(f"last{attempt}", (("or", False), ("and", True)))
        if _joined(inner, operator, constant) == value:
            return f"({text} {operator} {constant})", str(value)
    raise AssertionError(f"no formula of value {value}")


def _joined(a: bool, operator: str, b: bool) -> bool:
    return a or b if operator == "or" else a and b


def _cities(die: _Die, has_pattern: bool, turn: int) -> tuple[str, str]:
    value = list(DIRECTIONS)[turn % 4]
    names: list[str] = []
    for place in range(4):
        names.append(die(f"city{place}", [city for city in CITIES if city not in names]))
    relations = [value] * 3
    if not has_pattern:
        other = die("other", [direction for direction in DIRECTIONS if direction not in (value, DIRECTIONS[value])])
        at = die("at", range(3))
        relations = [other, DIRECTIONS[other]]
        relations.insert(at, value)
    told = [f"{a} is {relation} of {b}." for a, relation, b in zip(names, relations, names[1:], strict=False)]
    return f"{' '.join(told)} From {names[3]}, {names[0]} is to the", value


def _code(die: _Die, has_pattern: bool, turn: int) -> tuple[str, str]:
    value = turn % 10
    other = die("other", [digit for digit in range(10) if digit != value])
    x = die("x", range(1, 9))
    is_dead = has_pattern or die("dead", (True, False))
    operator, bound = die("test", [(operator, bound) for operator in "><" for bound in range(10) if (x > bound if operator == ">" else x < bound) != is_dead])
    first, second = (value, other) if is_dead else (other, value)
    return f"x = {x}; y = {first}; y = {second} if x {operator} {bound} else y; print(y)", str(value)


def _system(die: _Die, has_pattern: bool, turn: int) -> tuple[str, str]:
    y = turn % 10
    a, b, x, factor = die("a", range(1, 6)), die("b", range(1, 6)), die("x", range(1, 10)), die("factor", range(2, 5))
    c, d = factor * a, factor * b
    if not has_pattern:
        c, d = die("second", [(c, d) for c in range(1, 21) for d in range(1, 21) if a * d != b * c])
    return f"{a} x + {b} y = {a * x + b * y}, {c} x + {d} y = {c * x + d * y}, x = {x}, so y =", str(y)


_TRUTH = {"True": "True", "False": "False"}
KINDS: dict[str, Pattern] = {
    "expressions": Pattern(_expression, "{text} =", DIGITS, "the product is 0, and the last number the answer", "the product is not 0"),
    "booleans": Pattern(_boolean, "{text} is", _TRUTH, "the constant at the end decides", "the constant at the end leaves the rest as it is"),
    "cities": Pattern(
        _cities, "{text}", {name: name for name in DIRECTIONS}, "one direction is named, and the answer", "two of three directions cancel each other"
    ),
    "code": Pattern(_code, "{text} Output:", DIGITS, "the branch is dead, and the first value of y the answer", "half of the branches are dead"),
    "systems": Pattern(_system, "{text}", DIGITS, "the second row is a multiple of the first", "the rows are independent"),
}
NAMES = tuple(f"{kind}_{how}" for kind in KINDS for how in ("pattern", "plain"))


def rows(name: str) -> Iterator[tuple[str, str]]:
    """Yield text and label of every row of a generated task, labels in turn."""
    kind, _, how = name.rpartition("_")
    for number in range(NUM_ROWS):
        yield KINDS[kind].make(_Die(f"{name}:{number}"), how == "pattern", number)


def origin(name: str) -> str:
    """Return what a generated task is, in one sentence."""
    kind, _, how = name.rpartition("_")
    pattern = KINDS[kind]
    return f"Generated {kind}: {pattern.with_pattern if how == 'pattern' else pattern.without} (of the kinds of arXiv 2410.04691)."
