"""The plan: which cells a sweep means, what their keys depend on, and how they are grouped. A tokenizer of words and a made-up model stand in."""

from __future__ import annotations

import contextlib
import csv
import re
import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from iclgd_dist import extensions
from iclgd_dist import plan as planning
from iclgd_dist.blocks import Block, halve, split, with_cells
from iclgd_dist.config import ModelSpec, Resources, SweepError, load_sweep
from iclgd_dist.encoding import encode, fits_context
from iclgd_dist.plan import Plan, count_cells, key_of, make_plan
from iclgd_dist.sources import ModelIdentity, SourceUnreachable
from iclgd_dist.tasks import draw, load_task

CONFIG = {"num_hidden_layers": 3, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50, "max_position_embeddings": 512}
SWEEP = """
name = "tiny"
tasks = ["fruit", "stone"]
seeds = [3, 1]
orders = 2
num_demonstrations = [1, 4]
num_queries = 8
steps = [1, 2, 4]

[learning_rates]
vanilla = [1e-3, 1e-2, 1e-1]
layer_causal = [1e-3, 1e-2]

[[models]]
source = "first"

[[models]]
source = "second"
"""
FRUIT = """
[[task]]
name = "fruit"
file = "train.csv"
query_file = "queries.csv"
template = "Is {text} sweet?"
labels = { y = "Yes", n = "No" }
"""
STONE = FRUIT.replace('"fruit"', '"stone"').replace("sweet", "hard")


class Words:
    """A tokenizer whose tokens are words, hyphens apart; it counts how often it sees a text."""

    bos_token_id, eos_token_id, name_or_path = 0, 1, "words"

    def __init__(self) -> None:
        self.vocabulary: dict[str, int] = {}
        self.seen: Counter[str] = Counter()

    def __call__(self, texts: list[str], *, add_special_tokens: bool, split_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        assert split_special_tokens
        self.seen.update(texts)
        words = [re.findall(r"\n| ?[^\s-]+|-|\s", text) for text in texts]
        return {"input_ids": [[self.vocabulary.setdefault(word, len(self.vocabulary) + 2) for word in row] for row in words]}

    def decode(self, ids: list[int]) -> str:
        return "".join(word for number in ids for word, other in self.vocabulary.items() if other == number)


class Models:
    """What the plan learns of models: content by source, tokenizers, and which do not answer."""

    def __init__(self) -> None:
        self.content = {"first": "1" * 64, "second": "2" * 64}
        self.tokenizers: list[Words] = []
        self.silent: set[str] = set()

    def identify(self, spec: ModelSpec, *, folder: Path) -> ModelIdentity:
        if spec.source in self.silent:
            raise SourceUnreachable(f"model {spec.source!r}: the hub cannot be reached")
        return ModelIdentity(spec.source, spec.source, self.content[spec.source], "llama", CONFIG, None)

    def light_tokenizer(self, identity: ModelIdentity) -> Words:
        self.tokenizers.append(Words())
        return self.tokenizers[-1]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Models:
    found = Models()
    monkeypatch.setattr(planning, "identify", found.identify)
    monkeypatch.setattr(planning, "light_tokenizer", found.light_tokenizer)
    return found


@pytest.fixture
def folder(tmp_path: Path, models: Models) -> Path:
    return data_in(tmp_path)


def data_in(folder: Path) -> Path:
    for name, number in (("train", 30), ("queries", 24)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *((f"{name} fruit number {n}", "yn"[n % 2]) for n in range(number))])
    return folder


def planned(folder: Path, *changes: tuple[str, str], text: str = SWEEP + FRUIT + STONE, finished: Collection[str] = (), **options: Any) -> Plan:
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    (folder / "sweep.toml").write_text(text)
    return make_plan(load_sweep(folder / "sweep.toml"), finished, **options)


def points(plan: Plan) -> dict[tuple, str]:
    """Return the key of every grid point, in plain values."""
    found: dict[tuple, str] = {}
    for block in plan.blocks:
        for cell in block.cells:
            drawn = () if cell.kind == "zero_shot" else (block.num_demonstrations, block.seed, block.order)
            point = (block.model.source, block.draw.task, cell.kind, *drawn, cell.method, cell.learning_rate, cell.step)
            assert found.setdefault(point, cell.key) == cell.key
    return found


SMALL = [("seeds = [3, 1]", "seeds = [1]"), ("orders = 2", "orders = 1"), ("[1, 4]", "4"), ('\n[[models]]\nsource = "second"\n', "")]


# --- Which cells


