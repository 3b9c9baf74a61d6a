"""Tasks in one's own files: what is read, how it is split, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iclgd_dist import embedded, tasks
from iclgd_dist.config import EMBEDDED_TASKS, HUB_TASKS, OwnTask, SweepError
from iclgd_dist.tasks import Example, Task, load_task


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


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


def test_a_template_is_filled_once_and_trimmed():
    assert tasks.render("A {x} B {y} C {x}", {"x": "{y}", "y": "1"}) == "A {y} B 1 C {y}"
    assert tasks.render("{x} ", {"x": " spaced "}) == "spaced"
