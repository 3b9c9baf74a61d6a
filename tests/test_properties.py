"""Properties over made-up sweep files, labels, texts and grids: one message or a sweep, equal keys for equal meaning, other keys for another meaning.

Derandomised: the same examples everywhere. `tests/fuzz.py` is for the long and random tries.
"""

from __future__ import annotations

import csv
import json
import random
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as some

from iclgd_dist import plan as planning
from iclgd_dist.config import SweepError, load_sweep
from iclgd_dist.plan import Plan, count_cells, make_plan
from iclgd_dist.task_spec import OwnTask
from iclgd_dist.tasks import draw, fold_of, load_task, text_key
from tests.plans import Models, data_in
from tests.test_config import GOOD

small = settings(derandomize=True, max_examples=150, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
smaller = settings(small, max_examples=40)
SECONDS = 5.0  # that a file of a few kilobytes may take on a busy machine


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Return a folder with labelled files; models are made up, as in the tests of the plan."""
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as place:
        Models().stand_in(patch)
        yield data_in(Path(place))


def answer(folder: Path, content: bytes) -> Any:
    """Return the sweep, or None where it was refused in lines that begin with the file's name; anything else fails the test."""
    path = folder / "some.toml"
    path.write_bytes(content)
    started = time.monotonic()
    try:
        return load_sweep(path)
    except SweepError as error:
        assert all(line.startswith(str(path)) for line in str(error).split("\n") if line), error
        return None
    finally:
        assert time.monotonic() - started < SECONDS


# --- One message or a sweep

VALUES = (
    """0 -1 1.5 nan -inf 1e400 2026-01-01 true '' "\\u0000" [] [[]] {} [nan,nan] [1,1,1] ["1e-3"] [[1,2],[3]] {a={b=[1]}} 9223372036854775808 [true,1,1.0]"""
)
values = some.sampled_from([*VALUES.split(" "), "1" + "0" * 5000, "0x" + "f" * 5000, "[" * 500 + "]" * 500, "'" + "a" * 5000 + "'"])


@some.composite
def damaged(draws: some.DrawFn) -> str:
    """Return a good file of which some lines are gone, there twice, elsewhere, or set to something else."""
    lines = GOOD.split("\n")
    for _ in range(draws(some.integers(1, 4))):
        place = draws(some.integers(0, len(lines) - 1))
        line = lines.pop(place)
        name = line.partition("=")[0].strip() or "name"
        match draws(some.sampled_from(["gone", "twice", "moved", "value", "list", "key", "text"])):
            case "twice":
                lines[place:place] = [line, line]
            case "moved":
                lines.insert(draws(some.integers(0, len(lines))), line)
            case "value":
                lines.insert(place, f"{name} = {draws(values)}")
            case "list":
                lines.insert(place, f"{name} = [{draws(values)}, {draws(values)}]")
            case "key":
                lines[place:place] = [f"{draws(some.text('abeknost_.', min_size=1, max_size=8))} = 1", line]
            case "text":
                lines.insert(place, draws(some.text(max_size=30)))
    return "\n".join(lines)


@small
@given(damaged())
@example(GOOD.replace("[2, 4]", "[" + "1" * 5000 + "]"))
@example("a" + ".a" * 20_000 + " = 1\n" + GOOD)
@example(GOOD.replace("[1e-3, 1e-2]", f"[{', '.join(str(1 + n / 7) for n in range(30_000))}]"))
@example(GOOD + "\n".join(f"more{n} = 1" for n in range(3_000)))
@example(GOOD.replace("[1, 2]", "[" + ",\n".join([", ".join(["-1"] * 150)] * 900) + "]"))
@example(GOOD.replace("[1, 2]", f"[{', '.join(map(str, range(60_000)))}, 59999]"))
@example(GOOD + "\n".join(f"[[task]]\nname = 't{n}'\nfile = 'x.csv'\ntemplate = '{{a}}'\nlabels = {{a = 'b', c = 'd'}}" for n in range(9_000)))
def test_a_damaged_sweep_file_is_a_sweep_or_one_message_in_time(folder: Path, text: str) -> None:
    answer(folder, text.encode("utf-8", "replace"))


@small
@given(some.binary(max_size=60), some.integers(0, len(GOOD)))
def test_bytes_in_a_sweep_file_are_never_a_traceback(folder: Path, inserted: bytes, place: int) -> None:
    content = GOOD.encode()
    answer(folder, content[:place] + inserted + content[place:])
    answer(folder, inserted)


@small
@given(some.text(min_size=1, max_size=80), some.text(max_size=40), some.sampled_from(["file", "source"]))
@example("~nobody-of-this-name/model", "", "source")
@example("n" * 5000, "", "source")
@example("n" * 5000, "", "file")
def test_any_name_of_a_file_or_a_model_is_refused_in_one_message(folder: Path, name: str, more: str, where: str) -> None:
    from iclgd_dist import sources

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "identify", sources.identify if where == "source" else planning.identify)
        patch.setattr(sources, "_identify_hub", lambda source, revision: (_ for _ in ()).throw(SweepError("no hub")))
        values = {"source": "first", "file": "train.csv"} | {where: name}
        sweep = answer(folder, plain(tiny(source=values["source"], file=values["file"], template=f"{more}{{text}}")).encode("utf-8", "replace"))
        if sweep is not None:
            try:
                make_plan(sweep)
            except SweepError as error:
                assert str(error)


