"""The sweep file: every mistake is named with its line, and files that mean the same are the same sweep."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from iclgd_dist.config import MAX_FILE_BYTES, Sweep, SweepError, load_sweep
from iclgd_dist.toml_text import unknown

GOOD = """# A comment on top.
name = "small"
tasks = ["trec", "fruit"]
seeds = [1, 2]
num_demonstrations = 4
steps = [2, 4]

[learning_rates]
vanilla = [1e-3, 1e-2]
layer_causal = [1e-4]

[[models]]
source = "first"

[[models]]
source = "second"
compute_dtype = "float64"

[[task]]
name = "fruit"
file = "fruit.csv"
template = "Is {text} sweet?"
[task.labels]
sweet = "Yes"
sour = "No"
"""


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "x.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def load(folder: Path, *changes: tuple[str, str]) -> Sweep:
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return load_sweep(write(folder, text))


def problems(folder: Path, text: str | bytes) -> list[str]:
    """Return the lines of the message, without the file's name."""
    path = write(folder, text)
    with pytest.raises(SweepError) as caught:
        load_sweep(path)
    return [line.removeprefix(f"{path}:").strip() for line in str(caught.value).splitlines()]


def test_a_good_file_is_read_as_it_is_written(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    assert (sweep.name, sweep.tasks, sweep.methods, sweep.seeds, sweep.steps) == ("small", ("trec", "fruit"), ("vanilla", "layer_causal"), (1, 2), (2, 4))
    assert sweep.learning_rates == {"vanilla": (1e-3, 1e-2), "layer_causal": (1e-4,)}
    assert [(model.source, model.compute_dtype) for model in sweep.models] == [("first", "float32"), ("second", "float64")]
    assert (sweep.folder, sweep.warnings) == (tmp_path, ())
    assert (sweep.orders, sweep.num_queries, sweep.num_demonstrations) == (1, 200, (4,))


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("name = \"small\"", "name = 'a b'", 2, "name must be at most 80 letters, digits, '_', '-' and '.', the first a letter or digit, got 'a b'"),
        ("name = \"small\"", "name = 5", 2, "name must be text, got 5"),
        ('"trec"', '"terc"', 3, "unknown task 'terc'; did you mean 'trec'?; known: agnews, "),
        ('"trec"', "7", 3, "tasks must be text, got 7"),
        ('["trec", "fruit"]', "[]", 3, "tasks: at least 1 is required, got none"),
        ('["trec", "fruit"]', '[\n  "trec",  # one\n\n  "friut"]', 6, "unknown task 'friut'; did you mean 'fruit'?; known: "),
        ("[1, 2]", "[1, -2]", 4, "seeds must be at least 0, got -2"),
        ("[1, 2]", "[1, 9223372036854775808]", 4, "seeds must be less than 9223372036854775808, got 9223372036854775808"),
        ("[1, 2]", "[3, 1, 3]", 4, "seeds must be distinct, got 3 more than once"),
        ("[1, 2]", "[1, true]", 4, "seeds must be whole numbers, got true"),
        ("[1, 2]", '[\n1,\n2,\n"3"\n]', 7, "seeds must be whole numbers, got '3'"),
        ("num_demonstrations = 4", "num_demonstrations = 0", 5, "num_demonstrations must be at least 1, got 0"),
        ("[2, 4]", "[2, 1.5]", 6, "steps must be whole numbers, got 1.5"),
        ("[2, 4]", "[0, 4]", 6, "steps must be at least 1, got 0"),
        ("[2, 4]", "-2", 6, "steps must be at least 1, got -2"),
        ("[2, 4]", "[2, 5]", 6, "steps must lie in 1..4 (4 demonstrations / batch 1 x 1 epoch), got 5"),
        ("[2, 4]", "[2, 4]\nnum_querys = 3", 7, "unknown key 'num_querys'; did you mean 'num_queries'?; known: analysis, "),
        ("[2, 4]", "[2, 4]\nfolder = '/'", 7, "unknown key 'folder'; "),
        ("[2, 4]", "[2, 4]\nmethods = ['vanila']", 7, "unknown method 'vanila'; did you mean 'vanilla'?; known: layer_causal, layer_causal_attn, vanilla"),
        ("[2, 4]", "[2, 4]\nmethods = []", 7, "methods: at least 1 is required, got none"),
        ("[2, 4]", "[2, 4]\norders = 0", 7, "orders must be at least 1, got 0"),
        ("[2, 4]", "[2, 4]\nnum_queries = 2.0", 7, "num_queries must be a whole number, got 2.0"),
        ("[2, 4]", "[2, 4]\nprotocol = 3", 7, "protocol must be a table, [protocol], got 3"),
        ("[1e-3, 1e-2]", "[1e-3, -1e-2]", 9, "learning_rates.vanilla must be greater than 0, got -0.01"),
        ("[1e-3, 1e-2]", "[1e-3,\n 0]", 10, "learning_rates.vanilla must be greater than 0, got 0; [controls] zero_learning_rate = true allows 0 as a control"),
        ("[1e-3, 1e-2]", "[nan]", 9, "learning_rates.vanilla must be finite, got nan"),
        ("[1e-3, 1e-2]", "[inf]", 9, "learning_rates.vanilla must be finite, got inf"),
        ("[1e-3, 1e-2]", '["1e-3"]', 9, "learning_rates.vanilla must be numbers, got '1e-3'"),
        ("[1e-3, 1e-2]", "[true]", 9, "learning_rates.vanilla must be numbers, got true"),
        ("[1e-3, 1e-2]", "[1" + "0" * 400 + "]", 9, "learning_rates.vanilla must be "),
        ("[1e-3, 1e-2]", "[]", 9, "learning_rates.vanilla: at least 1 is required, got none"),
        ("[1e-4]", "[1e-4]\nseeds = [3]", 11, "learning_rates: unknown method 'seeds'; known: layer_causal, layer_causal_attn, vanilla (seeds of the sweep itself must stand above the first [section])"),
        ("layer_causal = [1e-4]", "", 8, "learning_rates.layer_causal is required, as 'layer_causal' is one of the methods; got none"),
        ('source = "second"', "source = ''", 16, "models.source must be text that is not empty, got ''"),
        ('source = "second"', "revision = 'main'", 15, "models.source is required, got nothing"),
        ('"float64"', '"half"', 17, "models.compute_dtype must be 'float64', 'float32', 'bfloat16' or 'float16', got 'half'"),
        ("compute_dtype", "compute_type", 17, "unknown key 'compute_type' in [[models]]; did you mean 'compute_dtype'?; known: compute_dtype, deterministic, init, init_scheme, init_seeds, revision, source, storage_dtype, tf32"),
        ('"float64"', '"float64"\ninit = "norm"', 18, "models.init must be 'trained', 'random', 'embeddings_norms' or 'norms', got 'norm'"),
        ('"float64"', '"float64"\ninit = "norms"', 15, "models.init_seeds are required, one for each replicate, as init = 'norms'; got none"),
        ('"float64"', '"float64"\ninit = "norms"\ninit_seeds = [0, 1, 0]', 19, "models.init_seeds must be distinct, got 0 more than once"),
        ('"float64"', '"float64"\ninit = "norms"\ninit_seeds = -1', 19, "models.init_seeds must be at least 0, got -1"),
        ('"float64"', '"float64"\ninit_seeds = [1]', 18, "models.init_seeds are for untrained models; init = 'random', 'embeddings_norms' or 'norms' makes one, got 'trained'"),
        ('"float64"', '"float64"\ninit_scheme = "fairseq"', 18, "models.init_scheme 'fairseq' is for untrained models; init = 'random', "),
        ('sour = "No"', 'sour = "No"\n[capture]\nkeep = "some"', 27, "capture.keep must be 'none', 'final_step' or 'all', got 'some'"),
        ('name = "fruit"', 'name = "trec"', 20, "task 'trec' is the name of another task; choose one of its own"),
        ("{text}", "it", 22, "task.template must hold at least one {column}"),
        ('sour = "No"', "sour = 0", 25, "task.labels.sour must be text, got 0"),
        ('sour = "No"', 'sour = "Yes"', 23, "task.labels must map each label to its own non-empty word, got ['Yes', 'Yes']"),
        ('sour = "No"', 'sour = "No"\n[resources]\ncpus_per_actor = 0', 27, "resources.cpus_per_actor must be at least 1, got 0"),
        ('sour = "No"', 'sour = "No"\n[resources]\nsteps = 1', 27, "unknown key 'steps' in [resources]; known: cpus_per_actor, "),
        ('sour = "No"', 'sour = "No"\n[controls]\nzero_learning_rate = 1', 27, "controls.zero_learning_rate must be true or false, got 1"),
        ('sour = "No"', 'sour = "No"\n[analysis]\nsmallest_effect = inf', 27, "analysis.smallest_effect must be finite, got inf"),
        *(
            ('sour = "No"', f'sour = "No"\n[protocol]\nsink = "bos"\n{name} = {value}', 28, f"protocol.{name} must be {required}, got ")
            for name, value, required in [
                ("preset", '"refrence"', "'clean' or 'reference'"),
                ("separator", '"space"', "'newline', 'eos' or 'none'"),
                ("leading_separator", '"no"', "true or false"),
                ("record_position", '"last"', "'last_prompt' or 'label'"),
                ("loss_tokens", '"labels"', "'all' or 'label'"),
                ("truncation", "true", "'refuse' or 'greedy'"),
                ("order_rule", '"both"', "'shared' or 'separate'"),
                ("demonstration_draw", '"random"', "'hashed', 'balanced' or 'shuffled'"),
                ("query_draw", "1", "'balanced' or 'shuffled'"),
                ("label_tokens", '"apart"', "'joint' or 'separate'"),
                ("line_breaks", '"\\n"', "'text' or 'eos'"),
                ("first_layer", "0", "'skip' or 'count'"),
                ("undefined", "1e-8", "'null' or 'eps'"),
            ]
        ),
        ('sour = "No"', 'sour = "No"\n[protocol]\nsink = "pad"', 27, "protocol.sink must be 'auto', 'bos' or 'eos', got 'pad'"),
        ('sour = "No"', 'sour = "No"\n[protocol]\npresets = "clean"', 27, "unknown key 'presets' in [protocol]; did you mean 'preset'?; known: "),
        ('sour = "No"', 'sour = "No"\n[controls]\ncontexts = ["other_drew"]', 27, "controls.contexts must be 'other_draw', 'random_labels', 'flipped_labels', 'other_task', 'shuffled_words', 'separator' or 'shifted', got 'other_drew'"),
        ('sour = "No"', 'sour = "No"\n[controls]\ncontexts = 3', 27, "controls.contexts must be true, false or a list of names, got 3"),
        ('sour = "No"', 'sour = "No"\n[controls]\ncontrol_task = "terc"', 27, "unknown task 'terc'; did you mean 'trec'?; known: agnews, "),
        ('sour = "No"', 'sour = "No"\n[controls]\ntrain_on = ["true", "false"]', 27, "controls.train_on must be 'true', 'random_labels', 'other_task' or 'shuffled_words', got 'false'"),
        ('sour = "No"', 'sour = "No"\n[controls]\ntrain_on = []', 27, "controls.train_on must name at least 1, got none"),
        ('sour = "No"', 'sour = "No"\n[controls]\nrandom_delta = "yes"', 27, "controls.random_delta must be true or false, got 'yes'"),
        ("seeds = [1, 2]", "runs = [1, 2]", 4, "runs must be pairs of a seed and an order, such as [[2, 0], [3, 1]], got [1, 2]"),
        ("seeds = [1, 2]", "runs = [[1, 0],\n[2]]", 4, "runs must be pairs of a seed and an order, such as "),
        ("seeds = [1, 2]", "runs = []", 4, "runs: at least 1 is required, got none"),
        ("seeds = [1, 2]", "runs = [[1, 0],\n[2, -1]]", 5, "runs must be at least 0, got -1"),
        ("seeds = [1, 2]", "runs = [[1, 0],\n[2, 1.5]]", 5, "runs must be whole numbers, got 1.5"),
        ("seeds = [1, 2]", "runs = [[1, 0],\n[2, 1],\n[1, 0]]", 6, "runs must be distinct, got [1, 0] more than once"),
        ("[1, 2]", "[1, 2]\nruns = [[1, 0]]", 5, "runs must stand alone: it takes the place of seeds and orders, got seeds too"),
        ('sour = "No"', 'sour = "No"\n[per_task.sst2]\nruns = [[1, 0]]', 26, "unknown task 'sst2'; known: fruit, trec"),
        ('sour = "No"', 'sour = "No"\n[per_task.trec]\nrun = [[1, 0]]', 27, "unknown key 'run' in [per_task.trec]; did you mean 'runs'?; known: learning_rates, runs"),
        ('sour = "No"', 'sour = "No"\n[per_task.trec]\nruns = [[1, 0], [1, 0]]', 27, "per_task.trec.runs must be distinct, got [1, 0] more than once"),
        ('sour = "No"', 'sour = "No"\n[per_task.trec]\nlearning_rates = [1e-3, 0]', 27, "per_task.trec.learning_rates must be greater than 0, got 0; [controls] "),
        ('sour = "No"', 'sour = "No"\n[per_task.trec.learning_rates]\nvanila = 1e-3', 27, "per_task.trec.learning_rates: unknown method 'vanila'; did you mean 'vanilla'?"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_once_with_its_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert GOOD.count(old) == 1
    (found,) = problems(tmp_path, GOOD.replace(old, new))
    assert found.startswith(f"{line}: {message}"), found


def test_all_mistakes_are_named_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD.replace("[1, 2]", "[]").replace("[2, 4]", "[9]").replace('"float64"', "8").replace("[1e-4]", "[]"))
    assert [line.split(":")[0] for line in found] == ["4", "6", "10", "17"]


def test_a_mistake_in_one_list_for_all_methods_is_named_once(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("[learning_rates]")]
    rest = GOOD[GOOD.index("[[models]]") :]
    assert problems(tmp_path, f"{text}learning_rates = [1e-3,\n'x']\n{rest}") == ["9: learning_rates must be numbers, got 'x'"]
    assert problems(tmp_path, f"{text}learning_rates = []\n{rest}") == ["8: learning_rates: at least 1 is required, got none"]
    assert problems(tmp_path, f"{text}learning_rates = -1\n{rest}") == ["8: learning_rates must be greater than 0, got -1"]


def test_models_and_tasks_that_are_no_tables_are_said_to_be_tables(tmp_path: Path) -> None:
    head = GOOD[: GOOD.index("[[models]]")].replace("[learning_rates]", "models = ['a']\n[learning_rates]")
    assert problems(tmp_path, head.replace(', "fruit"', "")) == ["8: models must be tables, [[models]], got 'a'"]
    assert problems(tmp_path, head.replace("models = ['a']", "models = [\n{source = 'a'},\n{source = 'b', compute_type = 1}\n]").replace(', "fruit"', "")) == [
        "10: unknown key 'compute_type' in [[models]]; did you mean 'compute_dtype'?; known: compute_dtype, deterministic, init, init_scheme, init_seeds, revision, source, storage_dtype, tf32"
    ]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    found = problems(tmp_path, "name = 'x'\n")
    assert found == [f"1: {key} is required, got nothing" for key in ("learning_rates", "models", "seeds", "steps", "tasks")]


def test_what_is_not_toml_has_a_line_and_a_column(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD.replace("seeds = [1, 2]", "seeds [1, 2]")) == ["4:7: is not TOML: Expected '=' after a key in a key/value pair"]
    assert problems(tmp_path, GOOD.replace("seeds = [1, 2]", "seeds = [1, 2]\nseeds = [3]")) == ["5:12: is not TOML: seeds is set twice"]
    assert problems(tmp_path, "name = '''") == ["is not TOML: Expected \"'''\" (at end of document)"]
    assert "nested too deeply" in problems(tmp_path, "a = " + "[" * 20_000)[0]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    for text in ("", " \n\n", "\ufeff"):
        assert problems(tmp_path, text) == ["is empty; see sweeps/demo.toml for an example"]
    assert all("is required" in line for line in problems(tmp_path, "# only a comment\n"))


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path) -> None:
    assert problems(tmp_path, b"name = 'x'\n# \xff\n") == ["2: must be UTF-8, got byte 0xff"]


