"""Ways to damage bytes, texts and JSON, by a seeded generator. Knows formats of headers; knows nothing of who reads them."""

from __future__ import annotations

import copy
import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

EXTREME = [0, 1, 2, 3, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**53, 2**60, 2**63 - 1, 2**63, 2**64 - 1]
NUMBERS = ["0", "-1", "1e400", "-0.0", "1e-400", "NaN", "9" * 20, "9" * 5000, "0.5", "4294967296", "1152921504606846976", "true", "null", '""', "[]", "{}"]
STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    0.5,
    -1.5,
    1e308,
    2**31,
    2**60,
    2**63,
    -(2**63),
    "",
    "x",
    "\0",
    "../x",
    "/etc/passwd",
    "\ud83d\ude00" * 3,
    [],
    {},
]
STRANGE += [[[]], {"a": {}}, ["x"] * 3, [1, 2], "9" * 300, "a" * 3000, float("inf"), float("nan"), ["", None]]
Mutation = Callable[[bytes, random.Random], bytes]


def strange(choose: random.Random) -> Any:
    return copy.deepcopy(choose.choice(STRANGE))


def span(data: bytes, choose: random.Random) -> tuple[int, int]:
    """Return where a piece of some bytes begins and ends: mostly short, and near the ends as often as anywhere."""
    length = min(len(data), choose.choice([1, 2, 4, 8, 16, 64, 300, choose.randint(0, len(data))]))
    start = choose.choice([0, len(data) - length, choose.randint(0, len(data) - length), min(choose.randint(0, 64), len(data) - length)])
    return start, start + length


def flip(data: bytes, choose: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(choose.choice([1, 1, 1, 2, 8])):
        if found:
            found[choose.choice([choose.randrange(len(found)), choose.randrange(min(64, len(found))), -1 - choose.randrange(min(64, len(found)))])] ^= (
                1 << choose.randrange(8)
            )
    return bytes(found)


def cut(data: bytes, choose: random.Random) -> bytes:
    return data[: choose.randint(0, len(data))] if choose.random() < 0.7 else data[span(data, choose)[0] :]


def insert(data: bytes, choose: random.Random) -> bytes:
    place = span(data, choose)[0]
    return data[:place] + choose.choice([choose.randbytes(choose.randint(1, 40)), b"\0" * 8, b"\xff" * 8, b"[" * 3000, b"\n", b"\r", b'"']) + data[place:]


def delete(data: bytes, choose: random.Random) -> bytes:
    start, end = span(data, choose)
    return data[:start] + data[end:]


def double(data: bytes, choose: random.Random) -> bytes:
    start, end = span(data, choose)
    return data[:end] + data[start:end] * choose.choice([1, 1, 2, 50]) + data[end:]


def move(data: bytes, choose: random.Random) -> bytes:
    (start, end), place = span(data, choose), span(data, choose)[0]
    rest = data[:start] + data[end:]
    return rest[:place] + data[start:end] + rest[place:]


def blank(data: bytes, choose: random.Random) -> bytes:
    start, end = span(data, choose)
    return data[:start] + choose.choice([b"\0", b"\xff", b" ", b"0"]) * (end - start) + data[end:]


def extreme(data: bytes, choose: random.Random) -> bytes:
    """Put an extreme number in the place of four or eight bytes."""
    form = choose.choice(["<Q", "<I", ">I"])
    number = choose.choice(EXTREME) % 2 ** (8 * struct.calcsize(form))
    place = span(data, choose)[0]
    return data[:place] + struct.pack(form, number) + data[place + struct.calcsize(form) :]


def renumber(data: bytes, choose: random.Random) -> bytes:
    """Put another number in the place of one that is written out."""
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?(?:e-?\d+)?", data))
    if not found:
        return flip(data, choose)
    match = choose.choice(found)
    return data[: match.start()] + choose.choice(NUMBERS).encode() + data[match.end() :]


ANY: tuple[Mutation, ...] = (flip, flip, flip, cut, insert, delete, double, move, blank, extreme, renumber)


def some_of(data: bytes, choose: random.Random, ways: tuple[Mutation, ...] = ANY) -> bytes:
    for _ in range(choose.choice([1, 1, 1, 2, 4])):
        data = choose.choice(ways)(data, choose)
    return data


def alter(value: Any, choose: random.Random) -> Any:
    """Return JSON with one node gone, renamed, of another kind, deeply nested, or extreme. `value` may be changed."""
    places: list[tuple[Any, Any]] = []
    stack = [value]
    while stack:
        node = stack.pop()
        for key in list(node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()):
            places.append((node, key))
            stack.append(node[key])
    if not places:
        return strange(choose)
    shallow = places[:40] if choose.random() < 0.6 else places  # else a long list gets all of them
    node, key = choose.choice(shallow)
    match choose.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[choose.choice(["", "x", "__class__", str(key) * 2, f"{key}\0"])] = node.pop(key)
        case 2:
            deep: Any = []
            for _ in range(choose.choice([3, 100, 900])):
                deep = choose.choice([[deep], {"a": deep}])
            node[key] = deep
        case 3:
            other, there = choose.choice(places)
            node[key] = other[there] if other is not node and not isinstance(other[there], list | dict) else strange(choose)
        case _:
            node[key] = strange(choose)
    return value


def as_json(data: bytes, choose: random.Random) -> bytes:
    """Damage JSON: mostly as what it means, else as bytes."""
    if choose.random() < 0.25:
        return some_of(data, choose)
    if choose.random() < 0.03:
        return choose.choice([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'"' + b"a" * 100_000 + b'"', b""])
    value = json.loads(data)
    for _ in range(choose.choice([1, 1, 2, 3])):
        value = alter(value, choose)
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return data[:-1] + b"[" * 900 + b"]" * 900 + data[-1:]


def of_safetensors(data: bytes, choose: random.Random) -> bytes:
    """Damage the header of a safetensors file: its length, or its JSON under a length that is right."""
    if choose.random() < 0.3:
        return some_of(data[: 8 + 3000], choose) + data[8 + 3000 :] if choose.random() < 0.7 else some_of(data, choose)
    (length,) = struct.unpack("<Q", data[:8])
    if choose.random() < 0.1:
        return struct.pack("<Q", choose.choice([*EXTREME, length + 1, length - 1])) + data[8:]
    header = as_json(data[8 : 8 + length], choose)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def of_gguf(data: bytes, choose: random.Random) -> bytes:
    """Damage a GGUF: its counts, a length or a type in its header, or any bytes."""
    if choose.random() < 0.5:
        return some_of(data[:6000], choose) + data[6000:]
    places = [4, 8, 16, *(match.start() - 8 for match in re.finditer(rb"[a-z]+\.[a-z_.]+", data[:6000])), *range(24, 400, 4)]
    for _ in range(choose.choice([1, 1, 2])):
        place, form = choose.choice(places), choose.choice(["<Q", "<I"])
        data = (
            data[:place] + struct.pack(form, choose.choice([*EXTREME, *range(14)]) % 2 ** (8 * struct.calcsize(form))) + data[place + struct.calcsize(form) :]
        )
    return data