# --- Equal meaning, equal keys


def tiny(**changes: Any) -> dict[str, Any]:
    """Return what a small sweep file says, by key; a name with two underscores leads into a section."""
    values: dict[str, Any] = {
        "name": "tiny",
        "tasks": ["fruit"],
        "seeds": [1, 3],
        "num_demonstrations": [2],
        "num_queries": 6,
        "steps": [1, 2],
        "learning_rates": {"vanilla": [1e-3, 0.25], "layer_causal": [3.0]},
        "models": {"source": changes.pop("source", "first")},
        "task": {
            "name": "fruit",
            "file": changes.pop("file", "train.csv"),
            "query_file": "queries.csv",
            "template": changes.pop("template", "Is {text} sweet?"),
        },
        "labels": {"y": "Yes", "n": "No"},
    }
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (values.setdefault(section, {}) if section else values)[key] = value
    return values


def shown(value: Any, choose: random.Random) -> str:
    """Return a value as TOML, a number in one of its spellings."""
    if isinstance(value, float):
        spellings = [repr(value), f"{value:.17e}", f"+{value!r}", f"{value:.25f}", f"{value:.20E}"]
        return choose.choice([text for text in spellings if float(text) == value])
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return choose.choice([str(value), f"+{value}", f"0x{value:x}"])
    if isinstance(value, list):
        gap = choose.choice([", ", ",", " , ", ",\n  # a comment\n "])
        return f"[{gap.join(shown(each, choose) for each in value)}{choose.choice(['', ', '])}]" if value else "[]"
    return json.dumps(value)


def plain(values: dict[str, Any], choose: random.Random | None = None) -> str:
    """Write a sweep file, in an order, with spellings and comments of `choose`'s choice."""
    choose, is_chosen = choose or random.Random(0), choose is not None

    def lines(of: dict[str, Any]) -> str:
        items = list(of.items())
        if is_chosen:
            choose.shuffle(items)
        remark = (lambda: choose.choice(["", "", " # so", "\n", "\n# [nothing]\n"])) if is_chosen else (lambda: "")
        return "".join(f"{remark()}\n{key}{choose.choice([' = ', '=']) if is_chosen else ' = '}{shown(value, choose)}{remark()}" for key, value in items) + "\n"

    top = {key: value for key, value in values.items() if not isinstance(value, dict)}
    rest = [(key, value) for key, value in values.items() if isinstance(value, dict) and key != "labels"]
    if is_chosen:
        choose.shuffle(rest)
    text = lines(top)
    for key, value in rest:
        text += f"\n[[{key}]]" if key in ("models", "task", "method") else f"\n[{key}]"
        text += lines(value)
        if key == "task":
            text += "[task.labels]" + "".join(f"\n{label} = {shown(word, choose)}" for label, word in values["labels"].items()) + "\n"
    return text


def planned(folder: Path, content: bytes) -> Plan:
    sweep = answer(folder, content)
    assert sweep is not None, content
    return make_plan(sweep)