def test_crlf_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    plain = load(tmp_path)
    other = load_sweep(write(tmp_path, b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode()))
    assert other == plain
    assert other.digest() == plain.digest()
    assert problems(tmp_path, GOOD.replace("[2, 4]", "[9]").replace("\n", "\r\n"))[0].startswith("6: steps must lie in 1..4")


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    assert problems(tmp_path, GOOD + "#" * (MAX_FILE_BYTES - len(GOOD))) == ["a sweep file has less than 1,000,000 bytes, got 1,000,000"]
    assert load_sweep(write(tmp_path, GOOD + "#" * (MAX_FILE_BYTES - len(GOOD) - 1))).name == "small"


def test_a_long_list_with_a_mistake_is_refused_in_time(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, GOOD.replace("[1, 2]", "[\n" + "1,\n" * 100_000 + "]"))
    assert "seeds must be distinct, got 1 more than once" in found


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="is a directory; a sweep file"):
        load_sweep(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SweepError, match="is no regular file"):
        load_sweep(tmp_path / "pipe")
    write(tmp_path, GOOD)
    with pytest.raises(SweepError, match=r"x2\.toml: no such file; did you mean .*x\.toml\?"):
        load_sweep(tmp_path / "x2.toml")
    with pytest.raises(SweepError, match=r"no such file$"):
        load_sweep(tmp_path / "nowhere" / "other")
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "sweeps" / "forgotten.toml").write_text(GOOD)
    with pytest.raises(SweepError, match=r"did you mean .*sweeps/forgotten\.toml\?"):
        load_sweep(tmp_path / "forgotten.toml")