def test_the_cells_are_those_of_plain_loops(folder: Path) -> None:
    plan = planned(folder)
    expected: set[tuple] = set()
    for model, task in product(("first", "second"), ("fruit", "stone")):
        expected.add((model, task, "zero_shot", None, None, None))
        for k, seed, order in product((1, 4), (1, 3), (0, 1)):
            expected.add((model, task, "icl", k, seed, order, None, None, None))
            for method, rate, step in product(("vanilla", "layer_causal"), (1e-3, 1e-2, 1e-1), (1, 2, 4)):
                if step <= k and (method == "vanilla" or rate < 0.1):
                    expected.add((model, task, "finetuned", k, seed, order, method, rate, step))
    assert set(points(plan)) == expected
    assert len(expected) == plan.num_cells == plan.num_to_run == len(plan.keys) == 2 * 2 * (1 + 4 * (1 + 5) + 4 * (1 + 15))
    assert len(plan.blocks) == plan.num_blocks_planned == 2 * 2 * 2 * 2 * 2
    assert count_cells(load_sweep(folder / "sweep.toml")) == (len(expected), 32)
    assert plan.warnings == ("num_demonstrations 1: steps 2, 4 exceed its 1 updates and are left out",)


def test_every_grid_point_has_a_key_of_its_own_also_with_one_demonstration_in_two_orders(folder: Path) -> None:
    found = points(planned(folder))
    assert len(set(found.values())) == len(found)
    assert all(re.fullmatch("[0-9a-f]{64}", key) for key in found.values())


def test_blocks_come_by_model_then_seed_then_task(folder: Path) -> None:
    blocks = planned(folder, ("[1, 4]", "4"), ("orders = 2", "orders = 1")).blocks
    assert [(block.model.source, block.seed, block.draw.task) for block in blocks] == [*product(("first", "second"), (3, 1), ("fruit", "stone"))]
    assert len({block.name for block in blocks if block.model.source == "first"}) == 4


def test_a_block_sees_the_draw_and_the_tokens_that_the_tasks_module_makes(folder: Path, models: Models) -> None:
    plan = planned(folder)
    sweep = load_sweep(folder / "sweep.toml")
    for block in plan.blocks:
        task, tokenizer = load_task(block.draw.task, own=sweep.own_task(block.draw.task), folder=folder), models.tokenizers[block.model.source == "second"]
        fits = fits_context(tokenizer, task, protocol=sweep.protocol, max_positions=512)
        alone = draw(task, num_demonstrations=block.num_demonstrations, seed=block.seed, order=block.order, num_queries=8, query_seed=1, fits=fits)
        assert block.draw == alone
        assert with_cells(block, block.cells, encode(alone, tokenizer, protocol=sweep.protocol, max_positions=512)) == block


def test_finished_cells_are_subtracted_and_finished_blocks_are_gone(folder: Path) -> None:
    plan = planned(folder)
    assert planned(folder, finished=plan.keys).blocks == ()
    first = plan.blocks[0]
    done = {cell.key for cell in first.cells} | {cell.key for cell in plan.blocks[1].cells if cell.step == 1}
    rest = planned(folder, finished=done | {"0" * 64})
    assert rest.num_done == len(done)
    assert rest.num_to_run == plan.num_to_run - len(done)
    assert rest.keys == plan.keys
    assert first.name not in {block.name for block in rest.blocks}
    assert {cell.key for block in rest.blocks for cell in block.cells} == set(plan.keys) - done


def test_a_zero_shot_cell_alone_is_asked_of_one_block(folder: Path) -> None:
    plan = planned(folder)
    kinds = {cell.key: cell.kind for block in plan.blocks for cell in block.cells}
    rest = planned(folder, finished=[key for key, kind in kinds.items() if kind != "zero_shot"])
    assert rest.num_to_run == len(rest.blocks) == 4
    assert all([cell.kind for cell in block.cells] == ["zero_shot"] for block in rest.blocks)


# --- What a key depends on


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('name = "tiny"', 'name = "other"'),
        ("seeds = [3, 1]", "seeds = [1, 3]"),
        ("steps = [1, 2, 4]", "steps = [4, 1, 2]"),
        ('["fruit", "stone"]', '["stone", "fruit"]'),
        ("[1e-3, 1e-2, 1e-1]", "[0.1, 0.001, 0.01]"),
        ("vanilla = [1e-3, 1e-2, 1e-1]\nlayer_causal = [1e-3, 1e-2]", "layer_causal = [1e-3, 1e-2]\nvanilla = [1e-3, 1e-2, 1e-1]"),
        ("[[task]]", "[resources]\ncpus_per_actor = 2\nmax_actors = 1\ntokens_per_batch = 10\ndevice_map = 'cpu'\n\n[[task]]"),
        ("[[task]]", "[analysis]\nsmallest_effect = 0.5\n\n[[task]]"),
        ("[[task]]", "[capture]\nkeep = 'all'\n\n[[task]]"),
        ('source = "first"', 'source = "first"\ninit = "trained"\ninit_scheme = "model"\ninit_seeds = []'),
        ("orders = 2", "orders = 2\nquery_seed = 1\nmethods = ['layer_causal', 'vanilla']"),
        ('source = "first"', 'source = "first"\nstorage_dtype = "float32"\ncompute_dtype = "float32"\ntf32 = false\ndeterministic = false'),
        ("[[task]]", '[protocol]\nseparator = "newline"\n\n[[task]]'),
    ],
)  # fmt: skip
def test_keys_do_not_depend_on_what_runs_a_cell_or_where_it_is_written(folder: Path, old: str, new: str) -> None:
    text = SWEEP + FRUIT + STONE
    assert old in text
    assert points(planned(folder, text=text.replace(old, new, 1))) == points(planned(folder, text=text))


