"""Controls made of text: each differs from the true demonstrations in what its name says, and in nothing else."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest

from iclgd_dist.config import SweepError
from iclgd_dist.contexts import with_controls
from iclgd_dist.protocol import Protocol
from iclgd_dist.tasks import CLEAN, Draw, Task, draw, example

REFERENCE = Protocol(preset="reference")
NAMES = ("other_draw", "random_labels", "flipped_labels", "other_task", "shuffled_words", "separator")
WORDS = ("bad", "fair", "good")


def task_of(name: str, *, num: int = 40, words: tuple[str, ...] = WORDS, say: str = "said") -> Task:
    texts = [f"{say} {name}  number {i} of the\n{num}" for i in range(num)]
    rows = tuple(example(f"Text: {text} Label:", i % len(words), words, (text,)) for i, text in enumerate(texts))
    return Task(name, "Text: {text} Label:", words, rows[: num // 2], rows[num // 2 :], "made here", 0, rows[: num // 2], rows[num // 2 :])


TASK, OTHER = task_of("films"), task_of("places", words=("here", "there"))


def drawn(protocol: Protocol = CLEAN, *, seed: int = 1, order: int = 0, k: int = 6) -> Draw:
    return draw(TASK, num_demonstrations=k, seed=seed, order=order, num_queries=9, query_seed=1, protocol=protocol)


def controlled(protocol: Protocol = CLEAN, *, contexts: tuple[str, ...] = NAMES, train_on: tuple[str, ...] = ("true",), **options: int) -> Draw:
    seed = options.get("seed", 1)
    return with_controls(drawn(protocol, **options), TASK, contexts=contexts, train_on=train_on, other=OTHER, seed=seed, protocol=protocol)


def by_name(made: Draw) -> dict[str, tuple]:
    return {each.name.partition(":")[0]: each.demonstrations for each in made.contexts}


def test_nothing_is_made_unless_asked_for():
    assert with_controls(drawn(), TASK, contexts=(), train_on=("true",), seed=1, protocol=CLEAN) == drawn()
    assert controlled(contexts=("shifted",)) == drawn()


@pytest.mark.parametrize("protocol", [CLEAN, REFERENCE], ids=["clean", "reference"])
@pytest.mark.parametrize("order", [0, 2])
def test_every_control_has_as_many_demonstrations_and_the_true_ones_stay(protocol, order):
    made = controlled(protocol, order=order)
    assert [each.name.partition(":")[0] for each in made.contexts] == list(NAMES)
    assert "other_task:places" in [each.name for each in made.contexts]
    assert {name: len(found) for name, found in by_name(made).items()} == {name: 0 if name == "separator" else 6 for name in NAMES}
    assert replace(made, contexts=()) == drawn(protocol, order=order)


@pytest.mark.parametrize("protocol", [CLEAN, REFERENCE], ids=["clean", "reference"])
def test_another_draw_is_disjoint_from_the_shown_and_from_the_queries(protocol):
    for seed in range(5):
        made = controlled(protocol, seed=seed)
        other = {each.prompt for each in by_name(made)["other_draw"]}
        assert len(other) == 6
        assert not other & ({each.prompt for each in made.demonstrations} | {query.prompt for query in made.queries})
        assert other <= {each.prompt for each in TASK.train}


def test_another_draw_is_what_a_larger_draw_would_show_next():
    assert by_name(controlled())["other_draw"] == drawn(k=12).demonstrations[6:]


def test_labels_are_drawn_at_random_or_rotated_by_one():
    made = controlled()
    found = by_name(made)
    assert [each.label for each in found["flipped_labels"]] == [(each.label + 1) % 3 for each in made.demonstrations]
    for name in ("flipped_labels", "random_labels"):
        assert [each.prompt for each in found[name]] == [each.prompt for each in made.demonstrations]
        assert all(each == example(each.prompt, each.label, WORDS, each.texts) for each in found[name])
    labels = Counter(each.label for seed in range(200) for each in by_name(controlled(contexts=("random_labels",), seed=seed))["random_labels"])
    expected = 200 * 6 / 3
    assert sum((labels[label] - expected) ** 2 / expected for label in range(3)) < 13.8  # chi squared with 2 degrees of freedom, p = .001
    agreement = [
        a.label == b.label
        for seed in range(200)
        for made in [controlled(seed=seed)]
        for a, b in zip(made.demonstrations, made.contexts[1].demonstrations, strict=True)
    ]
    assert 0.28 < sum(agreement) / len(agreement) < 0.39  # no label of its own: one in three agrees by chance


def test_shuffled_words_are_the_same_words_between_the_same_template():
    made = controlled()
    moved = 0
    for true, shuffled in zip(made.demonstrations, by_name(made)["shuffled_words"], strict=True):
        assert shuffled.prompt.startswith("Text: ")
        assert shuffled.prompt.endswith(" Label:")
        inner = shuffled.prompt.removeprefix("Text: ").removesuffix(" Label:")
        (text,) = true.texts
        assert Counter(inner.split()) == Counter(text.split())
        assert [c for c in inner if c.isspace()] == [c for c in text if c.isspace()]
        assert (shuffled.label, shuffled.texts) == (true.label, (inner,))
        moved += inner != text
    assert moved == 6


def test_braces_in_shuffled_words_are_text():
    texts = [f"{{text}} {i} \\1 {{}}" for i in range(20)]
    rows = tuple(example(f"Text: {text} Label:", 0, WORDS, (text,)) for text in texts)
    task = replace(TASK, train=rows)
    made = draw(task, num_demonstrations=3, seed=1, order=0, num_queries=2, query_seed=1)
    found = with_controls(made, task, contexts=("shuffled_words",), train_on=("true",), seed=1, protocol=CLEAN).contexts[0].demonstrations
    assert [Counter(each.prompt.split()) for each in found] == [Counter(each.prompt.split()) for each in made.demonstrations]


def test_another_task_brings_its_own_template_words_and_no_text_of_a_query():
    made = controlled()
    other = made.contexts[3]
    assert other.label_words == ("here", "there")
    assert other.demonstrations == draw(OTHER, num_demonstrations=6, seed=1, order=0, num_queries=1, query_seed=1).demonstrations
    shared = replace(OTHER, train=(*OTHER.train, *TASK.queries))
    for seed in range(5):
        found = with_controls(drawn(), TASK, contexts=("other_task",), train_on=("true",), other=shared, seed=seed, protocol=CLEAN).contexts[0].demonstrations
        assert not {each.prompt for each in found} & {query.prompt for query in made.queries}


def test_a_pool_that_is_too_small_for_a_control_is_refused_by_name():
    with pytest.raises(SweepError, match="task 'films', control 'other_draw': needs 11 demonstrations that are not shown, got 9; lower num_demonstrations"):
        controlled(k=11)
    with pytest.raises(SweepError, match="task 'films', control 'other_task': needs 6 demonstrations of 'tiny', got 2"):
        with_controls(drawn(), TASK, contexts=("other_task",), train_on=("true",), other=task_of("tiny", num=4), seed=1, protocol=CLEAN)


def test_what_is_trained_on_varies_the_demonstrations_in_the_order_of_training():
    made = controlled(REFERENCE, contexts=(), train_on=("true", "random_labels", "other_task", "shuffled_words"), order=1)
    assert [each.name for each in made.trainings] == ["random_labels", "other_task", "shuffled_words"]
    assert made.training != made.demonstrations
    assert [each.prompt for each in made.trainings[0].demonstrations] == [each.prompt for each in made.training]
    assert [Counter(each.prompt.split()) for each in made.trainings[2].demonstrations] == [Counter(each.prompt.split()) for each in made.training]


def test_controls_are_hashes_of_seed_and_position_the_same_for_ever():
    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    made = controlled(contexts=("random_labels", "shuffled_words"))
    assert [each.label for each in made.contexts[0].demonstrations] == [int(sha(f"random_labels:1:{i}"), 16) % 3 for i in range(6)] == [2, 2, 2, 1, 2, 1]
    words = made.demonstrations[4].texts[0].split()
    assert made.contexts[1].demonstrations[4].texts[0].split() == [words[i] for i in sorted(range(len(words)), key=lambda i: sha(f"shuffled_words:1:4:{i}"))]