def test_grid_values_written_twice_count_once_with_a_warning(tmp_path: Path) -> None:
    plain = load(tmp_path)
    twice = load(tmp_path, ("[1e-3, 1e-2]", "[0.001, 1e-2, 1e-3]"), ("[2, 4]", "[4, 2, 2]"), ('"trec"', '"trec", "trec"'))
    assert twice.warnings == (
        "tasks: trec is there more than once and counts once",
        "steps: 2 is there more than once and counts once",
        "learning_rates.vanilla: 0.001 is there more than once and counts once",
    )
    assert twice == plain.model_copy(update={"warnings": twice.warnings})


def test_files_that_mean_the_same_have_the_same_digest(tmp_path: Path) -> None:
    plain = load(tmp_path)
    for changes in (
        [("[2, 4]", "[4, 2]")],
        [("[1e-3, 1e-2]", "[0.01, 0.001]")],
        [('["trec", "fruit"]', '["fruit", "trec"]')],
        [("[1, 2]", "[2, 1]")],
        [("num_demonstrations = 4", "num_demonstrations = [4]\nnum_queries = 200")],
        [("# A comment on top.", "methods = ['layer_causal', 'vanilla']")],
        [('sour = "No"', 'sour = "No"\n[resources]\nmax_actors = 3')],
        [('sour = "No"', 'sour = "No"\n[capture]\nkeep = "all"')],
    ):
        assert load(tmp_path, *changes).digest() == plain.digest(), changes
    for changes in ([("[2, 4]", "[4]")], [("[1, 2]", "[1, 3]")], [('"No"', '"Not"')], [('"first"', '"third"')], [("[1e-4]", "[2e-4]")]):
        assert load(tmp_path, *changes).digest() != plain.digest(), changes