def test_keys_do_not_depend_on_the_cells_around_them_nor_on_the_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = points(planned(folder))
    part = points(planned(folder, *SMALL, ("[1e-3, 1e-2, 1e-1]", "[1e-2]"), ("[1, 2, 4]", "[2]"), ('["fruit", "stone"]', '["stone"]')))
    assert len(part) == 1 + 1 + 1 + 2
    assert part.items() <= whole.items()
    assert points(planned(data_in(tmp_path_factory.mktemp("elsewhere")))) == whole


@pytest.mark.parametrize(
    ("old", "new", "kinds"),
    [
        ("Is {text} sweet?", "Is {text} very sweet?", "zero_shot icl finetuned"),
        ('"Yes"', '"Sure"', "zero_shot icl finetuned"),
        ("num_queries = 8", "num_queries = 6", "zero_shot icl finetuned"),
        ("num_queries = 8", "num_queries = 8\nquery_seed = 2", "zero_shot icl finetuned"),
        ('source = "first"', 'source = "first"\ncompute_dtype = "float64"', "zero_shot icl finetuned"),
        ('source = "first"', 'source = "first"\nstorage_dtype = "bfloat16"', "zero_shot icl finetuned"),
        ('source = "first"', 'source = "first"\ntf32 = true', "zero_shot icl finetuned"),
        ('source = "first"', 'source = "first"\ndeterministic = true', "zero_shot icl finetuned"),
        ('source = "first"', 'source = "first"\ninit = "norms"\ninit_seeds = [0]', "zero_shot icl finetuned"),
        ('source = "first"', 'source = "second"', "zero_shot icl finetuned"),
        ("[[task]]", '[protocol]\nseparator = "eos"\n\n[[task]]', "zero_shot icl finetuned"),
        ("[[task]]", '[protocol]\nsink = "eos"\n\n[[task]]', "zero_shot icl finetuned"),
        ("seeds = [1]", "seeds = [2]", "icl finetuned"),
        ("num_demonstrations = 4", "num_demonstrations = 5", "icl finetuned"),
    ],
)
def test_keys_depend_on_all_that_defines_a_cell(folder: Path, old: str, new: str, kinds: str) -> None:
    text = SWEEP + FRUIT
    for change in (*SMALL, (', "stone"', "")):
        text = text.replace(*change)
    assert old in text
    (before,), (after,) = planned(folder, text=text).blocks, planned(folder, text=text.replace(old, new)).blocks
    changed = {a.kind for a, b in zip(before.cells, after.cells, strict=True) if a.key != b.key}
    same = {a.kind for a, b in zip(before.cells, after.cells, strict=True) if a.key == b.key}
    assert changed == set(kinds.split())
    assert same.isdisjoint(changed)


@pytest.mark.parametrize("row", ["drawn", "not drawn", "query"])
def test_keys_depend_on_the_texts_that_are_drawn_and_on_no_others(folder: Path, row: str) -> None:
    changes = [*SMALL, ('["fruit", "stone"]', '["fruit"]')]
    (before,) = planned(folder, *changes).blocks
    drawn = [example.prompt for example in before.draw.demonstrations]
    if row == "query":
        path, text = folder / "queries.csv", before.draw.queries[0].prompt[3:-7]
    else:
        path = folder / "train.csv"
        text = [f"train fruit number {n}" for n in range(30) if (f"Is train fruit number {n} sweet?" in drawn) == (row == "drawn")][-1]
    assert f"\n{text},".encode() in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(f"\n{text},".encode(), f"\n{text}!,".encode()))
    (after,) = planned(folder, *changes).blocks
    changed = {a.kind for a, b in zip(before.cells, after.cells, strict=True) if a.key != b.key}
    assert changed == {"drawn": {"icl", "finetuned"}, "not drawn": set(), "query": {"zero_shot", "icl", "finetuned"}}[row]


def test_an_option_at_its_default_is_left_out_of_the_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[dict[str, Any]] = []

    def recording(values: dict[str, Any]) -> str:
        hashed.append(values)
        return key_of(values)

    monkeypatch.setattr(planning, "key_of", recording)
    planned(folder)
    assert {name for values in hashed for name in values if "." in name} == set()
    planned(folder, ('[[task]]\nname = "fruit"', '[protocol]\nseparator = "eos"\nsink = "auto"\n\n[[task]]\nname = "fruit"'))
    assert {name for values in hashed for name in values if "." in name} == {"protocol.separator"}
    hashed.clear()
    planned(folder, ('[[task]]\nname = "fruit"', '[protocol]\npreset = "reference"\nsink = "auto"\n\n[[task]]\nname = "fruit"'))
    planned(folder, ('[[task]]\nname = "fruit"', '[protocol]\npreset = "reference"\n\n[[task]]\nname = "fruit"'))
    assert "protocol.line_breaks" in hashed[0]
    assert not any("preset" in name for values in hashed for name in values)


