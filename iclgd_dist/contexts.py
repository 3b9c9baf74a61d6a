"""The controls made of text: contexts that teach something else than the demonstrations, and other things to train on.

Knows examples and seeds. Knows nothing of tokenizers. As every draw, they come from hashes: the same for ever and everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from itertools import islice

from iclgd_dist.config import SweepError
from iclgd_dist.embedded import FIELD
from iclgd_dist.protocol import Protocol
from iclgd_dist.tasks import Draw, Example, Task, Variation, demonstration_order, digest, example, text_key


def with_controls(
    draw: Draw, task: Task, *, contexts: Collection[str], train_on: Collection[str], other: Task | None = None, seed: int, protocol: Protocol
) -> Draw:
    """Return the draw with the demonstrations of these control contexts and of these things to train on; `other` is the task of `other_task`.

    Errors: SweepError if a pool holds too few demonstrations for a control.
    """

    def varied(name: str, shown: tuple[Example, ...]) -> Variation:
        if name == "other_task":
            assert other is not None
            return Variation(name, other.label_words, _of_other_task(other, draw, seed=seed, protocol=protocol))
        found = {
            "other_draw": lambda: _other_draw(task, shown, seed=seed, protocol=protocol),
            "random_labels": lambda: _relabelled(draw, shown, [_drawn(f"random_labels:{seed}:{i}", len(draw.label_words)) for i in range(len(shown))]),
            "flipped_labels": lambda: _relabelled(draw, shown, [(each.label + 1) % len(draw.label_words) for each in shown]),
            "shuffled_words": lambda: tuple(_shuffled_words(each, draw, f"shuffled_words:{seed}:{i}") for i, each in enumerate(shown)),
            "separator": lambda: (),
        }[name]()
        return Variation(name, draw.label_words, found)

    # `shifted` has no text of its own: it is the zero-shot prompt at other positions.
    made = tuple(varied(name, draw.demonstrations) for name in contexts if name != "shifted")
    if other is not None:  # which task it is, its name tells: no key does
        made = tuple(replace(each, name=f"other_task:{other.name}") if each.name == "other_task" else each for each in made)
    return replace(draw, contexts=made, trainings=tuple(varied(name, draw.training) for name in train_on if name != "true"))


def _other_draw(task: Task, shown: tuple[Example, ...], *, seed: int, protocol: Protocol) -> tuple[Example, ...]:
    """Return as many demonstrations as are shown: the next ones of the same order."""
    taken = {text_key(each.prompt) for each in shown}
    found = [each for each in demonstration_order(task, seed=seed, protocol=protocol) if text_key(each.prompt) not in taken]
    return _enough(found[: len(shown)], len(shown), f"task {task.name!r}, control 'other_draw'", "demonstrations that are not shown")


def _of_other_task(other: Task, draw: Draw, *, seed: int, protocol: Protocol) -> tuple[Example, ...]:
    """Return as many demonstrations of another task; no text that a query holds, as tasks may share texts."""
    prompts = [query.prompt for query in draw.queries]
    order = demonstration_order(other, seed=seed, protocol=protocol)
    found = list(islice((each for each in order if not any(text in prompt for text in each.texts for prompt in prompts)), len(draw.demonstrations)))
    return _enough(found, len(draw.demonstrations), f"task {draw.task!r}, control 'other_task'", f"demonstrations of {other.name!r}")


def _enough(found: list[Example], num: int, named: str, of_what: str) -> tuple[Example, ...]:
    if len(found) < num:
        raise SweepError(f"{named}: needs {num} {of_what}, got {len(found)}; lower num_demonstrations or leave it out of [controls]")
    return tuple(found)


def _drawn(key: str, num: int) -> int:
    return int(digest(key), 16) % num


def _relabelled(draw: Draw, shown: tuple[Example, ...], labels: list[int]) -> tuple[Example, ...]:
    return tuple(example(each.prompt, label, draw.label_words, each.texts) for each, label in zip(shown, labels, strict=True))


def _shuffled_words(shown: Example, draw: Draw, key: str) -> Example:
    """Return the example with the words of each of its texts in another order; the template, the label and the whitespace stay where they are."""
    texts = tuple(_shuffled(text, key) for text in shown.texts)
    remaining = iter(texts)
    prompt = FIELD.sub(lambda match: next(remaining), draw.template).strip()
    return example(prompt, shown.label, draw.label_words, texts)


def _shuffled(text: str, key: str) -> str:
    words = text.split()
    order = iter(sorted(range(len(words)), key=lambda i: digest(f"{key}:{i}")))
    return re.sub(r"\S+", lambda match: words[next(order)], text)