def test_one_list_of_learning_rates_is_the_same_list_for_every_method(tmp_path: Path) -> None:
    head, rest = GOOD[: GOOD.index("[learning_rates]")], GOOD[GOOD.index("[[models]]") :]
    per_method = load_sweep(write(tmp_path, f"{head}[learning_rates]\nvanilla = [1e-3, 1]\nlayer_causal = [1, 0.001]\n{rest}"))
    one_list = load_sweep(write(tmp_path, f"{head}learning_rates = [1e-3, 1.0]\n{rest}"))
    assert one_list == per_method
    assert one_list.digest() == per_method.digest()
    only = load_sweep(write(tmp_path, f"methods = 'vanilla'\n{head}[learning_rates]\nvanilla = 1\nlayer_causal = [3]\n{rest}"))
    assert only.learning_rates == {"vanilla": (1.0,)}


def test_a_key_that_a_faulty_task_may_define_is_not_reported_too(tmp_path: Path) -> None:
    assert [line.split(":")[0] for line in problems(tmp_path, GOOD.replace('file = "fruit.csv"', "file = 1"))] == ["21"]


def test_zero_is_a_learning_rate_where_the_control_is_asked_for(tmp_path: Path) -> None:
    sweep = load(tmp_path, ("[1e-4]", "[0, 1e-4]"), ('sour = "No"', 'sour = "No"\n[controls]\nzero_learning_rate = true'))
    assert sweep.learning_rates["layer_causal"] == (0.0, 1e-4)