def test_keys_stay_what_they_were(folder: Path) -> None:
    """These change only with KEY_SCHEMA, a method's version or the draw: whoever changes them makes every store run again."""
    found = points(planned(folder))
    assert found["first", "fruit", "zero_shot", None, None, None][:16] == "7281e97413e09e6c"
    assert found["first", "fruit", "icl", 4, 3, 1, None, None, None][:16] == "df3bb8e527289c3c"
    assert found["first", "fruit", "finetuned", 4, 3, 1, "layer_causal", 0.01, 2][:16] == "3cf3b04e22fa0527"


# --- Protocols, runs, and what is trained on

ONE = [*SMALL, ('["fruit", "stone"]', '["fruit"]')]
SECTION = '[[task]]\nname = "fruit"'
REFERENCE_SPELLED = """sink = "bos"
separator = "eos"
leading_separator = false
record_position = "label"
truncation = "greedy"
order_rule = "separate"
demonstration_draw = "shuffled"
query_draw = "shuffled"
label_tokens = "separate"
line_breaks = "eos"
first_layer = "count"
undefined = "eps"
"""


def trained_on(block: Block) -> list[str]:
    return list(dict.fromkeys(train_on for _, train_on in block.trained()))


def with_section(section: str) -> tuple[str, str]:
    return SECTION, f"{section}\n\n{SECTION}"


def test_keys_do_not_depend_on_how_a_protocol_is_written(folder: Path) -> None:
    named, spelled = (planned(folder, with_section(f"[protocol]\n{text}")) for text in ('preset = "reference"', REFERENCE_SPELLED))
    assert points(named) == points(spelled)
    assert set(named.keys).isdisjoint(planned(folder).keys)
    back = REFERENCE_SPELLED.replace('"bos"', '"auto"').replace('"eos"', '"newline"', 1).replace("false", "true").replace('"label"', '"last_prompt"')
    for old, new in (("greedy", "refuse"), ("separate", "shared"), ("shuffled", "hashed"), ("shuffled", "balanced"), ("separate", "joint")):
        back = back.replace(old, new, 1)
    back = back.replace('line_breaks = "eos"', 'line_breaks = "text"').replace("count", "skip").replace('"eps"', '"null"')
    assert points(planned(folder, with_section(f'[protocol]\npreset = "reference"\n{back}'))) == points(planned(folder))


@pytest.mark.parametrize(
    ("switch", "value"),
    [line.split(" = ") for line in REFERENCE_SPELLED.splitlines()] + [["loss_tokens", '"label"']],
)
def test_every_switch_is_part_of_every_key(folder: Path, switch: str, value: str) -> None:
    before, after = planned(folder, *ONE), planned(folder, *ONE, with_section(f"[protocol]\n{switch} = {value}"))
    assert len(after.keys) == len(before.keys)
    assert set(after.keys).isdisjoint(before.keys)


def test_blocks_of_the_reference_train_in_another_order_than_they_show(folder: Path) -> None:
    blocks = planned(folder, ("orders = 2", "orders = 3"), ("[1, 4]", "4"), with_section('[protocol]\npreset = "reference"')).blocks
    assert {block.order for block in blocks if block.draw.training == block.draw.demonstrations} == {0}
    for block in blocks:
        assert Counter(block.draw.training) == Counter(block.draw.demonstrations)
        assert len(block.draw.queries) == 8


def test_runs_are_the_cells_of_their_pairs(folder: Path) -> None:
    whole, grid = points(planned(folder)), ("seeds = [3, 1]\norders = 2", "runs = [[1, 1], [3, 0]]")
    part = planned(folder, grid)
    assert points(part) == {point: key for point, key in whole.items() if point[2] == "zero_shot" or point[4:6] in ((1, 1), (3, 0))}
    assert count_cells(load_sweep(folder / "sweep.toml")) == (part.num_cells, part.num_blocks_planned) == (len(part.keys), len(part.blocks))
    assert planned(folder, ("seeds = [3, 1]\norders = 2", "runs = [[3, 0], [3, 1], [1, 0], [1, 1]]")).blocks == planned(folder).blocks


def test_a_task_with_runs_and_learning_rates_of_its_own_has_those_cells(folder: Path) -> None:
    own = with_section("[per_task.fruit]\nruns = [[2, 1], [5, 0]]\nlearning_rates = [0.5]")
    plan = planned(folder, own)
    found, whole = points(plan), points(planned(folder))
    assert {point: key for point, key in found.items() if point[1] == "stone"} == {point: key for point, key in whole.items() if point[1] == "stone"}
    assert {point[4:6] for point in found if point[1] == "fruit" and point[2] != "zero_shot"} == {(2, 1), (5, 0)}
    assert {point[-2] for point in found if point[1:3] == ("fruit", "finetuned")} == {0.5}
    assert (plan.num_cells, plan.num_blocks_planned) == (len(plan.keys), len(plan.blocks))
    assert [(block.seed, block.draw.task) for block in plan.blocks if block.model.source == "first" and block.num_demonstrations == 1] == [
        (2, "fruit"), (5, "fruit"), (3, "stone"), (3, "stone"), (1, "stone"), (1, "stone")
    ]  # fmt: skip


