"""Labelled texts -> prompts, draws of demonstrations and queries, and their token ids.

Knows templates, label words, and a tokenizer as a callable; rows come from `embedded`. Knows nothing of models, tensors or results.
Draws use no random generator: they sort by sha256, so that they are the same for ever and everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iclgd_dist.config import OwnTask, SweepError
from iclgd_dist.embedded import FIELD, HUB, PACKAGES, Record, as_text, read_file, read_hub, read_package
from iclgd_dist.protocol import Protocol
from iclgd_dist.toml_text import unknown

# The longest UTF-8 that Unicode normalisation (NFKC) makes of one byte; tokens never outnumber the bytes of the normalised text.
_NORMALISATION_GROWTH = 11


@dataclass(frozen=True, slots=True)
class Example:
    """One labelled prompt. The id is the first 16 hex digits of sha256(prompt, NUL, label word)."""

    id: str
    prompt: str
    label: int  # index into the task's label_words


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


@dataclass(frozen=True)
class Draw:
    """What one block sees of a task: its demonstrations in order and its queries."""

    task: str
    template: str
    label_words: tuple[str, ...]
    demonstrations: tuple[Example, ...]
    queries: tuple[Query, ...]
    num_queries_left_out: int


@dataclass(frozen=True)
class Encoded:
    """A draw as token ids."""

    sink_ids: tuple[int, ...]
    separator_ids: tuple[int, ...]
    demonstrations: tuple[tuple[int, ...], ...]  # prompt and label
    queries: tuple[tuple[int, ...], ...]  # prompt only
    label_ids: tuple[tuple[int, ...], ...]  # one per label word

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """What every sequence starts with, in zero-shot, in context and in training."""
        return self.sink_ids + self.separator_ids

    @property
    def context_ids(self) -> tuple[int, ...]:
        """What stands before a query in context."""
        return self.prefix_ids + tuple(token for demonstration in self.demonstrations for token in demonstration + self.separator_ids)

    @property
    def training_sequences(self) -> tuple[tuple[int, ...], ...]:
        """What finetuning sees, one sequence per demonstration, nothing after the label."""
        return tuple(self.prefix_ids + demonstration for demonstration in self.demonstrations)


def load_task(name: str, *, own: OwnTask | None = None, folder: Path = Path()) -> Task:
    """Load a built-in task by name, or the user's `own` task, whose files are relative to `folder`.

    Repeated texts (case and whitespace apart) count once; a text with two labels is dropped. Where no query split exists, a hash of the
    text (case and punctuation apart) decides, so that a text that several tasks share is on the same side in all of them.
    Errors: SweepError for an unknown name, missing data, a label without a word, and every fault of a user's file, with its line.
    """
    if own is not None:
        assert own.name == name
        paths = [folder / file for file in (own.file, own.query_file) if file is not None]
        return _load_own(own.model_dump_json(), *[(str(path), _stamp(path)) for path in paths])
    if name in PACKAGES:
        return _load_package(name)
    if name in HUB:
        return _load_hub(name, os.environ.get("ICLGD_HUB_DATA"))
    raise SweepError(unknown("task", name, [*PACKAGES, *HUB]))


@functools.cache
def _load_package(name: str) -> Task:
    source = PACKAGES[name]
    return _task(name, source.template, source.words, [({"text": text}, label) for text, label in read_package(name)], None, source.origin)


@functools.cache
def _load_hub(name: str, mirror: str | None) -> Task:
    row = HUB[name]
    train, queries = read_hub(name, mirror=mirror)
    return _task(name, row.template, row.words, train, queries, row.origin)


def _stamp(path: Path) -> tuple[int, int]:
    if not path.is_file():
        raise SweepError(f"{path}: no such file" if not path.exists() else f"{path}: must be a file")
    status = path.stat()
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
                raise SweepError(f"{place}: {unknown('column', column, list(row))} (a {{field}} of a template is the plain name of a column)")
        records.append(({field: as_text(row[field], f"{place}: {field}") for field in fields}, as_text(row[own.label_field], f"{place}: {own.label_field}")))
        if not render(own.template, records[-1][0]):
            raise SweepError(f"{place}: the prompt is empty; fill {', '.join(fields)} or remove the row")
    if not records:
        raise SweepError(f"{path}: holds no rows; at least one is required")
    return records


def render(template: str, fields: Mapping[str, str]) -> str:
    """Return the prompt: each {field} replaced once, so that braces in the data stay as they are; no whitespace around it."""
    return FIELD.sub(lambda match: fields[match[1]], template).strip()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(text: str) -> str:
    return " ".join(text.split()).casefold()


def _is_train(fields: Mapping[str, str]) -> bool:
    text = _key("\0".join(fields[name] for name in sorted(fields)))
    bare = re.sub(r"[\W_]+", " ", text).strip()  # texts that differ in punctuation only stay on one side
    return int(_digest(f"split:{bare or text}")[-1], 16) % 2 == 0


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
    pools: list[tuple[Example, ...]] = []
    taken: set[str] = set()
    for records in (train, queries):
        groups: dict[str, set[tuple[str, int]]] = {}
        for fields, label in records:
            prompt = render(template, fields)
            groups.setdefault(_key(prompt), set()).add((prompt, indices[label]))
        kept = [min(group) for key, group in groups.items() if key not in taken and len({label for _, label in group}) == 1]
        examples = [Example(_digest(f"{prompt}\0{label_words[label]}")[:16], prompt, label) for prompt, label in kept]
        pools.append(tuple(sorted(examples, key=lambda example: example.id)))
        taken |= groups.keys()
    if len({example.label for example in pools[1]}) == 1:
        warnings.warn(f"task {name!r}: all {len(pools[1])} queries have the label {label_words[pools[1][0].label]!r}", stacklevel=2)
    return Task(name, template, label_words, pools[0], pools[1], origin, num_rows - len(pools[0]) - len(pools[1]))


def always(example: Example) -> bool:
    return True


def draw_demonstrations(task: Task, *, num_demonstrations: int, seed: int, order: int = 0) -> tuple[Example, ...]:
    """Return the first examples of the train pool in the order that `seed` gives it, not balanced by label.

    Order 0 is as drawn, order p > 0 a permutation given by (seed, p). A smaller draw of the same seed is the beginning of a larger one.
    Errors: SweepError if the pool is smaller than `num_demonstrations`.
    """
    if num_demonstrations > len(task.train):
        raise SweepError(f"task {task.name!r}: num_demonstrations must be at most {len(task.train)}, the size of its train pool, got {num_demonstrations}")
    drawn = sorted(task.train, key=lambda example: _digest(f"demonstrations:{seed}:{example.id}"))[:num_demonstrations]
    positions = sorted(range(len(drawn)), key=lambda i: _digest(f"order:{seed}:{order}:{i}")) if order else range(len(drawn))
    return tuple(drawn[i] for i in positions)


def fold_of(prompt: str) -> Literal["A", "B"]:
    """Return the fold of a query: a function of its text alone."""
    return "A" if int(_digest(f"fold:{prompt}")[-1], 16) % 2 == 0 else "B"


def draw_queries(task: Task, *, num_queries: int, query_seed: int, fits: Callable[[Example], bool] = always) -> tuple[tuple[Query, ...], int]:
    """Return the queries and how many were left out because `fits` said no.

    Labels take turns, and folds A and B take turns within a label, so that every beginning of the draw is about balanced, and a draw is
    the beginning of every larger one with the same seed. Where a label's fold runs out its other fold goes on; where a label runs out,
    the other labels fill up.
    Errors: SweepError if fewer than `num_queries` are there or fit.
    """
    if num_queries > len(task.queries):
        raise SweepError(f"task {task.name!r}: num_queries must be at most {len(task.queries)}, the size of its query pool, got {num_queries}")
    strata: dict[tuple[int, str], list[Query]] = {(label, fold): [] for label in range(len(task.label_words)) for fold in "AB"}
    for example in sorted(task.queries, key=lambda example: _digest(f"queries:{query_seed}:{example.id}"), reverse=True):
        fold = fold_of(example.prompt)
        strata[example.label, fold].append(Query(example.id, example.prompt, example.label, fold))
    drawn: list[Query] = []
    num_left_out = turn = 0
    while len(drawn) < num_queries and any(strata.values()):
        for label in range(len(task.label_words)):
            first, second = ("AB", "BA")[(label + turn) % 2]
            while stratum := strata[label, first] or strata[label, second]:
                query = stratum.pop()
                if fits(Example(query.id, query.prompt, query.label)):
                    drawn.append(query)
                    break
                num_left_out += 1
            if len(drawn) == num_queries:
                break
        turn += 1
    if len(drawn) < num_queries:
        raise SweepError(
            f"task {task.name!r}: num_queries must be at most {len(drawn)}: {num_left_out} of the {len(task.queries)} do not fit, got {num_queries}"
        )
    return tuple(drawn), num_left_out


def draw(task: Task, *, num_demonstrations: int, seed: int, order: int, num_queries: int, query_seed: int, fits: Callable[[Example], bool] = always) -> Draw:
    """Draw the demonstrations and queries of one block; see `draw_demonstrations` and `draw_queries`."""
    demonstrations = draw_demonstrations(task, num_demonstrations=num_demonstrations, seed=seed, order=order)
    queries, num_left_out = draw_queries(task, num_queries=num_queries, query_seed=query_seed, fits=fits)
    assert not {example.prompt for example in demonstrations} & {query.prompt for query in queries}
    return Draw(task.name, task.template, task.label_words, demonstrations, queries, num_left_out)


def encode(draw: Draw, tokenizer: Any, *, protocol: Protocol, max_positions: int | None) -> Encoded:
    """Turn a draw into token ids; demonstrations are lists of ids put together, never text tokenised again.

    A label's ids are what tokenising prompt + " " + word adds to the prompt's own ids; they must be the same after every prompt.
    Errors: SweepError if the tokenizer lacks the sink or the separator, if a label's ids depend on its prompt, are none, or are another
    label's, and if the demonstrations and the longest query exceed `max_positions` (saying how many would fit).
    """
    sink_ids, separator_ids = _prefix(tokenizer, protocol)
    examples: tuple[Example | Query, ...] = (*draw.demonstrations, *draw.queries)
    words = draw.label_words
    encoded = _ids(tokenizer, [text for example in examples for text in (example.prompt, *(f"{example.prompt} {word}" for word in words))])
    rows = [encoded[start : start + 1 + len(words)] for start in range(0, len(encoded), 1 + len(words))]
    named = f"tokenizer {_name(tokenizer)}"
    label_ids: list[tuple[int, ...]] = []
    for word, index in zip(words, range(1, 1 + len(words)), strict=True):
        found: dict[tuple[int, ...], str] = {}
        for example, row in zip(examples, rows, strict=True):
            prompt_ids, whole_ids = row[0], row[index]
            if not prompt_ids:
                raise SweepError(f"task {draw.task!r}: a prompt must have at least one token, got none from {named} for {example.prompt[:80]!r}")
            if whole_ids[: len(prompt_ids)] != prompt_ids:
                raise SweepError(f"label {word!r}: {named} merges it with the end of the prompt {example.prompt[-40:]!r}; end the template otherwise")
            found.setdefault(whole_ids[len(prompt_ids) :], example.prompt)
        if len(found) != 1 or () in found:
            shown = "; ".join(f"{list(ids)} after {prompt[-40:]!r}" for ids, prompt in list(found.items())[:2])
            raise SweepError(f"label {word!r}: its token ids must be the same after every prompt, and at least one, got {shown} from {named}")
        label_ids.append(next(iter(found)))
    for index, ids in enumerate(label_ids):
        if ids in label_ids[:index]:
            raise SweepError(f"labels {words[label_ids.index(ids)]!r} and {words[index]!r} must differ, got the same token ids {list(ids)} from {named}")
    k = len(draw.demonstrations)
    demonstrations = tuple(row[0] + label_ids[example.label] for example, row in zip(draw.demonstrations, rows[:k], strict=True))
    queries = tuple(row[0] for row in rows[k:])
    result = Encoded(sink_ids, separator_ids, demonstrations, queries, tuple(label_ids))
    if max_positions is not None:
        _check_length(draw.task, result, max_positions)
    return result


def _check_length(task: str, encoded: Encoded, max_positions: int) -> None:
    used = len(encoded.prefix_ids) + max(map(len, encoded.queries), default=0) + max(map(len, encoded.label_ids))
    if used > max_positions:
        raise SweepError(f"task {task!r}: the longest query needs {used} positions with its label, the model takes {max_positions}")
    num_fitting = 0
    for demonstration in encoded.demonstrations:
        used += len(demonstration) + len(encoded.separator_ids)
        num_fitting += used <= max_positions
    if used > max_positions:
        k = len(encoded.demonstrations)
        raise SweepError(
            f"task {task!r}: {k} demonstrations and the longest query need {used} positions, the model takes {max_positions}; "
            f"{num_fitting} would fit: lower num_demonstrations"
        )


def fits_context(tokenizer: Any, task: Task, *, protocol: Protocol, max_positions: int | None) -> Callable[[Example], bool]:
    """Return a function that says whether sink, separator, prompt and longest label fit the model's positions.

    Tokenises only where the number of bytes leaves a doubt.
    """
    if max_positions is None:
        return always
    room = max_positions - sum(map(len, _prefix(tokenizer, protocol)))
    longest_word = max(len(word.encode()) for word in task.label_words)
    all_ascii = all(word.isascii() for word in task.label_words)

    def fits(example: Example) -> bool:
        # Two tokens more: the space before the label, and the word boundary that some tokenizers put in front.
        num_bytes = len(example.prompt.encode()) + longest_word + 2
        if num_bytes * (1 if all_ascii and example.prompt.isascii() else _NORMALISATION_GROWTH) <= room:
            return True
        return max(map(len, _ids(tokenizer, [f"{example.prompt} {word}" for word in task.label_words]))) <= room

    return fits


def _prefix(tokenizer: Any, protocol: Protocol) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids of the sink and of the separator."""
    named = f"tokenizer {_name(tokenizer)}"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    sink = {"auto": eos if bos is None else bos, "bos": bos, "eos": eos}[protocol.sink]
    if sink is None:
        raise SweepError(f"{named}: a token for [protocol] sink = {protocol.sink!r} is required, it has bos {bos} and eos {eos}")
    if protocol.separator == "none":
        return (sink,), ()
    if protocol.separator == "eos":
        if eos is None:
            raise SweepError(f'{named}: an end-of-sequence token is required for [protocol] separator = "eos", it has none')
        return (sink,), (eos,)
    newline = _ids(tokenizer, ["\n"])[0]
    if (got := tokenizer.decode(list(newline)).strip(" ")) != "\n":
        raise SweepError(f'{named}: loses the newline that separates demonstrations (it decodes to {got!r}); set [protocol] separator = "eos"')
    return (sink,), newline


def _ids(tokenizer: Any, texts: list[str]) -> list[tuple[int, ...]]:
    # split_special_tokens: "</s>" inside a text is text, never the end of the sequence.
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]] if texts else []


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