def test_an_untrained_model_is_a_model_for_each_of_its_seeds(tmp_path: Path) -> None:
    sweep = load(
        tmp_path,
        ('source = "second"', 'source = "second"\ninit = "norms"\ninit_seeds = [3, 1]'),
        ('source = "first"', 'source = "first"\ninit_scheme = "model"'),
    )
    assert [(m.source, m.compute_dtype, m.init, m.init_scheme, m.init_seed) for m in sweep.models] == [
        ("first", "float32", "trained", "model", None),
        ("second", "float64", "norms", "model", 3),
        ("second", "float64", "norms", "model", 1),
    ]
    one = load(tmp_path, ('source = "second"', 'source = "second"\ninit = "norms"\ninit_seeds = 3'))
    assert one.models == sweep.models[:2]
    assert one.digest() != sweep.digest()


def test_runs_take_the_place_of_seeds_and_orders(tmp_path: Path) -> None:
    grid = load(tmp_path, ("[1, 2]", "[1, 2]\norders = 2"))
    pairs = load(tmp_path, ("seeds = [1, 2]", "runs = [[2, 1], [1, 0], [2, 0], [1, 1]]"))
    assert set(pairs.runs_of("trec")) == set(grid.runs_of("trec")) == {(1, 0), (1, 1), (2, 0), (2, 1)}
    assert pairs.num_runs("trec") == grid.num_runs("trec") == 4
    assert pairs.digest() == grid.digest() != load(tmp_path).digest()
    assert load(tmp_path, ("seeds = [1, 2]", "runs = [[2, 1], [1, 0], [2, 0]]")).digest() != grid.digest()


