"""Draws -> token ids: contexts, queries, training sequences and labels, as the protocol puts them together.

Knows a tokenizer as a callable, and the number of positions of a model. Knows nothing of data, models or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from iclgd_dist.config import SweepError
from iclgd_dist.protocol import Protocol
from iclgd_dist.tasks import Draw, Example, Query, Task, always

Ids = tuple[int, ...]
# The longest UTF-8 that Unicode normalisation (NFKC) makes of one byte; tokens never outnumber the bytes of the normalised text.
_NORMALISATION_GROWTH = 11
MAX_LENGTH_CHANGE = 0.05  # of shuffled words, in tokens: a control of length, not only of order


@dataclass(frozen=True)
class Training:
    """What finetuning sees: one sequence per demonstration, nothing after the label."""

    sequences: tuple[Ids, ...]
    first_loss: tuple[int, ...]  # of each sequence: the column of its first token in the loss
    first_item: int  # the column of the demonstration's first own token, after sink and separator
    num_fitting: int  # demonstrations, from the first on, that a context of their own has room for

    @property
    def items(self) -> tuple[tuple[int, int], ...]:
        """Of each sequence: (start, stop) of the demonstration's own tokens."""
        return tuple((self.first_item, len(ids)) for ids in self.sequences)


@dataclass(frozen=True)
class Encoded:
    """A draw as token ids."""

    sink_ids: Ids
    separator_ids: Ids  # after each demonstration of a context
    prefix_ids: Ids  # what every sequence starts with, in zero-shot, in context and in training: sink, and separator where it leads
    demonstrations: tuple[Ids, ...]  # of the context: prompt and label
    queries: tuple[Ids, ...]  # prompt only
    label_ids: tuple[Ids, ...]  # one per label word
    training: Training
    same_order: bool  # context and training show the same demonstrations in the same order
    control_contexts: Mapping[str, Ids] = field(default_factory=dict)  # name -> whole context, sink included
    trainings: Mapping[str, Training] = field(default_factory=dict)  # train_on -> what finetuning sees then
    blanks: tuple[Ids, ...] = ()  # prompts without content, none longer than the longest query

    @property
    def num_context_demonstrations(self) -> int:
        return len(self.demonstrations)

    @property
    def context_ids(self) -> Ids:
        """What stands before a query in context."""
        return _context(self.prefix_ids, self.demonstrations, self.separator_ids)

    @property
    def context_items(self) -> tuple[tuple[int, int], ...]:
        """Of each demonstration of the context: (start, stop) of its own tokens in `context_ids`, no sink and no separator."""
        return self._items(self.demonstrations)

    def _items(self, demonstrations: Sequence[Ids]) -> tuple[tuple[int, int], ...]:
        stops = accumulate((len(ids) + len(self.separator_ids) for ids in demonstrations), initial=len(self.prefix_ids))
        return tuple((start, start + len(ids)) for start, ids in zip(stops, demonstrations, strict=False))

    def context_of(self, num_trained: int, train_on: str = "true") -> tuple[Ids, tuple[tuple[int, int], ...]] | None:
        """Return the context of exactly the first demonstrations trained on, and their items; None where it does not fit the model."""
        training = self.training_for(train_on)
        if num_trained > training.num_fitting:
            return None
        first = [ids[training.first_item :] for ids in training.sequences[:num_trained]]
        return _context(self.prefix_ids, first, self.separator_ids), self._items(first)

    def training_for(self, train_on: str) -> Training:
        return self.training if train_on == "true" else self.trainings[train_on]


def _context(prefix_ids: Ids, demonstrations: Sequence[Ids], separator_ids: Ids) -> Ids:
    return prefix_ids + tuple(token for ids in demonstrations for token in ids + separator_ids)


