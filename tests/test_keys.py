"""Keys: what a cell's key depends on, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from iclgd_dist import extensions
from iclgd_dist import plan as planning
from iclgd_dist.plan import key_of
from tests.plans import FRUIT, ONE, REFERENCE_SPELLED, SMALL, STONE, SWEEP, data_in, planned, points, trained_on, with_section


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


def test_the_control_task_is_part_of_the_keys_of_what_is_trained_on_it_and_of_no_others(folder: Path) -> None:
    def found(task: str) -> dict[str, set[str]]:
        section = with_section(f'[controls]\ntrain_on = ["true", "random_labels", "other_task"]\ncontexts = true\ncontrol_task = "{task}"')
        (block,) = planned(folder, *ONE, section, ("[[models]]", STONE.replace('"stone"', '"sand"').replace("hard", "soft") + "\n[[models]]")).blocks
        return {train_on: {cell.key for cell in block.cells if cell.train_on == train_on} for train_on in trained_on(block)}

    stone, sand = found("stone"), found("sand")
    assert [stone[train_on] == sand[train_on] for train_on in ("true", "random_labels", "other_task")] == [True, True, False]
    assert stone["other_task"].isdisjoint(sand["other_task"])


def test_a_raised_method_version_gives_its_cells_new_keys_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = points(planned(folder))
    monkeypatch.setitem(extensions.METHOD_VERSIONS, "vanilla", extensions.METHOD_VERSIONS["vanilla"] + 1)
    after = points(planned(folder))
    assert {point for point in before if before[point] != after[point]} == {point for point in before if "vanilla" in point}


def test_code_of_ones_own_is_part_of_the_key_with_the_versions_it_may_build_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "rules.py").write_text("class Mine:\n    pass\n")
    own = '[[method]]\nname = "mine"\ncode = "rules.py:Mine"'
    used = ("steps = [1, 2, 4]", 'steps = [1, 2, 4]\nmethods = ["mine"]'), ("vanilla = [", "mine = ["), ("layer_causal = [1e-3, 1e-2]", "")
    keys = set(planned(folder, with_section(own), *used).keys)
    assert set(planned(folder, with_section(own.replace("rules.py", "./rules.py")), *used).keys) == keys
    monkeypatch.setitem(extensions.METHOD_VERSIONS, "vanilla", extensions.METHOD_VERSIONS["vanilla"] + 1)
    raised = set(planned(folder, with_section(own), *used).keys)
    assert keys != raised and len(keys & raised) == 2 * 2 * (1 + 8)  # baselines only
