"""Labelled texts -> prompts, draws of demonstrations and queries.

Knows templates and label words; rows come from `embedded`. Knows nothing of tokenizers, models or results.
Clean draws use no random generator: they sort by sha256, so that they are the same for ever and everywhere. Draws of the reference use numpy's.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from iclgd_dist import patterns
from iclgd_dist.config import OwnTask, SweepError
from iclgd_dist.embedded import FIELD, HUB, PACKAGES, Record, as_text, read_file, read_hub, read_package
from iclgd_dist.protocol import NUM_SEPARATE_ORDERS, Protocol
from iclgd_dist.toml_text import meant, unknown

CLEAN = Protocol()
CONTENT_FREE = ("N/A", "[MASK]", "")  # texts that say nothing (Zhao et al. 2021, arXiv 2102.09690)


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled prompt. The id is the first 16 hex digits of sha256(prompt, NUL, label word)."""

    id: str
    prompt: str
    label: int  # index into the task's label_words
    texts: tuple[str, ...] = ()  # what the data put into the template


@dataclass(frozen=True, slots=True)
class Query:
    """An example to be predicted, with its fold: a function of its prompt alone."""

    id: str
    prompt: str
    label: int
    fold: Literal["A", "B"]


@dataclass(frozen=True)
class Task:
    """All examples of a task: `train` is what demonstrations are drawn from, `queries` what queries are drawn from; no text is in both."""

    name: str
    template: str
    label_words: tuple[str, ...]
    train: tuple[Example, ...]
    queries: tuple[Example, ...]
    origin: str  # where the text comes from, one sentence
    num_duplicates: int  # rows removed: repeated texts, texts with two labels, queries whose text is in train
    train_rows: tuple[Example, ...] = field(default=(), compare=False)  # as they stand in the files, repeated texts and all, for shuffled draws
    query_rows: tuple[Example, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Variation:
    """Demonstrations of a control, named by it: for a context, or to train on."""

    name: str
    label_words: tuple[str, ...]
    demonstrations: tuple[Example, ...]


@dataclass(frozen=True)
class Draw:
    """What one block sees of a task: its demonstrations in order and its queries. Plain data; holds the controls that were asked for."""

    task: str
    template: str
    label_words: tuple[str, ...]
    demonstrations: tuple[Example, ...]  # in the order of the context, before truncation
    queries: tuple[Query, ...]
    num_queries_left_out: int
    reordered: tuple[Example, ...] = ()  # the demonstrations as finetuning sees them, where its order is another
    contexts: tuple[Variation, ...] = ()
    trainings: tuple[Variation, ...] = ()
    blanks: tuple[str, ...] = ()  # prompts without content

    @property
    def training(self) -> tuple[Example, ...]:
        """The demonstrations in the order that finetuning sees them."""
        return self.reordered or self.demonstrations


def load_task(name: str, *, own: OwnTask | None = None, folder: Path = Path()) -> Task:
    """Load a built-in task by name, or the user's `own` task, whose files are relative to `folder`.

    Repeated texts (case and whitespace apart) count once; a text with two labels is dropped. Where no query split exists, a hash of the
    text (case and punctuation apart) decides, so that a text that several tasks share is on the same side in all of them.
    Errors: SweepError for an unknown name, missing data, a label without a word, and every fault of a user's file, with its line.
    """
    if own is not None:
        assert own.name == name
        paths = [folder / file for file in (own.file, own.query_file) if file is not None]
        return _load_own(own.model_dump_json(), *[(str(path), _stamp(name, path)) for path in paths])
    if name in PACKAGES:
        return _load_package(name)
    if name in patterns.NAMES:
        return _load_generated(name)
    if name in HUB:
        return _load_hub(name, os.environ.get("ICLGD_HUB_DATA"))
    raise SweepError(unknown("task", name, [*PACKAGES, *patterns.NAMES, *HUB]))


@functools.cache
def _load_package(name: str) -> Task:
    source = PACKAGES[name]
    return _task(name, source.template, source.words, [({"text": text}, label) for text, label in read_package(name)], None, source.origin)


@functools.cache
def _load_generated(name: str) -> Task:
    kind = patterns.KINDS[name.rpartition("_")[0]]
    return _task(name, kind.template, kind.words, [({"text": text}, label) for text, label in patterns.rows(name)], None, patterns.origin(name))


@functools.cache
def _load_hub(name: str, mirror: str | None) -> Task:
    row = HUB[name]
    train, queries = read_hub(name, mirror=mirror)
    return _task(name, row.template, row.words, train, queries, row.origin)


def _stamp(task: str, path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
        if not path.is_file():
            raise SweepError(f"task {task!r}: {path}: must be a regular file, or a link to one")
    except FileNotFoundError:
        others = [other.stem for other in path.parent.iterdir() if other.suffix == path.suffix] if path.parent.is_dir() else []
        near = meant(path.stem, others, ending=path.suffix) if path.parent.is_dir() else "; relative names start from the folder of the sweep file"
        raise SweepError(f"task {task!r}: {path}: no such file{near}") from None
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise SweepError(f"task {task!r}: {path!s:.400}: cannot be read: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size


@functools.lru_cache(maxsize=16)
def _load_own(own_json: str, *files: tuple[str, tuple[int, int]]) -> Task:
    own = OwnTask.model_validate_json(own_json)
    splits = [_own_records(own, Path(file)) for file, _ in files]
    words = {value: word.strip() for value, word in own.labels.items()}
    origin = f"The user's own file {Path(own.file).name}" + (f", queries from {Path(own.query_file).name}." if own.query_file else ".")
    return _task(own.name, own.template, words, splits[0], splits[1] if own.query_file else None, origin)


def _own_records(own: OwnTask, path: Path) -> list[Record]:
    fields, records = FIELD.findall(own.template), list[Record]()
    for place, row in read_file(path):
        for column in (*fields, own.label_field):
            if column not in row:
                named = "a {field} of a template is the plain name of a column" if column in fields else "label_field names the column with the labels"
                raise SweepError(f"{place}: {unknown('column', column, list(row))} ({named})")
        records.append(({field: as_text(row[field], f"{place}: {field}") for field in fields}, as_text(row[own.label_field], f"{place}: {own.label_field}")))
        if not render(own.template, records[-1][0]):
            raise SweepError(f"{place}: the prompt is empty; fill {', '.join(fields)} or remove the row")
    if not records:
        raise SweepError(f"{path}: holds no rows; at least one is required")
    return records


def render(template: str, fields: Mapping[str, str]) -> str:
    """Return the prompt: each {field} replaced once, so that braces in the data stay as they are; no whitespace around it."""
    return FIELD.sub(lambda match: fields[match[1]], template).strip()


def blank_prompts(template: str) -> tuple[str, ...]:
    """Return the prompts of texts that say nothing; one that would be empty is left out."""
    return tuple(dict.fromkeys(prompt for text in CONTENT_FREE if (prompt := FIELD.sub(text, template).strip())))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def text_key(text: str) -> str:
    """Return what texts share that count as the same: case and whitespace apart."""
    return " ".join(text.split()).casefold()


def example(prompt: str, label: int, label_words: Sequence[str], texts: tuple[str, ...] = ()) -> Example:
    return Example(digest(f"{prompt}\0{label_words[label]}")[:16], prompt, label, texts)


def _is_train(fields: Mapping[str, str]) -> bool:
    text = text_key("\0".join(fields[name] for name in sorted(fields)))
    bare = re.sub(r"[\W_]+", " ", text).strip()  # texts that differ in punctuation only stay on one side
    return int(digest(f"split:{bare or text}")[-1], 16) % 2 == 0


def _task(name: str, template: str, words: Mapping[str, str], train: list[Record], queries: list[Record] | None, origin: str) -> Task:
    counts = Counter(label for _, label in (*train, *(queries or ())))
    if lacking := [f"{label!r} ({count} rows)" for label, count in counts.most_common() if label not in words]:
        known = ", ".join(f"{label!r} ({counts[label]} rows)" for label in words)
        shown = ", ".join(lacking[:20]) + (f" and {len(lacking) - 20} more" if len(lacking) > 20 else "")
        raise SweepError(f"task {name!r}: every label needs a word, got none for {shown}; labels that have one: {known}")
    num_rows = len(train) + len(queries or ())
    if queries is None:
        train, queries = [record for record in train if _is_train(record[0])], [record for record in train if not _is_train(record[0])]
    label_words = tuple(words.values())
    indices = {label: index for index, label in enumerate(words)}
    columns = FIELD.findall(template)
    splits: list[tuple[Example, ...]] = []
    pools: list[tuple[Example, ...]] = []
    taken: set[str] = set()
    for records in (train, queries):
        rows = tuple(example(render(template, fields), indices[label], label_words, tuple(fields[name] for name in columns)) for fields, label in records)
        groups: dict[str, set[Example]] = {}
        for row in rows:
            groups.setdefault(text_key(row.prompt), set()).add(row)
        kept = [group for key, group in groups.items() if key not in taken and len({row.label for row in group}) == 1]
        pools.append(tuple(sorted((min(group, key=lambda row: (row.prompt, row.texts)) for group in kept), key=lambda row: row.id)))
        splits.append(rows)
        taken |= groups.keys()
    if len({row.label for row in pools[1]}) == 1:
        warnings.warn(f"task {name!r}: all {len(pools[1])} queries have the label {label_words[pools[1][0].label]!r}", stacklevel=2)
    return Task(name, template, label_words, pools[0], pools[1], origin, num_rows - len(pools[0]) - len(pools[1]), *splits)


def always(example: Example) -> bool:
    return True


def demonstration_order(task: Task, *, seed: int, protocol: Protocol = CLEAN) -> list[Example]:
    """Return the train pool in the order that `seed` gives it; its beginning is what is drawn."""
    if protocol.demonstration_draw == "shuffled":
        return _shuffled(task.train_rows, seed)
    hashed = sorted(task.train, key=lambda row: digest(f"demonstrations:{seed}:{row.id}"))
    return hashed if protocol.demonstration_draw == "hashed" else _by_turns(hashed, seed)


def _by_turns(rows: Sequence[Example], seed: int) -> list[Example]:
    """Return the rows so that every beginning is balanced by label as far as the rows go; in each round the labels have an order of its own."""
    turns: Counter[int] = Counter()
    placed = []
    for row in rows:
        placed.append((turns[row.label], digest(f"turn:{seed}:{turns[row.label]}:{row.label}"), row))
        turns[row.label] += 1
    return [row for _, _, row in sorted(placed, key=lambda each: each[:2])]


def _shuffled(rows: Sequence[Example], seed: int) -> list[Example]:
    """Return the rows as `datasets.Dataset.shuffle(seed=seed)` orders them."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def permutations(num: int, *, seed: int, order: int, rule: Literal["shared", "separate"]) -> tuple[list[int], list[int]]:
    """Return the positions in which an order shows `num` demonstrations in the context and in training; order 0 is as drawn.

    Source: for `separate`, the code of Dai et al. 2023: numpy's global generator gives five permutations for the context, then five for training.
    """
    if order == 0:
        return list(range(num)), list(range(num))
    if rule == "shared":
        positions = sorted(range(num), key=lambda i: digest(f"order:{seed}:{order}:{i}"))
        return positions, positions
    generator = np.random.RandomState(seed)
    drawn = [generator.permutation(num).tolist() for _ in range(2 * NUM_SEPARATE_ORDERS)]
    return drawn[order], drawn[NUM_SEPARATE_ORDERS + order]


def draw_demonstrations(task: Task, *, num_demonstrations: int, seed: int, order: int = 0, protocol: Protocol = CLEAN) -> tuple[Example, ...]:
    """Return the demonstrations of a context: the first of the pool in the order that `seed` gives it, not balanced by label, permuted by `order`.

    A smaller draw of the same seed is the beginning of a larger one.
    Errors: SweepError if the pool is smaller than `num_demonstrations`.
    """
    drawn = _first(task, num_demonstrations, seed, protocol)
    return tuple(drawn[i] for i in permutations(len(drawn), seed=seed, order=order, rule=protocol.order_rule)[0])


def _first(task: Task, num: int, seed: int, protocol: Protocol) -> list[Example]:
    pool = demonstration_order(task, seed=seed, protocol=protocol)
    if num > len(pool):
        raise SweepError(f"task {task.name!r}: num_demonstrations must be at most {len(pool)}, the size of its train pool, got {num}")
    return pool[:num]


def fold_of(prompt: str) -> Literal["A", "B"]:
    """Return the fold of a query: a function of its text alone."""
    return "A" if int(digest(f"fold:{prompt}")[-1], 16) % 2 == 0 else "B"


def query_order(task: Task, *, query_seed: int, protocol: Protocol = CLEAN) -> list[Example]:
    """Return the query pool in the order that `query_seed` gives it; no text of it is in train."""
    if protocol.query_draw == "balanced":
        return sorted(task.queries, key=lambda row: digest(f"queries:{query_seed}:{row.id}"))
    in_train = {text_key(row.prompt) for row in task.train_rows}
    return [row for row in _shuffled(task.query_rows, query_seed) if text_key(row.prompt) not in in_train]


def draw_queries(
    task: Task, *, num_queries: int, query_seed: int, fits: Callable[[Example], bool] = always, protocol: Protocol = CLEAN
) -> tuple[tuple[Query, ...], int]:
    """Return the queries and how many were left out because `fits` said no.

    Balanced: labels take turns, and folds A and B take turns within a label, so that every beginning of the draw is about balanced, and a draw
    is the beginning of every larger one with the same seed. Where a label's fold runs out its other fold goes on; where a label runs out, the
    other labels fill up. Shuffled: the first that fit, at most `num_queries`.
    Errors: SweepError if fewer than `num_queries` are there or fit; for a shuffled draw, if none does.
    """
    pool = query_order(task, query_seed=query_seed, protocol=protocol)
    is_balanced = protocol.query_draw == "balanced"
    if is_balanced and num_queries > len(pool):
        raise SweepError(f"task {task.name!r}: num_queries must be at most {len(pool)}, the size of its query pool, got {num_queries}")
    labels = range(len(task.label_words)) if is_balanced else range(1)
    strata: dict[tuple[int, str], list[Example]] = {(label, fold): [] for label in labels for fold in "AB"}
    for row in reversed(pool):
        strata[(row.label, fold_of(row.prompt)) if is_balanced else (0, "A")].append(row)
    drawn: list[Query] = []
    num_left_out = turn = 0
    while len(drawn) < num_queries and any(strata.values()):
        for label in labels:
            first, second = ("AB", "BA")[(label + turn) % 2]
            while stratum := strata[label, first] or strata[label, second]:
                row = stratum.pop()
                if fits(row):
                    drawn.append(Query(row.id, row.prompt, row.label, fold_of(row.prompt)))
                    break
                num_left_out += 1
            if len(drawn) == num_queries:
                break
        turn += 1
    if len(drawn) < num_queries and (is_balanced or not drawn):
        raise SweepError(f"task {task.name!r}: num_queries must be at most {len(drawn)}: {num_left_out} of the {len(pool)} do not fit, got {num_queries}")
    return tuple(drawn), num_left_out


def draw(
    task: Task,
    *,
    num_demonstrations: int,
    seed: int,
    order: int,
    num_queries: int,
    query_seed: int,
    fits: Callable[[Example], bool] = always,
    protocol: Protocol = CLEAN,
) -> Draw:
    """Draw the demonstrations and queries of one block; see `draw_demonstrations` and `draw_queries`."""
    bare = draw_bare(task, num_queries=num_queries, query_seed=query_seed, fits=fits, protocol=protocol)
    return with_demonstrations(bare, task, num_demonstrations=num_demonstrations, seed=seed, order=order, protocol=protocol)


def draw_bare(task: Task, *, num_queries: int, query_seed: int, fits: Callable[[Example], bool] = always, protocol: Protocol = CLEAN) -> Draw:
    """Draw the queries alone, which all blocks of a task share."""
    queries, num_left_out = draw_queries(task, num_queries=num_queries, query_seed=query_seed, fits=fits, protocol=protocol)
    return Draw(task.name, task.template, task.label_words, (), queries, num_left_out)


def with_demonstrations(draw: Draw, task: Task, *, num_demonstrations: int, seed: int, order: int, protocol: Protocol = CLEAN) -> Draw:
    """Return the draw with other demonstrations; see `draw_demonstrations`."""
    drawn = _first(task, num_demonstrations, seed, protocol)
    shown, trained = (tuple(drawn[i] for i in p) for p in permutations(len(drawn), seed=seed, order=order, rule=protocol.order_rule))
    assert not {row.prompt for row in drawn} & {query.prompt for query in draw.queries}
    return replace(draw, demonstrations=shown, reordered=trained if trained != shown else ())