def encode(draw: Draw, tokenizer: Any, *, protocol: Protocol, max_positions: int | None) -> Encoded:
    """Turn a draw into token ids; demonstrations are lists of ids put together, never text tokenised again.

    Errors: SweepError if the tokenizer lacks the sink, the separator or the token of line breaks, if a prompt or a label has no ids, if a label's
    ids depend on its prompt or are another label's, if a context with the longest query, or a sequence to train on, exceeds `max_positions`, and
    if shuffling words changes the number of tokens.
    """
    sink_ids, separator_ids, prefix_ids = _specials(tokenizer, protocol)
    variations = (*draw.contexts, *draw.trainings)
    examples: dict[tuple[str, ...], list[Example | Query]] = {draw.label_words: [*draw.demonstrations, *draw.queries]}
    for variation in variations:
        examples.setdefault(variation.label_words, []).extend(variation.demonstrations)
    texts = {words: [example.prompt for example in found] for words, found in examples.items()}
    texts[draw.label_words] += draw.blanks
    read = {words: _read(tokenizer, protocol, draw.task, dict.fromkeys(prompts), words) for words, prompts in texts.items()}

    def parts(demonstrations: Sequence[Example], words: tuple[str, ...]) -> list[tuple[Ids, Ids]]:
        prompts, labels = read[words]
        return [(prompts[example.prompt], labels[example.label]) for example in demonstrations]

    def training_on(demonstrations: Sequence[Example], words: tuple[str, ...] = draw.label_words) -> Training:
        found = parts(demonstrations, words)
        first_loss = tuple(len(prefix_ids) + (len(prompt) if protocol.loss_tokens == "label" else 0) for prompt, _ in found)
        num_fitting = room.num_fitting([prompt + label for prompt, label in found])
        return Training(tuple(prefix_ids + prompt + label for prompt, label in found), first_loss, len(prefix_ids), num_fitting)

    prompts, label_ids = read[draw.label_words]
    queries = tuple(prompts[query.prompt] for query in draw.queries)
    longest = max(map(len, queries), default=0)
    blanks = tuple(ids for ids in (prompts[prompt] for prompt in draw.blanks) if len(ids) <= longest)  # they must not take room from demonstrations
    room = _Room(protocol, max_positions, prefix_ids, separator_ids, longest + max(map(len, label_ids)))
    named = f"task {draw.task!r}"
    shown = room.shown([prompt + label for prompt, label in parts(draw.demonstrations, draw.label_words)], named)
    training = training_on(draw.training)
    trained = [ids[len(prefix_ids) :] for ids in training.sequences]
    contexts, trainings = dict[str, Ids](), {each.name: training_on(each.demonstrations, each.label_words) for each in draw.trainings}
    for each in draw.contexts:
        # The separator's context is that of one demonstration without tokens; where nothing separates, it would be zero-shot again.
        of_control = [()] if each.name == "separator" else [prompt + label for prompt, label in parts(each.demonstrations, each.label_words)]
        if any(of_control) or separator_ids:
            contexts[each.name] = _context(prefix_ids, room.shown(of_control, f"{named}, control {each.name!r}"), separator_ids)
    for name, sequences in {"true": training, **trainings}.items():
        room.check_training(sequences, named if name == "true" else f"{named}, train_on {name!r}")
    for each in variations:
        if each.name == "shuffled_words":
            _check_length(draw, sum(map(len, trained)), sum(len(p) + len(label) for p, label in parts(each.demonstrations, each.label_words)))
    same_order = draw.training == draw.demonstrations and len(shown) == len(trained)
    return Encoded(sink_ids, separator_ids, prefix_ids, tuple(shown), queries, label_ids, training, same_order, contexts, trainings, blanks)


def _check_length(draw: Draw, num_true: int, num_shuffled: int) -> None:
    if abs(num_shuffled - num_true) > MAX_LENGTH_CHANGE * num_true:
        raise SweepError(
            f"task {draw.task!r}, control 'shuffled_words': the number of tokens may change by {MAX_LENGTH_CHANGE:.0%}, "
            f"it goes from {num_true} to {num_shuffled}; leave it out of [controls]"
        )