AXES = {
    "seeds": some.lists(some.integers(0, 2**63 - 1), min_size=1, max_size=3, unique=True),
    "num_demonstrations": some.lists(some.integers(2, 8), min_size=1, max_size=2, unique=True),
    "steps": some.lists(some.integers(1, 2), min_size=1, max_size=2, unique=True),
    "learning_rates__vanilla": some.lists(some.floats(1e-300, 1e300), min_size=1, max_size=3, unique=True),
    "orders": some.integers(1, 3),
    "num_queries": some.integers(2, 12),
    "protocol__separator": some.sampled_from(["newline", "eos", "none"]),
    "models__compute_dtype": some.sampled_from(["float32", "float64"]),
    "template": some.sampled_from(["{text} ?", "Is {text}\tsweet?\n", "é {text} \u202e"]),
}
grids = some.fixed_dictionaries({}, optional=AXES)


@smaller
@given(grids, some.randoms(use_true_random=False), some.booleans(), some.booleans())
def test_files_that_mean_the_same_have_the_same_keys(folder: Path, changes: dict[str, Any], choose: random.Random, has_crlf: bool, has_mark: bool) -> None:
    values = tiny(**changes)
    expected = planned(folder, plain(values).encode())
    again = {key: choose.sample(value, len(value)) if key in ("seeds", "steps", "num_demonstrations") else value for key, value in values.items()}
    again["learning_rates"] = {name: choose.sample(rates, len(rates)) for name, rates in values["learning_rates"].items()}
    text = plain(again, choose)
    content = (text.replace("\n", "\r\n") if has_crlf else text).encode()
    assert set(planned(folder, (b"\xef\xbb\xbf" if has_mark else b"") + content).keys) == set(expected.keys)


# --- Another meaning, other keys

EVERY, DRAWN, TRAINED = "zero_shot icl finetuned", "icl finetuned", "finetuned"
CHANGES: list[tuple[str, dict[str, Any], str]] = [
    ("num_queries", {"num_queries": 7}, EVERY),
    ("query_seed", {"query_seed": 2}, EVERY),
    ("model", {"source": "second"}, EVERY),
    ("template", {"template": "Is {text}  sweet?"}, EVERY),
    ("word", {"labels__y": "Yes!"}, EVERY),
    *((f"models.{name}", {f"models__{name}": value}, EVERY) for name, value in {"compute_dtype": "bfloat16", "storage_dtype": "float16", "tf32": True}.items()),
    ("deterministic", {"models__deterministic": True}, EVERY),
    *((f"init {init}", {"models__init": init, "models__init_seeds": [0]}, EVERY) for init in ("random", "norms", "embeddings_norms")),
    ("init_seed", {"models__init": "norms", "models__init_seeds": [1]}, EVERY),
    ("init_scheme", {"models__init": "norms", "models__init_seeds": [0], "models__init_scheme": "fairseq"}, EVERY),
    ("separator", {"protocol__separator": "eos"}, EVERY),
    ("loss_tokens", {"protocol__loss_tokens": "label"}, EVERY),
    ("seeds", {"seeds": [2, 4]}, DRAWN),
    ("num_demonstrations", {"num_demonstrations": [3]}, DRAWN),
    ("orders", {"runs": [[1, 1], [3, 1]]}, DRAWN),
    ("learning_rates", {"learning_rates__vanilla": [1e-3 * (1 + 2**-52), 0.25 * (1 - 2**-53)], "learning_rates__layer_causal": [3.0000000000000004]}, TRAINED),
    ("train_on", {"controls__train_on": ["random_labels"]}, TRAINED),
    ("weights", {"method__name": "vanilla2", "method__base": "vanilla", "method__weights": "mlp"}, ""),
]


def kinds_of(plan: Plan) -> dict[str, str]:
    return {cell.key: cell.kind for block in plan.blocks for cell in block.cells}


def test_a_change_of_one_value_changes_the_keys_of_all_that_it_matters_to_and_no_two_changes_meet(folder: Path) -> None:
    before = kinds_of(planned(folder, plain(tiny()).encode()))
    met: dict[str, str] = {}
    for name, changes, kinds in CHANGES:
        values = tiny(**changes)
        if "runs" in changes:
            del values["seeds"]
        after = kinds_of(planned(folder, plain(values).encode()))
        shared = {before[key] for key in after if key in before}
        assert shared.isdisjoint(kinds.split()), name
        assert kinds == "" or shared == {"zero_shot", "icl", "finetuned"} - set(kinds.split()), name
        for key in after.keys() - before.keys():
            assert met.setdefault(key, name) == name, f"{name} and {met[key]} have a key in common"


