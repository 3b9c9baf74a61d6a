"""alpha at the same, at the selected and at matched learning rates, against plain loops over a made-up store."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from pathlib import Path

import pytest
from iclgd_analysis import alpha, load
from iclgd_analysis.report import write_report
from scipy import stats

from tests.made import LAST, Row, make_rows, make_store, measure, of_fold, only

SEEDS = (1, 2, 3)
RATES = {"vanilla": (1e-3, 1e-2, 1e-1), "layer_causal": (1e-4, 1e-3, 1e-2)}


def value(a: Row, b: Row, fold: str) -> float:
    return random.Random(f"{a['key']} {b['key']} {fold}").uniform(-1, 1)


@pytest.fixture
def rows() -> list[Row]:
    """A store in which every finished cell of vanilla has been compared with every one of layer_causal at the largest step; either of the two holds the row."""
    rows = make_rows(seeds=SEEDS, rates=RATES)
    for a in cells(rows, "vanilla"):
        for b in cells(rows, "layer_causal"):
            if a["seed"] == b["seed"] and "done" == a["status"] == b["status"]:
                holder, partner = (a, b) if a["seed"] == 2 else (b, a)
                made = [measure("pair", partner["key"], "alpha", value(a, b, fold)) | {"fold": fold} for fold in ("A", "B", "all")]
                holder["measures"] = [*(holder["measures"] or []), *made]
    return rows


def cells(rows: list[Row], method: str, **named: object) -> list[Row]:
    return [row for row in rows if row["method"] == method and row["step"] == LAST and all(row[name] == value for name, value in named.items())]


def pair(rows: list[Row], seed: int, rates: tuple[float, float], fold: str = "all") -> float:
    (a,), (b,) = (cells(rows, method, seed=seed, learning_rate=rate) for method, rate in zip(RATES, rates, strict=True))
    return value(a, b, fold)


def interval(values: list[float]) -> tuple[float, float, float]:
    mean, half = sum(values) / len(values), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return mean, mean - half, mean + half


def estimate_of(line: Row) -> tuple[float, float, float]:
    return line["mean"], line["lower"], line["upper"]


def test_at_the_same_learning_rate(rows: list[Row], tmp_path: Path) -> None:
    frames = load(make_store(tmp_path, rows))
    table = alpha.data(frames, frames.settings()[0])
    assert table[table["place"] == alpha.SAME]["learning_rates"].tolist() == ["1e-3", "1e-2"]
    for rate, named in ((1e-3, "1e-3"), (1e-2, "1e-2")):
        line = only(table, place=alpha.SAME, learning_rates=named)
        assert estimate_of(line) == pytest.approx(interval([pair(rows, seed, (rate, rate)) for seed in SEEDS]))
        assert (line["num_used"], line["num_planned"], line["method"]) == (3, 3, "layer_causal")


def test_at_the_learning_rates_that_the_other_fold_selects(rows: list[Row], tmp_path: Path) -> None:
    frames = load(make_store(tmp_path, rows))
    line = only(alpha.data(frames, frames.settings()[0]), place=alpha.SELECTED)

    def best(method: str, fold: str) -> float:
        means = {}
        for rate in RATES[method]:
            mine = cells(rows, method, learning_rate=rate)
            if all(row["status"] == "done" for row in mine):
                means[rate] = sum(of_fold(row, fold, "nll_label") for row in mine) / len(mine)
        return min(means, key=lambda rate: means[rate])

    chosen = {reports: tuple(best(method, chooses) for method in RATES) for chooses, reports in (("A", "B"), ("B", "A"))}
    expected = [sum(pair(rows, seed, chosen[fold], fold) for fold in "AB") / 2 for seed in SEEDS]
    assert estimate_of(line) == pytest.approx(interval(expected))


def test_at_equal_size_between_the_four_cells_around(rows: list[Row], tmp_path: Path) -> None:
    frames = load(make_store(tmp_path, rows))
    line = only(alpha.data(frames, frames.settings()[0]), place=alpha.MATCHED)

    def weights(method: str, seed: int) -> dict[float, float]:
        ratios = [(rate, cells(rows, method, seed=seed, learning_rate=rate)[0]["update_ratio"]) for rate in RATES[method]]
        for (low, small), (high, large) in pairwise(ratios):
            if large is not None and small < 0.5 < large:
                share = math.log(0.5 / small) / math.log(large / small)
                return {low: 1 - share, high: share}
        raise AssertionError(f"{method} does not cross: {ratios}")

    expected = []
    for seed in SEEDS:
        sides = [weights(method, seed) for method in RATES]
        expected.append(sum(u * v * pair(rows, seed, (a, b)) for a, u in sides[0].items() for b, v in sides[1].items()))
    assert estimate_of(line) == pytest.approx(interval(expected))
    assert line["learning_rates"] == "R = 0.5"


def test_a_draw_without_one_of_its_pairs_is_left_out_and_counted(rows: list[Row], tmp_path: Path) -> None:
    for row in rows:
        if row["seed"] == 1 and row["measures"]:
            row["measures"] = [m for m in row["measures"] if m["kind"] != "pair"]
    frames = load(make_store(tmp_path, rows))
    table = alpha.data(frames, frames.settings()[0])
    assert set(table["num_used"]) == {2} and set(table["num_planned"]) == {3}


def test_the_page_has_the_table_where_there_are_pairs_and_none_elsewhere(rows: list[Row], tmp_path: Path) -> None:
    assert alpha.TITLE in write_report(make_store(tmp_path / "pairs", rows)).read_text()
    assert (tmp_path / "pairs" / "figures" / "alpha.csv").exists()
    assert alpha.TITLE not in write_report(make_store(tmp_path / "none", make_rows())).read_text()