def test_what_is_trained_on_is_an_axis_of_finetuned_cells(folder: Path) -> None:
    section = '[controls]\ntrain_on = ["true", "random_labels", "other_task", "shuffled_words"]\ncontrol_task = "stone"'
    plain, plan = planned(folder, *ONE), planned(folder, *ONE, with_section(section))
    (block,) = plan.blocks
    assert trained_on(block) == ["true", "random_labels", "other_task", "shuffled_words"]
    assert Counter(cell.train_on for cell in block.cells if cell.kind == "finetuned") == dict.fromkeys(trained_on(block), 5 * 3)
    assert plan.num_cells == len(plan.keys) == len(block.cells) == 2 + 4 * 5 * 3
    assert set(plain.keys) == {cell.key for cell in block.cells if cell.train_on == "true"}
    assert {block.identity(cell)["train_on"] for cell in block.cells if cell.kind == "finetuned"} == set(trained_on(block))
    assert {block.identity(cell)["train_on"] for cell in block.cells if cell.kind != "finetuned"} == {None}
    for train_on in trained_on(block):
        assert (block.learning_rates("vanilla", train_on), block.steps("vanilla", train_on)) == ([1e-3, 1e-2, 1e-1], [1, 2, 4])
    (alone,) = planned(folder, *ONE, with_section(section), finished=plain.keys).blocks
    assert trained_on(alone) == ["random_labels", "other_task", "shuffled_words"]
    assert alone.learning_rates("vanilla") == []
    assert block.cost.training_tokens == pytest.approx(4 * plain.blocks[0].cost.training_tokens, rel=0.1)
    # Baselines are shared; what is added are the contexts of exactly what was trained on.
    assert plain.blocks[0].cost.baseline_flops < block.cost.baseline_flops < 3 * plain.blocks[0].cost.baseline_flops


def test_the_control_task_is_part_of_the_keys_of_what_is_trained_on_it_and_of_no_others(folder: Path) -> None:
    def found(task: str) -> dict[str, set[str]]:
        section = with_section(f'[controls]\ntrain_on = ["true", "random_labels", "other_task"]\ncontexts = true\ncontrol_task = "{task}"')
        (block,) = planned(folder, *ONE, section, ("[[models]]", STONE.replace('"stone"', '"sand"').replace("hard", "soft") + "\n[[models]]")).blocks
        return {train_on: {cell.key for cell in block.cells if cell.train_on == train_on} for train_on in trained_on(block)}

    stone, sand = found("stone"), found("sand")
    assert [stone[train_on] == sand[train_on] for train_on in ("true", "random_labels", "other_task")] == [True, True, False]
    assert stone["other_task"].isdisjoint(sand["other_task"])


def test_control_contexts_change_no_key_and_travel_with_the_block(folder: Path, models: Models) -> None:
    plan = planned(folder, *ONE, with_section('[controls]\ncontexts = true\ncontrol_task = "stone"\nrandom_delta = true'))
    plain = planned(folder, *ONE)
    assert plan.keys == plain.keys
    (block,), (bare,) = plan.blocks, plain.blocks
    assert replace(block.draw, contexts=()) == bare.draw
    assert [each.name.partition(":")[0] for each in block.draw.contexts] == [name for name in block.controls.contexts if name != "shifted"]
    encoded = encode(block.draw, models.tokenizers[-2], protocol=block.protocol, max_positions=512)
    assert [name.partition(":")[0] for name in encoded.control_contexts] == [name for name in block.controls.contexts if name != "shifted"]
    assert block.cost.baseline_flops > 2 * bare.cost.baseline_flops


def test_a_raised_method_version_gives_its_cells_new_keys_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = points(planned(folder))
    monkeypatch.setitem(extensions.METHOD_VERSIONS, "vanilla", extensions.METHOD_VERSIONS["vanilla"] + 1)
    after = points(planned(folder))
    assert {point for point in before if before[point] != after[point]} == {point for point in before if "vanilla" in point}


def test_models_with_the_same_content_count_once(folder: Path, models: Models) -> None:
    plan = planned(folder)
    models.content["second"] = models.content["first"]
    once = planned(folder)
    assert once.num_cells == once.num_to_run == plan.num_cells // 2
    assert {block.model.source for block in once.blocks} == {"first"}
    assert once.warnings[-1] == f"models or protocols with the same content: {plan.num_cells // 2} cells are others' and count once"
    assert planned(folder, ('source = "second"', 'source = "second"\ncompute_dtype = "float64"')).num_cells == plan.num_cells