@smaller
@given(some.lists(some.floats(5e-324, 1e300), min_size=1, max_size=12))
def test_each_learning_rate_has_cells_of_its_own(folder: Path, rates: list[float]) -> None:
    plan = planned(folder, plain(tiny(learning_rates__vanilla=rates, learning_rates__layer_causal=[1.0], seeds=[1])).encode())
    trained = [cell for block in plan.blocks for cell in block.cells if cell.method == "vanilla"]
    assert {cell.learning_rate for cell in trained} == set(rates)
    assert len({cell.key for cell in trained}) == len(trained) == 2 * len(set(rates))


# --- Grids


@smaller
@given(grids, some.randoms(use_true_random=False))
def test_a_plan_has_each_grid_point_once_and_what_is_finished_is_left_out_and_nothing_else(
    folder: Path, changes: dict[str, Any], choose: random.Random
) -> None:
    values = tiny(**changes)
    plan = planned(folder, plain(values).encode())
    num_runs, rates = len(values["seeds"]) * values.get("orders", 1), values["learning_rates"]
    num_rates = len(set(rates["vanilla"])) + len(rates["layer_causal"])
    expected = 1 + sum(num_runs * (1 + num_rates * sum(step <= k for step in values["steps"])) for k in values["num_demonstrations"])
    assert len(plan.keys) == len(set(plan.keys)) == plan.num_cells == expected == count_cells(load_sweep(folder / "some.toml"))[0]
    done = set(choose.sample(plan.keys, choose.randrange(len(plan.keys) + 1)))
    rest = make_plan(load_sweep(folder / "some.toml"), done)
    assert {cell.key for block in rest.blocks for cell in block.cells} == set(plan.keys) - done
    assert (rest.keys, rest.num_done, rest.num_to_run) == (plan.keys, len(done), len(plan.keys) - len(done))


# --- Labels and texts

texts = some.text(some.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1, max_size=12).filter(lambda text: text.strip())


@small
@given(some.lists(some.tuples(texts, some.sampled_from(["é", "null", "1", "\U0001f600"])), min_size=1, max_size=30), some.booleans())
def test_texts_come_out_of_a_file_as_they_went_in_and_no_query_is_a_demonstration(rows: list[tuple[str, str]], has_crlf: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\r\n" if has_crlf else "\n").writerows([("text", "label"), *rows])
        (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
        words = {"é": "Acute", "null": "Nothing", "1": "One", "\U0001f600": "Smile"}
        tasks = [
            load_task("x", own=OwnTask(name="x", file=name, template="{text}", label_field="label", labels=words), folder=folder)
            for name in ("x.csv", "x.jsonl")
        ]
    assert tasks[0].train == tasks[1].train and tasks[0].queries == tasks[1].queries
    task = tasks[1]
    expected = {text_key(text.strip()) for text, _ in rows if len({label for other, label in rows if text_key(other.strip()) == text_key(text.strip())}) == 1}
    pool = [text_key(row.prompt) for row in (*task.train, *task.queries)]
    assert sorted(pool) == sorted(expected)
    known = {(text.strip(), list(words).index(label)) for text, label in rows}
    assert all((row.prompt, row.label) in known for row in (*task.train, *task.queries))
    for k, num_queries in product(range(len(task.train) + 1), range(len(task.queries) + 1)):
        drawn = draw(task, num_demonstrations=k, seed=3, order=1, num_queries=num_queries, query_seed=2)
        assert (len(drawn.demonstrations), len(drawn.queries)) == (k, num_queries)
        assert not {text_key(row.prompt) for row in drawn.demonstrations} & {text_key(query.prompt) for query in drawn.queries}
        assert all(query.fold == fold_of(query.prompt) for query in drawn.queries)


@small
@given(some.binary(max_size=80), some.sampled_from(["csv", "tsv", "jsonl", "parquet"]))
@example(b'{"text": ' + b"[" * 100_000, "jsonl")
@example(b'{"text": 1' + b"0" * 5000 + b"}", "jsonl")
@example(b'text,label\n"a', "csv")
def test_a_file_of_any_bytes_is_a_task_or_one_message(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / f"x.{suffix}").write_bytes(b"text,label\n" * (suffix == "csv") + content)
        own = OwnTask(name="x", file=f"x.{suffix}", template="{text}", labels={"a": "A", "b": "B"})
        try:
            load_task("x", own=own, folder=Path(place))
        except SweepError as error:
            assert f"x.{suffix}" in str(error) or "every label needs a word" in str(error)
