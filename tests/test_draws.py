"""Draws of demonstrations and queries: their order, balance and folds, and those of the papers."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest

from iclgd_dist import tasks
from iclgd_dist.config import OwnTask, SweepError
from iclgd_dist.protocol import Protocol
from iclgd_dist.tasks import Example, Task, draw, draw_demonstrations, draw_queries


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_task(counts: tuple[int, ...] = (40, 40), num_train: int = 30) -> Task:
    """A task with `counts` queries per label."""
    words = tuple(f"word{label}" for label in range(len(counts)))

    def example(prompt: str, label: int) -> Example:
        return Example(sha(f"{prompt}\0{words[label]}")[:16], prompt, label)

    train = tuple(example(f"Text: train {i} Label:", i % len(counts)) for i in range(num_train))
    queries = tuple(example(f"Text: query {label} {i} Label:", label) for label, count in enumerate(counts) for i in range(count))
    return Task("made", "Text: {text} Label:", words, train, queries, "made here", 0)


def test_demonstrations_come_in_the_order_of_a_hash_of_seed_and_id():
    task = make_task()
    wanted = sorted(task.train, key=lambda e: sha(f"demonstrations:7:{e.id}"))
    assert draw_demonstrations(task, num_demonstrations=5, seed=7) == tuple(wanted[:5])
    assert draw_demonstrations(task, num_demonstrations=5, seed=8) != tuple(wanted[:5])
    assert draw_demonstrations(task, num_demonstrations=0, seed=7) == ()


def test_an_order_permutes_the_same_demonstrations():
    task = make_task()
    orders = [draw_demonstrations(task, num_demonstrations=8, seed=1, order=p) for p in range(6)]
    assert len(set(orders)) == 6
    assert all(set(order) == set(orders[0]) for order in orders)
    positions = sorted(range(8), key=lambda i: sha(f"order:1:2:{i}"))
    assert orders[2] == tuple(orders[0][i] for i in positions)


def test_more_demonstrations_or_queries_than_there_are_is_refused_with_both_numbers():
    task = make_task((40, 40), num_train=30)
    with pytest.raises(SweepError, match=r"num_demonstrations must be at most 30, .* got 31"):
        draw_demonstrations(task, num_demonstrations=31, seed=1)
    with pytest.raises(SweepError, match=r"num_queries must be at most 80, .* got 81"):
        draw_queries(task, num_queries=81, query_seed=1)
    with pytest.raises(SweepError, match="num_queries must be at most 0: 80 of the 80 do not fit, got 3"):
        draw_queries(task, num_queries=3, query_seed=1, fits=lambda example: False)


@pytest.mark.parametrize("counts", [(60, 60), (60, 60, 60), (60, 60, 60, 60, 60, 60)])
def test_every_beginning_of_a_draw_of_queries_is_balanced_by_label_and_nearly_by_stratum(counts):
    queries, _ = draw_queries(make_task(counts), num_queries=24, query_seed=3)
    for n in range(1, 25):
        by_label = Counter(q.label for q in queries[:n])
        assert max(by_label.values()) - min(by_label.get(label, 0) for label in range(len(counts))) <= 1
        by_stratum = Counter((q.label, str(q.fold)) for q in queries[:n])
        assert max(by_stratum.values()) - min(by_stratum.get((label, fold), 0) for label in range(len(counts)) for fold in "AB") <= 1


def test_a_smaller_draw_of_queries_is_the_beginning_of_a_larger_one():
    task = make_task((50, 7, 30))
    largest, _ = draw_queries(task, num_queries=87, query_seed=1)
    assert len(set(largest)) == 87
    for n in (1, 10, 33, 60):
        assert draw_queries(task, num_queries=n, query_seed=1)[0] == largest[:n]
    assert draw_queries(task, num_queries=33, query_seed=2)[0] != largest[:33]


def test_a_label_that_runs_out_is_filled_up_from_the_others():
    queries, _ = draw_queries(make_task((50, 4, 50)), num_queries=40, query_seed=1)
    assert Counter(q.label for q in queries) == {0: 18, 1: 4, 2: 18}


def test_a_fold_depends_on_the_prompt_alone():
    queries, _ = draw_queries(make_task((60, 60)), num_queries=60, query_seed=1)
    folds = {q.prompt: q.fold for q in queries}
    assert Counter(folds.values()) == {"A": 30, "B": 30}
    for other in draw_queries(make_task((80, 80, 80)), num_queries=240, query_seed=9)[0]:
        assert folds.get(other.prompt, other.fold) == other.fold


def test_queries_that_do_not_fit_are_left_out_counted_and_replaced_from_their_stratum():
    task = make_task((50, 50))
    everything, _ = draw_queries(task, num_queries=40, query_seed=1)
    unfit = {everything[0].id, everything[5].id}
    queries, num_left_out = draw_queries(task, num_queries=40, query_seed=1, fits=lambda e: e.id not in unfit)
    assert num_left_out == 2
    assert not unfit & {q.id for q in queries}
    assert Counter((q.label, q.fold) for q in queries) == Counter((q.label, q.fold) for q in everything)


def test_a_draw_holds_what_its_parts_are():
    task = make_task()
    made = draw(task, num_demonstrations=4, seed=1, order=2, num_queries=6, query_seed=5)
    assert made.demonstrations == draw_demonstrations(task, num_demonstrations=4, seed=1, order=2)
    assert (made.queries, made.num_queries_left_out) == draw_queries(task, num_queries=6, query_seed=5)
    assert (made.task, made.label_words) == ("made", ("word0", "word1"))


# --- draws of the reference

REFERENCE = Protocol(preset="reference")


def filed_task(num_train: int = 40, num_queries: int = 30) -> Task:
    """A task whose files repeat texts, within a split and across both."""
    own = OwnTask(name="filed", file="x.csv", template="Text: {text} Label:", labels={"a": "word0", "b": "word1"})
    train = [({"text": f"train {i % (num_train - 4)}"}, "ab"[i % 2]) for i in range(num_train)]
    queries = [({"text": f"query {i % (num_queries - 3)}"}, "ab"[i % 2]) for i in range(num_queries - 2)] + [({"text": f"TRAIN {i}"}, "a") for i in (1, 5)]
    return tasks._task("filed", own.template, own.labels, train, queries, "made here")


def hub_order(num: int, seed: int) -> list[int]:
    import datasets

    return datasets.Dataset.from_dict({"i": list(range(num))}).shuffle(seed=seed)["i"][:]


@pytest.mark.parametrize("seed", [0, 1, 2, 5, 12345])
def test_shuffled_demonstrations_are_the_first_rows_of_the_shuffled_file(seed):
    task = filed_task()
    wanted = [f"Text: train {i % 36} Label:" for i in hub_order(40, seed)]
    for k in (1, 8, 40):
        assert [e.prompt for e in draw_demonstrations(task, num_demonstrations=k, seed=seed, protocol=REFERENCE)] == wanted[:k]
    with pytest.raises(SweepError, match="num_demonstrations must be at most 40, the size of its train pool, got 41"):
        draw_demonstrations(task, num_demonstrations=41, seed=seed, protocol=REFERENCE)


def test_shuffled_queries_are_the_first_rows_of_the_shuffled_file_without_texts_of_the_train_split():
    task = filed_task()
    rows = [*(f"Text: query {i % 27} Label:" for i in range(28)), "Text: TRAIN 1 Label:", "Text: TRAIN 5 Label:"]
    wanted = [rows[i] for i in hub_order(30, 1) if "TRAIN" not in rows[i]]
    for num in (5, 28, 2000):
        queries, num_left_out = draw_queries(task, num_queries=num, query_seed=1, protocol=REFERENCE)
        assert [q.prompt for q in queries] == wanted[:num]
        assert num_left_out == 0
    assert all(q.fold == tasks.fold_of(q.prompt) for q in queries)


def test_shuffled_queries_that_do_not_fit_are_left_out_and_counted():
    task = filed_task()
    everything, _ = draw_queries(task, num_queries=2000, query_seed=3, protocol=REFERENCE)
    unfit = {everything[0].prompt, everything[7].prompt}
    queries, num_left_out = draw_queries(task, num_queries=2000, query_seed=3, fits=lambda e: e.prompt not in unfit, protocol=REFERENCE)
    assert [q.prompt for q in queries] == [q.prompt for q in everything if q.prompt not in unfit]
    assert num_left_out == sum(q.prompt in unfit for q in everything) >= 2
    with pytest.raises(SweepError, match="num_queries must be at most 0"):
        draw_queries(task, num_queries=4, query_seed=3, fits=lambda e: False, protocol=REFERENCE)


@pytest.mark.parametrize("order", range(5))
@pytest.mark.parametrize("seed", [3, 4])
def test_orders_of_the_reference_are_those_of_numpys_global_generator(seed, order):
    import numpy as np

    state = np.random.get_state()
    np.random.seed(seed)
    for_context = [np.random.permutation(8) for _ in range(5)]
    for_training = [np.random.permutation(8) for _ in range(5)]
    np.random.set_state(state)
    task = make_task()
    made = draw(task, num_demonstrations=8, seed=seed, order=order, num_queries=4, query_seed=1, protocol=Protocol(order_rule="separate"))
    base = draw_demonstrations(task, num_demonstrations=8, seed=seed)
    assert made.demonstrations == (tuple(base[i] for i in for_context[order]) if order else base)
    assert made.training == (tuple(base[i] for i in for_training[order]) if order else base)
    assert draw_demonstrations(task, num_demonstrations=8, seed=seed, order=order, protocol=Protocol(order_rule="separate")) == made.demonstrations


def test_a_shared_order_is_that_of_the_context_and_of_training():
    made = draw(make_task(), num_demonstrations=8, seed=1, order=3, num_queries=4, query_seed=1)
    assert made.training == made.demonstrations
    assert made.reordered == ()


def test_rows_stay_as_they_stand_in_the_files_and_clean_draws_know_nothing_of_them():
    task = filed_task()
    assert [e.texts for e in task.train_rows] == [(f"train {i % 36}",) for i in range(40)]
    assert (len(task.train_rows), len(task.query_rows)) == (40, 30)
    assert task.num_duplicates == 70 - len(task.train) - len(task.queries)
    without = Task(task.name, task.template, task.label_words, task.train, task.queries, task.origin, task.num_duplicates)
    options = {"num_demonstrations": 5, "seed": 1, "order": 1, "num_queries": 6, "query_seed": 1}
    assert draw(task, **options) == draw(without, **options)
