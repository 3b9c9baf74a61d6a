"""The plan: which cells a sweep means, how they are grouped, and what it says of them."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from iclgd_dist import plan as planning
from iclgd_dist.blocks import with_cells
from iclgd_dist.config import ModelSpec, SweepError, load_sweep
from iclgd_dist.encoding import encode, fits_context
from iclgd_dist.plan import count_cells
from iclgd_dist.sources import ModelIdentity, SourceUnreachable
from iclgd_dist.tasks import draw, load_task
from tests.plans import CONFIG, FRUIT, ONE, SMALL, STONE, SWEEP, Models, planned, points, trained_on, with_section

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


def test_protocols_are_an_axis_of_cells(folder: Path) -> None:
    section = '[[protocols]]\n[[protocols]]\nseparator = "eos"\n[[protocols]]\nrecord_position = "last_prompt"'
    plan = planned(folder, with_section(section))
    clean, eos = planned(folder), planned(folder, with_section('[protocol]\nseparator = "eos"'))
    assert set(plan.keys) == {*clean.keys, *eos.keys}
    assert plan.num_cells == clean.num_cells + eos.num_cells  # the third is the first by another name
    assert {block.protocol.separator for block in plan.blocks} == {"newline", "eos"}


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