def test_a_task_may_have_runs_and_learning_rates_of_its_own(tmp_path: Path) -> None:
    own = "[per_task.fruit]\nruns = [[7, 1], [8, 0]]\n[per_task.fruit.learning_rates]\nvanilla = [5, 4]\n[[models]]\nsource = 'third'\n"
    sweep = load(tmp_path, ('[[task]]\nname = "fruit"', f'{own}\n[[task]]\nname = "fruit"'))
    assert sweep.runs_of("fruit") == ((7, 1), (8, 0))
    assert sweep.runs_of("trec") == ((1, 0), (2, 0))
    assert sweep.rates_of("fruit") == {"vanilla": (4.0, 5.0), "layer_causal": (1e-4,)}
    assert sweep.rates_of("trec") == sweep.learning_rates == {"vanilla": (1e-3, 1e-2), "layer_causal": (1e-4,)}
    for_all = load(tmp_path, ('[[task]]\nname = "fruit"', '[per_task.fruit]\nlearning_rates = 3\n\n[[task]]\nname = "fruit"'))
    assert for_all.rates_of("fruit") == {"vanilla": (3.0,), "layer_causal": (3.0,)}
    assert for_all.runs_of("fruit") == for_all.runs_of("trec")
    same = load(tmp_path, ('[[task]]\nname = "fruit"', '[per_task.fruit]\nruns = [[2, 0], [1, 0]]\n\n[[task]]\nname = "fruit"'))
    assert same.digest() == load(tmp_path).digest() != for_all.digest()