def test_untrained_models_differ_in_kind_scheme_and_seed_and_say_so_in_every_row(folder: Path, models: Models) -> None:
    kinds = [("random", "model", [1, 2]), ("random", "fairseq", [1]), ("norms", "model", [1])]
    more = "".join(f'\n[[models]]\nsource = "first"\ninit = "{init}"\ninit_scheme = "{scheme}"\ninit_seeds = {seeds}\n' for init, scheme, seeds in kinds)
    trained, plan = planned(folder), planned(folder, text=SWEEP + more + FRUIT + STONE)
    assert plan.num_cells == plan.num_to_run == len(set(plan.keys)) == 3 * trained.num_cells
    assert count_cells(load_sweep(folder / "sweep.toml"))[0] == plan.num_cells
    assert set(trained.keys) < set(plan.keys)
    assert len(models.tokenizers) == 2 + 2, "a tokenizer was read for each untrained model"
    rows = [block.identity(cell) for block in plan.blocks for cell in block.cells]
    expected = {("trained", None, None, ()), *((i, s, seed, (f"random weights ({i}, {s}, seed {seed})",)) for i, s, seeds in kinds for seed in seeds)}
    assert {(row["init"], row["init_scheme"], row["init_seed"], tuple(row["model_notes"])) for row in rows} == expected


# --- Blocks: parts and cost


def four_lanes(folder: Path) -> Block:
    (block,) = planned(folder, *SMALL, ('["fruit", "stone"]', '["fruit"]'), ("[1e-3, 1e-2]", "[1e-3, 1e-2, 1e-1, 1]")).blocks
    return block


@pytest.mark.parametrize("num_actors", [1, 2, 3, 4, 9])
def test_splitting_keeps_every_cell_once_and_a_learning_rate_of_both_methods_together(folder: Path, num_actors: int) -> None:
    block = four_lanes(folder)
    parts = split([block], num_actors)
    assert len(parts) == min(num_actors, 4)
    assert sorted(cell.key for part in parts for cell in part.cells) == sorted(cell.key for cell in block.cells)
    homes = {(cell.learning_rate, number) for number, part in enumerate(parts) for cell in part.cells if cell.learning_rate is not None}
    assert len(homes) == 4
    assert len({part.name for part in parts}) == len(parts)
    repeated = (len(parts) - 1) * block.cost.baseline_flops
    assert sum(part.cost.flops for part in parts) == pytest.approx(block.cost.flops + repeated)
    assert sum(part.cost.training_tokens for part in parts) == pytest.approx(block.cost.training_tokens, abs=len(parts))
    assert (
        block.cost.capture_tokens - len(parts)
        <= sum(part.cost.capture_tokens for part in parts)
        < block.cost.capture_tokens * (1 if len(parts) == 1 else len(parts)) + 1
    )


def test_splitting_also_parts_what_is_trained_on(folder: Path) -> None:
    section = with_section('[controls]\ntrain_on = ["true", "random_labels", "shuffled_words"]')
    (block,) = planned(folder, *ONE, section, ("[1e-3, 1e-2, 1e-1]", "[1e-3]"), ("[1e-3, 1e-2]", "[1e-3]")).blocks
    parts = split([block], 9)
    assert sorted(trained_on(part) for part in parts) == [["random_labels"], ["shuffled_words"], ["true"]]
    assert sorted(cell.key for part in parts for cell in part.cells) == sorted(cell.key for cell in block.cells)


def test_splitting_halves_the_largest_block_that_has_more_than_one_learning_rate(folder: Path) -> None:
    wide = four_lanes(folder)
    narrow = halve(halve(wide)[0])[0]
    assert halve(narrow) == (narrow,)
    dear = replace(narrow, name="dear", cost=replace(narrow.cost, flops=1e30))
    parts = split([dear, wide], 4)
    assert len(parts) == 4
    assert parts[0] == dear
    assert split([dear], 8) == (dear,)
    assert split([], 8) == ()


def test_a_block_with_other_cells_is_named_and_costed_anew(folder: Path, models: Models) -> None:
    block = four_lanes(folder)
    encoded = encode(block.draw, models.tokenizers[-1], protocol=block.protocol, max_positions=512)
    fewer = with_cells(block, tuple(cell for cell in block.cells if cell.method != "vanilla"), encoded)
    assert fewer.learning_rates("vanilla") == []
    assert fewer.learning_rates("layer_causal") == [1e-3, 1e-2, 1e-1, 1]
    assert fewer.steps("layer_causal") == [1, 2, 4]
    assert fewer.name != block.name
    assert fewer.cost.baseline_flops == block.cost.baseline_flops
    assert with_cells(fewer, block.cells, encoded) == block
    on_disk = with_cells(replace(block, resources=Resources(device_map="disk")), block.cells, encoded)
    assert on_disk.cost.peak_gib < block.cost.peak_gib and on_disk.cost.flops == block.cost.flops