@dataclass(frozen=True)
class _Room:
    """The positions of a model, and what a context must leave of them: the longest query with its label."""

    protocol: Protocol
    max_positions: int | None
    prefix_ids: Ids
    separator_ids: Ids
    query: int

    def num_fitting(self, demonstrations: Sequence[Ids]) -> int:
        """Return how many demonstrations, from the first on, fit.

        Source: for `greedy`, the code of Dai et al. 2023: the query is counted with a beginning of its own, and one position stays free.
        """
        if self.max_positions is None:
            return len(demonstrations)
        is_greedy = self.protocol.truncation == "greedy"
        used, limit = len(self.prefix_ids), self.max_positions - self.query
        if is_greedy:
            limit -= len(self.prefix_ids) + 1
        for number, ids in enumerate(demonstrations):
            if used + len(ids) + (0 if is_greedy else len(self.separator_ids)) > limit:
                return number
            used += len(ids) + len(self.separator_ids)
        return len(demonstrations)

    def shown(self, demonstrations: Sequence[Ids], named: str) -> Sequence[Ids]:
        """Return the demonstrations that a context shows."""
        alone, num_fitting = len(self.prefix_ids) + self.query, self.num_fitting(demonstrations)
        if self.max_positions is not None and alone > self.max_positions:
            raise SweepError(f"{named}: the longest query needs {alone} positions with its label, the model takes {self.max_positions}")
        if self.protocol.truncation == "refuse" and num_fitting < len(demonstrations):
            used = alone + sum(len(ids) + len(self.separator_ids) for ids in demonstrations)
            raise SweepError(
                f"{named}: {len(demonstrations)} demonstrations and the longest query need {used} positions, the model takes {self.max_positions}; "
                f"{num_fitting} would fit: lower num_demonstrations"
            )
        return demonstrations[:num_fitting]

    def check_training(self, training: Training, named: str) -> None:
        longest = max(map(len, training.sequences), default=0)
        if self.max_positions is not None and longest > self.max_positions:
            raise SweepError(f"{named}: the longest demonstration needs {longest} positions in training, the model takes {self.max_positions}")


def _read(tokenizer: Any, protocol: Protocol, task: str, prompts: Mapping[str, Any], words: tuple[str, ...]) -> tuple[dict[str, Ids], tuple[Ids, ...]]:
    """Return the ids of each prompt and of each label.

    A label's ids are what tokenising prompt + " " + word adds to the prompt's own ids, the same after every prompt; or those of " " + word alone.
    """
    named = f"tokenizer {_name(tokenizer)}"
    is_joint = protocol.label_tokens == "joint"
    after = [*prompts] if is_joint else [""]
    encoded = _ids(tokenizer, protocol, [*prompts, *(f"{prompt} {word}" for word in words for prompt in after)])
    prompt_ids = dict(zip(prompts, encoded, strict=False))
    if empty := [prompt for prompt, ids in prompt_ids.items() if not ids]:
        raise SweepError(f"task {task!r}: a prompt must have at least one token, got none from {named} for {empty[0][:80]!r}")
    label_ids: list[Ids] = []
    for number, word in enumerate(words):
        found: dict[Ids, str] = {}
        start = len(prompts) + number * len(after)
        for prompt, whole_ids in zip(after, encoded[start : start + len(after)], strict=True):
            before = prompt_ids[prompt] if is_joint else ()
            if whole_ids[: len(before)] != before:
                raise SweepError(f"label {word!r}: {named} merges it with the end of the prompt {prompt[-40:]!r}; end the template otherwise")
            found.setdefault(whole_ids[len(before) :], prompt)
        if len(found) != 1 or () in found:
            shown = "; ".join(f"{list(ids)} after {prompt[-40:]!r}" for ids, prompt in list(found.items())[:2])
            raise SweepError(f"label {word!r}: its token ids must be the same after every prompt, and at least one, got {shown} from {named}")
        label_ids.append(next(iter(found)))
    for index, ids in enumerate(label_ids):
        if ids in label_ids[:index]:
            raise SweepError(f"labels {words[label_ids.index(ids)]!r} and {words[index]!r} must differ, got the same token ids {list(ids)} from {named}")
    return prompt_ids, tuple(label_ids)