def test_orders_beyond_the_permutations_of_the_reference_are_refused(tmp_path: Path) -> None:
    reference = ('sour = "No"', 'sour = "No"\n[protocol]\npreset = "reference"')
    assert load(tmp_path, reference, ("[1, 2]", "[1, 2]\norders = 5")).protocol.order_rule == "separate"
    for old, new in (("[1, 2]", "[1, 2]\norders = 6"), ("seeds = [1, 2]", "runs = [[1, 5]]")):
        with pytest.raises(SweepError, match=r':2[67]: protocol\.order_rule = "separate" has orders 0 to 4 and seeds below .*, got order 5, seed'):
            load(tmp_path, reference, (old, new))
    with pytest.raises(SweepError, match="got order 0, seed 4294967296"):
        load(tmp_path, reference, ("[1, 2]", "[1, 4294967296]"))
    assert load(tmp_path, ("[1, 2]", "[1, 4294967296]\norders = 6")).orders == 6


def test_control_contexts_are_all_or_those_that_are_named(tmp_path: Path) -> None:
    def controls(text: str) -> tuple[str, ...]:
        return load(tmp_path, ('sour = "No"', f'sour = "No"\n[controls]\n{text}')).controls.contexts

    assert controls("contexts = true") == ("other_draw", "random_labels", "flipped_labels", "other_task", "shuffled_words", "separator", "shifted")
    assert controls("contexts = false") == controls("train_on = 'true'") == ()
    assert controls("contexts = 'separator'") == controls("contexts = ['separator', 'separator']") == ("separator",)


def test_the_control_task_is_never_the_task_itself(tmp_path: Path) -> None:
    def other(name: str, text: str = "contexts = true") -> str:
        return load(tmp_path, ('sour = "No"', f'sour = "No"\n[controls]\n{text}')).control_task_of(name)

    assert [other(name) for name in ("fruit", "sst2", "trec", "trec_hub")] == ["trec", "trec", "mr_snippets", "mr_snippets"]
    assert [other(name, "control_task = 'fruit'") for name in ("fruit", "sst2", "trec")] == ["trec", "fruit", "fruit"]
    assert [other(name, "control_task = 'mr_snippets'") for name in ("mr_snippets", "trec")] == ["trec", "mr_snippets"]


def test_what_to_train_on_twice_is_one_axis_value_with_a_warning(tmp_path: Path) -> None:
    sweep = load(tmp_path, ('sour = "No"', 'sour = "No"\n[controls]\ntrain_on = ["true", "other_task", "true"]'))
    assert sweep.controls.train_on == ("true", "other_task")
    assert sweep.warnings == ("controls.train_on: true is there more than once and counts once",)
    assert load(tmp_path, ('sour = "No"', 'sour = "No"\n[controls]\ntrain_on = "other_task"')).controls.train_on == ("other_task",)


def test_the_nearest_name_is_suggested_whatever_its_dashes_and_case() -> None:
    assert unknown("task", "SST-2", ["sst2", "mr"]) == "unknown task 'SST-2'; did you mean 'sst2'?; known: mr, sst2"
    assert unknown("task", "zebra", ["sst2", "mr"]) == "unknown task 'zebra'; known: mr, sst2"