def test_cost_grows_with_lanes_steps_and_queries(folder: Path) -> None:
    def cost(*changes: tuple[str, str]) -> Any:
        (block,) = planned(folder, *SMALL, ('["fruit", "stone"]', '["fruit"]'), ("[1e-3, 1e-2, 1e-1]", "[1e-3]"), *changes).blocks
        return block.cost

    one, lanes = cost(), cost(("vanilla = [1e-3]", "vanilla = [1e-3, 1e-2, 1e-1, 1]"))
    assert lanes.training_tokens > one.training_tokens
    assert lanes.capture_tokens > one.capture_tokens
    assert lanes.flops > one.flops
    assert lanes.peak_gib > one.peak_gib
    assert lanes.baseline_flops == one.baseline_flops
    assert cost(("[1, 2, 4]", "[4]")).flops < one.flops
    assert cost(("[1, 2, 4]", "[4]")).training_tokens == one.training_tokens
    assert cost(("num_queries = 8", "num_queries = 16")).capture_tokens > one.capture_tokens


def test_training_tokens_are_the_demonstrations_tokens_times_the_learning_rates(folder: Path) -> None:
    block = four_lanes(folder)
    # sink, newline, "Is train fruit number N sweet? Yes": 9 tokens; 4 demonstrations; 3 and 4 learning rates.
    assert block.cost.training_tokens == 4 * 9 * (3 + 4)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ("none", set()),
        ("final_step", {("zero_shot", None), ("icl", None), ("finetuned", 4)}),
        ("all", {("zero_shot", None), ("icl", None), *(("finetuned", step) for step in (1, 2, 4))}),
    ],
)
def test_captures_are_kept_of_the_cells_that_the_file_asks_for(folder: Path, keep: str, kept: set[tuple[str, int | None]]) -> None:
    changes = [*SMALL, ('["fruit", "stone"]', '["fruit"]')]
    (block,) = planned(folder, *changes, text=SWEEP + f'[capture]\nkeep = "{keep}"\n' + FRUIT).blocks
    assert {(cell.kind, cell.step) for cell in block.cells if cell.is_kept} == kept
    assert all(cell.is_kept == ((cell.kind, cell.step) in kept) for cell in block.cells)
    # 3 layers, width 8, 2 heads, 8 queries, 2 labels; 4 demonstrations of 7 tokens, "Is train fruit number N sweet? Yes".
    assert block.cost.capture_bytes == 4 * 3 * 8 * (8 + 2 * max_tokens(block) + 4 * 7) + 8 * 8 * 2


def max_tokens(block: Block) -> int:
    return max(len(re.findall(r"[^\s-]+|-", query.prompt)) for query in block.draw.queries)


# --- What a plan says


def test_each_text_is_tokenised_once_however_many_draws_share_it(folder: Path, models: Models) -> None:
    planned(folder)
    assert len(models.tokenizers) == 2
    for tokenizer in models.tokenizers:
        assert set(Counter(tokenizer.seen).values()) == {1}


def test_labels_of_several_tokens_are_noted_once(folder: Path) -> None:
    assert planned(folder).notes == ()
    assert planned(folder, ('"No"', '"No-no"')).notes == tuple(
        f"label 'No-no' of {task} has 3 tokens; scored by the mean of their log-probabilities" for task in ("fruit", "stone")
    )


def test_a_context_without_room_for_all_demonstrations_is_noted_once_per_task(folder: Path) -> None:
    changes = (("[1, 4]", "30"), with_section('[protocol]\ntruncation = "greedy"'))
    assert planned(folder, *changes).notes == ()
    long = [(f'"{word}"', f'"{word}{"-o" * 20}"') for word in ("Yes", "No")]  # 41 tokens each
    shown = [note for note in planned(folder, *changes, *long).notes if "room" in note]
    assert shown == [f"{task}: some contexts have room for fewer than 30 demonstrations; finetuning sees all of them" for task in ("fruit", "stone")]