def fits_context(tokenizer: Any, task: Task, *, protocol: Protocol, max_positions: int | None) -> Callable[[Example], bool]:
    """Return a function that says whether sink, separator, prompt and longest label fit the model's positions.

    Tokenises only where the number of bytes leaves a doubt.
    """
    if max_positions is None:
        return always
    room = max_positions - len(_specials(tokenizer, protocol)[2])
    longest_word = max(len(word.encode()) for word in task.label_words)
    all_ascii = all(word.isascii() for word in task.label_words)

    def fits(example: Example) -> bool:
        # Two tokens more: the space before the label, and the word boundary that some tokenizers put in front of each text and line.
        num_texts = 1 + (protocol.label_tokens == "separate") + (example.prompt.count("\n") if protocol.line_breaks == "eos" else 0)
        num_bytes = len(example.prompt.encode()) + longest_word + 1 + num_texts
        if num_bytes * (1 if all_ascii and example.prompt.isascii() else _NORMALISATION_GROWTH) <= room:
            return True
        if protocol.label_tokens == "separate":
            prompt_ids, *labels = _ids(tokenizer, protocol, [example.prompt, *(f" {word}" for word in task.label_words)])
            return len(prompt_ids) + max(map(len, labels)) <= room
        return max(map(len, _ids(tokenizer, protocol, [f"{example.prompt} {word}" for word in task.label_words]))) <= room

    return fits


def _specials(tokenizer: Any, protocol: Protocol) -> tuple[Ids, Ids, Ids]:
    """Return the ids of the sink, of the separator, and of what every sequence starts with."""
    named = f"tokenizer {_name(tokenizer)}"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    sink = {"auto": eos if bos is None else bos, "bos": bos, "eos": eos}[protocol.sink]
    if sink is None:
        raise SweepError(f"{named}: a token for [protocol] sink = {protocol.sink!r} is required, it has bos {bos} and eos {eos}")
    for switch in ("separator", "line_breaks"):
        if getattr(protocol, switch) == "eos" and eos is None:
            raise SweepError(f'{named}: an end-of-sequence token is required for [protocol] {switch} = "eos", it has none')
    separator: Ids = {"newline": lambda: _newline(tokenizer, named), "eos": lambda: (eos,), "none": lambda: ()}[protocol.separator]()
    return (sink,), separator, (sink, *separator) if protocol.leading_separator else (sink,)


def _newline(tokenizer: Any, named: str) -> Ids:
    newline = _plain_ids(tokenizer, ["\n"])[0]
    if (got := tokenizer.decode(list(newline)).strip(" ")) != "\n":
        raise SweepError(f'{named}: loses the newline that separates demonstrations (it decodes to {got!r}); set [protocol] separator = "eos"')
    return newline


def _ids(tokenizer: Any, protocol: Protocol, texts: list[str]) -> list[Ids]:
    if protocol.line_breaks == "text":
        return _plain_ids(tokenizer, texts)
    lines = [text.split("\n") for text in texts]
    encoded = iter(_plain_ids(tokenizer, [line for parts in lines for line in parts]))
    return [tuple(token for _ in parts for token in (tokenizer.eos_token_id, *next(encoded)))[1:] for parts in lines]


def _plain_ids(tokenizer: Any, texts: list[str]) -> list[Ids]:
    # split_special_tokens: "</s>" inside a text is text, never the end of the sequence.
    return [tuple(ids) for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]] if texts else []


def _name(tokenizer: Any) -> str:
    return repr(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