def test_protocols_are_an_axis(tmp_path: Path) -> None:
    two = '[[protocols]]\n[[protocols]]\npreset = "reference"\nseparator = "none"\n'
    sweep = load(tmp_path, ('[[task]]\nname = "fruit"', f'{two}\n[[task]]\nname = "fruit"'))
    assert [each.protocol.separator for each in sweep.of_each_protocol()] == ["newline", "none"]
    assert all(each.protocols == () for each in sweep.of_each_protocol())
    assert load(tmp_path).of_each_protocol() == (load(tmp_path),)
    with pytest.raises(SweepError, match=r"protocols are instead of \[protocol\]"):
        load(tmp_path, ('[[task]]\nname = "fruit"', f'[protocol]\nseparator = "eos"\n{two}\n[[task]]\nname = "fruit"'))
    with pytest.raises(SweepError, match=r"unknown key 'seperator' in \[\[protocols\]\]; did you mean 'separator'"):
        load(tmp_path, ('[[task]]\nname = "fruit"', '[[protocols]]\nseperator = "eos"\n\n[[task]]\nname = "fruit"'))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ('[[method]]\nname = "icl"\nbase = "vanilla"', "'icl' is the name of something else; choose one of its own"),
        ('[[method]]\nname = "vanilla"\nbase = "vanilla"', "'vanilla' is the name of something else"),
        ('[[metric]]\nname = "sim_aou"\ncode = "m.py:f"', "'sim_aou' is the name of something else"),
        ('[[metric]]\nname = "alpha"\ncode = "m.py:f"', "'alpha' is the name of something else"),
        ('[[method]]\nname = "mine"\ncode = "m.py:f"\noptions = { a = nan }', "options must be text, finite numbers, true or false, got a = nan"),
        ('[[method]]\nname = "mine"\ncode = "m.py:f"\noptions = { a = [1] }', "options must be text, finite numbers, true or false, got a = [1]"),
        ('[[method]]\nname = "mine"\ncode = "missing.py:f"', "missing.py: no such file"),
        ('[[method]]\nname = "mine"\ncode = "m.py:g"', "must define g, it does not"),
        ('[[method]]\nname = "mine"\ncode = "deep.py:f"', "is not Python"),
        ('[[method]]\nname = "mine"\ncode = "m.py:f"\nrank = 2', "rank: for variations of a built-in method; code takes its own options"),
        ('[[method]]\nname = "mine"', "needs either base (a built-in method to vary) or code (a class of one's own)"),
        ('[[method]]\nname = "mine"\nbase = "layer_causal_attn"\nweights = "mlp"', "the loss of layer_causal_attn reads the attention output"),
        ('[[method]]\nname = "mine"\nbase = "vanilla"\nresidual = true', "residual is an option of layer_causal_attn"),
        ('[[method]]\nname = "mine"\nbase = "vanilla"\nweigths = "mlp"', "unknown key 'weigths' in [[method]]; did you mean 'weights'"),
        ('[capture]\nkeep = "some"', "capture.keep must be 'none', 'final_step' or 'all', got 'some'"),
    ],
)
def test_a_mistake_in_a_section_of_ones_own_is_one_message(tmp_path: Path, section: str, message: str) -> None:
    (tmp_path / "m.py").write_text("def f(): pass\n")
    (tmp_path / "deep.py").write_text("f = " + "(" * 5000 + ")" * 5000)
    (found,) = problems(tmp_path, GOOD.replace("[[models]]", f"{section}\n\n[[models]]", 1))
    assert message in found


def test_what_is_described_and_not_run_is_a_warning(tmp_path: Path) -> None:
    own = '[[method]]\nname = "mine"\nbase = "vanilla"\nrank = 1\n\n[controls]\nrandom_delta = true\ntrain_on = "other_task"\n\n[[models]]\nsource = "first"'
    sweep = load(tmp_path, ('[[models]]\nsource = "first"', own), ("layer_causal = [1e-4]", "layer_causal = [1e-4]\nlayer_causal_attn = [1.0]"))
    assert sweep.warnings == (
        "method 'mine' is not among methods and is not run",
        "learning_rates.layer_causal_attn: 'layer_causal_attn' is not among methods",
        'controls.random_delta: is made for what was trained on the demonstrations; train_on lacks "true"',
    )