def test_a_task_with_one_class_is_a_warning_of_the_plan_and_not_of_python(folder: Path) -> None:
    path = folder / "queries.csv"
    path.write_text(path.read_text().replace(",n", ",y"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = planned(folder, *SMALL)
    assert plan.warnings == tuple(f"task '{name}': all 24 queries have the label 'Yes'" for name in ("fruit", "stone"))


def test_a_query_pool_that_is_too_small_is_taken_whole_with_a_warning(folder: Path) -> None:
    plan = planned(folder, *SMALL, ("num_queries = 8", "num_queries = 25"), ('["fruit", "stone"]', '["fruit"]'))
    assert [len(block.draw.queries) for block in plan.blocks] == [24]
    assert plan.warnings == ("task 'fruit': its query pool holds 24; all of them are taken, instead of num_queries = 25",)
    assert planned(folder, *SMALL, ("num_queries = 8", "num_queries = 24"), ('["fruit", "stone"]', '["fruit"]')).keys == plan.keys


def test_a_model_that_cannot_be_reached_leaves_the_counts_of_the_file(folder: Path, models: Models) -> None:
    whole = planned(folder)
    models.silent = {"second"}
    with pytest.raises(SourceUnreachable):
        planned(folder)
    half = planned(folder, tolerate_unreachable=True)
    assert (half.num_cells, half.num_blocks_planned) == (whole.num_cells, whole.num_blocks_planned)
    assert half.unreachable == ("model 'second': the hub cannot be reached",)
    assert half.num_to_run == whole.num_cells // 2
    models.silent = {"first", "second"}
    none = planned(folder, tolerate_unreachable=True)
    assert (none.num_cells, none.blocks, none.keys) == (whole.num_cells, (), ())
    assert len(none.unreachable) == 2


def test_a_dataset_that_cannot_be_reached_is_told_from_one_that_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> Any:
        if name == "sst2":
            raise SweepError("task 'sst2' needs the dataset") from cause
        return load_task(name, **options)

    cause: Exception | None = ConnectionError("no network")
    monkeypatch.setattr(planning, "load_task", load)
    changes = [('["fruit", "stone"]', '["fruit", "sst2"]')]
    with pytest.raises(SweepError, match="needs the dataset"):
        planned(folder, *changes)
    plan = planned(folder, *changes, tolerate_unreachable=True)
    assert plan.unreachable == ("task 'sst2' needs the dataset",)
    assert {block.draw.task for block in plan.blocks} == {"fruit"}
    cause = None
    with pytest.raises(SweepError, match="needs the dataset"):
        planned(folder, *changes, tolerate_unreachable=True)


def test_what_cannot_be_run_is_refused_by_the_plan(folder: Path) -> None:
    with pytest.raises(SweepError, match="num_demonstrations must be at most 30, the size of its train pool, got 31"):
        planned(folder, ("[1, 4]", "31"))
    with pytest.raises(SweepError, match="a sweep has at most 10,000,000 cells, got "):
        planned(folder, ("orders = 2", "orders = 1_000_000_000_000"))


def test_protocols_are_an_axis_of_cells(folder: Path) -> None:
    section = '[[protocols]]\n[[protocols]]\nseparator = "eos"\n[[protocols]]\nrecord_position = "last_prompt"'
    plan = planned(folder, with_section(section))
    clean, eos = planned(folder), planned(folder, with_section('[protocol]\nseparator = "eos"'))
    assert set(plan.keys) == {*clean.keys, *eos.keys}
    assert plan.num_cells == clean.num_cells + eos.num_cells  # the third is the first by another name
    assert {block.protocol.separator for block in plan.blocks} == {"newline", "eos"}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("layers = [3]", r"method 'mine': layers must lie in -3\.\.2 \(first has 3\), got 3"),
        ("layers = [0, -4]", r"layers must lie in -3\.\.2 \(first has 3\), got -4"),
        ("layers = [0, -3]", r"layers \[0, -3\] name one of the 3 of first twice"),
        ("rank = 9", "rank must be at most 8, the width of first, got 9"),
    ],
)
def test_a_method_that_does_not_fit_the_model_is_refused(folder: Path, method: str, message: str) -> None:
    own = f'[[method]]\nname = "mine"\nbase = "vanilla"\n{method}'
    used = ("steps = [1, 2, 4]", 'steps = [1, 2, 4]\nmethods = ["mine"]'), ("vanilla = [", "mine = ["), ("layer_causal = [1e-3, 1e-2]", "")
    with pytest.raises(SweepError, match=message):
        planned(folder, with_section(own), *used)


@pytest.mark.parametrize(("model_type", "is_refused"), [("llama", False), ("gemma2", True), ("granite", True), ("olmo2", True), ("gpt_neox", False)])
def test_the_residual_option_is_for_models_that_add_the_attention_output_as_it_is(
    folder: Path, models: Models, monkeypatch: pytest.MonkeyPatch, model_type: str, is_refused: bool
) -> None:
    def identify(spec: ModelSpec, *, folder: Path) -> ModelIdentity:
        return ModelIdentity(spec.source, spec.source, models.content[spec.source], model_type, CONFIG | {"model_type": model_type}, None)

    monkeypatch.setattr(planning, "identify", identify)
    own = '[[method]]\nname = "mine"\nbase = "layer_causal_attn"\nresidual = true'
    used = ("steps = [1, 2, 4]", 'steps = [1, 2, 4]\nmethods = ["mine"]'), ("vanilla = [", "mine = ["), ("layer_causal = [1e-3, 1e-2]", "")
    with pytest.raises(SweepError, match=f"add the attention output as it is; {model_type}") if is_refused else contextlib.nullcontext():
        planned(folder, with_section(own), *used)


def test_code_of_ones_own_is_part_of_the_key_with_the_versions_it_may_build_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rules.py").write_text("class Mine:\n    pass\n")
    own = '[[method]]\nname = "mine"\ncode = "rules.py:Mine"'
    used = ("steps = [1, 2, 4]", 'steps = [1, 2, 4]\nmethods = ["mine"]'), ("vanilla = [", "mine = ["), ("layer_causal = [1e-3, 1e-2]", "")
    keys = set(planned(folder, with_section(own), *used).keys)
    assert set(planned(folder, with_section(own.replace("rules.py", "./rules.py")), *used).keys) == keys
    monkeypatch.setitem(extensions.METHOD_VERSIONS, "vanilla", extensions.METHOD_VERSIONS["vanilla"] + 1)
    raised = set(planned(folder, with_section(own), *used).keys)
    assert keys != raised and len(keys & raised) == 2 * 2 * (1 + 8)  # baselines only
