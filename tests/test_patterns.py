"""Generated tasks: every answer against Python, numpy and vectors; the pattern holds where it should and nowhere else."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from collections import Counter

import numpy as np
import pytest

from iclgd_dist import patterns
from iclgd_dist.config import load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.tasks import load_task

STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


def expression(text: str) -> tuple[str, bool]:
    first, _ = text.split(" + ")
    return str(eval(text)), eval(first) == 0


def boolean(text: str) -> tuple[str, bool]:
    """The pattern: whatever the rest is, the constant decides."""
    operator, constant = re.fullmatch(r"\(\(.*\) (and|or) (True|False)\)", text).groups()  # type: ignore[union-attr]
    return str(eval(text)), (operator, constant) in (("or", "True"), ("and", "False"))


def cities(text: str) -> tuple[str, bool]:
    chain = re.findall(r"(\w+) is (\w+) of (\w+)\.", text)
    assert [b for _, _, b in chain[:-1]] == [a for a, _, _ in chain[1:]] and text.endswith(f"From {chain[-1][2]}, {chain[0][0]} is to the")
    total = np.sum([STEPS[direction] for _, direction, _ in chain], axis=0)
    (found,) = [direction for direction, step in STEPS.items() if tuple(np.sign(total)) == step]
    return found, len({direction for _, direction, _ in chain}) == 1


def code(text: str) -> tuple[str, bool]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(text)
    first = re.search(r"y = (\d)", text)[1]  # type: ignore[index]
    return said.getvalue().strip(), said.getvalue().strip() == first


def system(text: str) -> tuple[str, bool]:
    a, b, p, c, d, q, x = map(int, re.fullmatch(r"(\d+) x \+ (\d+) y = (\d+), (\d+) x \+ (\d+) y = (\d+), x = (\d+), so y =", text).groups())  # type: ignore[union-attr]
    solution, _, rank, _ = np.linalg.lstsq(np.array([[a, b], [c, d], [1, 0]], dtype=float), np.array([p, q, x], dtype=float), rcond=None)
    assert rank == 2 and np.allclose(solution, np.round(solution)) and round(solution[0]) == x
    return str(round(solution[1])), np.linalg.matrix_rank(np.array([[a, b], [c, d]])) == 1


CHECKS = {"expressions": expression, "booleans": boolean, "cities": cities, "code": code, "systems": system}


@pytest.mark.parametrize("name", patterns.NAMES)
def test_every_answer_is_right_and_the_pattern_is_there_or_not(name: str) -> None:
    kind, _, how = name.rpartition("_")
    held = []
    for text, label in patterns.rows(name):
        answer, has_pattern = CHECKS[kind](text)
        assert answer == label, text
        held.append(has_pattern)
    if how == "pattern":
        assert all(held)
    elif kind == "code":
        assert 0.4 < np.mean(held) < 0.6, "half of the branches are dead"
    else:
        assert not any(held)


@pytest.mark.parametrize("name", patterns.NAMES)
def test_a_generated_task_is_balanced_and_large_enough(name: str) -> None:
    task = load_task(name)
    for pool in (task.train, task.queries):
        counts = Counter(row.label for row in pool)
        assert len(counts) == len(task.label_words) and max(counts.values()) < 1.5 * min(counts.values())
    assert min(len(task.train), len(task.queries)) >= 200, (len(task.train), len(task.queries))
    assert not {row.prompt for row in task.train} & {row.prompt for row in task.queries}


def test_rows_stay_the_same_for_ever() -> None:
    said = "\n".join(f"{name}\t{text}\t{label}" for name in patterns.NAMES for text, label in patterns.rows(name))
    assert hashlib.sha256(said.encode()).hexdigest() == "8dae8e534652b7f9905c16d55dcce9da3592937de4eda523d3567ebc0cab5713"
    assert load_task("expressions_pattern").queries[0].prompt == "(2 - 8) * (9 - 9) + 4 ="


def test_a_pair_is_planned_by_name(sweep_file) -> None:
    text = sweep_file.read_text().replace('tasks = ["fruit"]', 'tasks = ["expressions_pattern", "expressions_plain"]').replace("seeds = [1, 2]", "seeds = [1]")
    sweep_file.write_text(text.replace("num_demonstrations = 4", "num_demonstrations = [1, 2, 4]").replace("steps = [2, 4]", "steps = [1, 2, 4]"))
    blocks = make_plan(load_sweep(sweep_file)).blocks
    assert {(block.draw.task, block.num_demonstrations) for block in blocks} == {(f"expressions_{how}", k) for how in ("pattern", "plain") for k in (1, 2, 4)}
