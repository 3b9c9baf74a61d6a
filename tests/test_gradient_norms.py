"""Gradient norms: hand-made stores, every number recomputed here with plain loops; and the page that holds them."""

from __future__ import annotations

import csv
import math
import re
import sys
from pathlib import Path

import pytest
from iclgd_analysis import gradient_norms, load
from iclgd_analysis.report import main, write_report

from tests.made import STEPS, Row, changed, diverged, figure, json_of, make_rows, make_store

TASKS = ("subj", "trec")
CROSS = "\N{MULTIPLICATION SIGN}"


def norm_of(row: Row, layer: int) -> float:
    return (1.0 if row["method"] == "vanilla" else 0.01) * (layer + 1) * 10.0 ** row["step"] * (row["seed"] + 0.1 * row["order"])


def with_gradients(rows: list[Row]) -> list[Row]:
    """Give every finetuned layer a norm on all queries; of layer_causal, layer 0 learns nothing and layer 2 has a gradient of exactly 0."""
    for row in rows:
        for layer in row["layers"] if row["kind"] == "finetuned" else []:
            if layer["fold"] == "all":
                layer["gradient_norm"] = norm_of(row, layer["layer"])
                if row["method"] == "layer_causal" and layer["layer"] in (0, 2):
                    layer["gradient_norm"] = None if layer["layer"] == 0 else 0.0
    return rows


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    """Seed 1 has two orders; at the learning rate that is selected, vanilla is made to diverge in some draws at step 2, and stays selectable."""
    rows = make_rows(seeds=(1, 2))
    rows += [changed(row, order=1) for row in rows if row["seed"] == 1]
    rows = with_gradients(rows)
    for row in rows:
        for fold in row["folds"]:
            fold["nll_label"] = 0.1 if row["learning_rate"] == {"vanilla": 1e-2, "layer_causal": 1e-3}.get(row["method"]) else 0.9
    for index, row in enumerate(rows):
        if (row["method"], row["learning_rate"], row["step"], row["seed"]) == ("vanilla", 1e-2, 2, 2):
            rows[index] = diverged(row)
    return rows, make_store(tmp_path_factory.mktemp("pulled"), rows)


def test_gradient_norms_are_means_over_seeds_of_means_over_orders_at_the_selected_learning_rate(pulled: tuple[list[Row], Path]) -> None:
    rows, root = pulled
    frames = load(root)
    found = gradient_norms.data(frames, frames.settings()[0])
    assert len(found) == 2 * len(STEPS) * 4
    for line in found.to_dict("records"):
        method, learning_rate = line["method"], {"vanilla": 1e-2, "layer_causal": 1e-3}[line["method"]]
        cells = [cell for cell in rows if (cell["method"], cell["learning_rate"], cell["step"]) == (method, learning_rate, line["step"])]
        per_seed: dict[int, list[float]] = {}
        for cell in cells:
            for layer in cell["layers"]:
                if (layer["layer"], layer["fold"]) == (line["layer"], "all") and layer["gradient_norm"] is not None:
                    per_seed.setdefault(cell["seed"], []).append(layer["gradient_norm"])
        means = [sum(values) / len(values) for values in per_seed.values()]
        assert line["gradient_norm"] == pytest.approx(sum(means) / len(means) if means else math.nan, nan_ok=True)
        assert line["num_used"] == sum(map(len, per_seed.values()))
        assert (line["learning_rate"], line["num_cells"], line["num_draws"]) == (learning_rate, 3, 3)
        assert line["num_diverged"] == sum(cell["status"] == "diverged" for cell in cells)
        expected = "value" if method == "vanilla" else {0: "undefined", 2: "zero"}.get(line["layer"], "value")
        assert line["state"] == expected
    assert set(found.loc[(found["method"] == "vanilla") & (found["step"] == 2), "num_used"]) == {2}  # seed 2 diverged there


def test_the_maps_share_a_logarithmic_scale_and_show_what_has_no_number(pulled: tuple[list[Row], Path]) -> None:
    frames = load(pulled[1])
    setting = frames.settings()[0]
    rows = gradient_norms.data(frames, setting)
    vanilla, causal = gradient_norms.panels(setting, rows)
    values = rows.loc[rows["state"] == "value", "gradient_norm"]
    for panel in (vanilla, causal):
        axis = panel.figure.layout.coloraxis
        assert (axis.cmin, axis.cmax) == pytest.approx((math.log10(values.min()), math.log10(values.max())))
    at = {(line["method"], line["step"], line["layer"]): line["gradient_norm"] for line in rows.to_dict("records")}
    for method, panel in (("vanilla", vanilla), ("layer_causal", causal)):
        drawn = json_of(panel)["data"][0]
        for i, step in enumerate(STEPS):
            for j in range(4):
                norm = at[method, step, j]
                assert drawn["z"][i][j] == (pytest.approx(math.log10(norm), abs=1e-4) if norm > 0 else None)
    assert json_of(vanilla)["data"][0]["y"] == [f"2 {CROSS}", "4"]
    assert len(json_of(vanilla)["data"]) == 1
    states = json_of(causal)["data"][1]
    assert states["z"] == [[0, None, 1, None]] * 2
    assert [line[0] for line in states["text"]] == ["undefined; 0 used of 3 draws"] * 2
    assert vanilla.title == f"vanilla 1e-2: {written(at['vanilla', 2, 0])} to {written(at['vanilla', 4, 3])}, largest in layer 3 at step 4"


def written(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if value >= 1e4 else f"{float(f'{value:.2e}'):g}"


def test_a_step_where_every_draw_diverged_is_neither_zero_nor_blank(tmp_path: Path) -> None:
    rows = with_gradients(make_rows(seeds=(1, 2)))
    for index, row in enumerate(rows):  # at the selected learning rate, and with a figure at the largest step: else it could not be selected
        for fold in row["folds"]:
            fold["nll_label"] = 0.1 if row["learning_rate"] == 1e-2 and row["method"] == "vanilla" else 0.9
        if (row["method"], row["learning_rate"], row["step"]) == ("vanilla", 1e-2, 2):
            rows[index] = diverged(row)
    frames = load(make_store(tmp_path, rows))
    setting = frames.settings()[0]
    found = gradient_norms.data(frames, setting)
    gone = found[(found["method"] == "vanilla") & (found["step"] == 2)]
    assert set(gone["state"]) == {"diverged"} and gone["gradient_norm"].isna().all() and set(gone["num_used"]) == {0}
    values, states = json_of(gradient_norms.panels(setting, found)[0])["data"]
    assert (values["z"][0], states["z"]) == ([None] * 4, [[2] * 4, [None] * 4])
    assert values["y"] == ["2", "4"]


def test_a_store_without_gradients_has_no_map_and_a_method_without_a_learning_rate_neither(tmp_path: Path) -> None:
    frames = load(make_store(tmp_path / "none", make_rows()))
    assert gradient_norms.panels(frames.settings()[0], gradient_norms.data(frames, frames.settings()[0])) == []
    rows = [diverged(row) if row["method"] == "vanilla" else row for row in with_gradients(make_rows())]
    frames = load(make_store(tmp_path / "half", rows))
    found = gradient_norms.data(frames, frames.settings()[0])
    assert set(found["method"]) == {"layer_causal"}
    assert [panel.title.split()[0] for panel in gradient_norms.panels(frames.settings()[0], found)] == ["layer_causal"]
    frames = load(make_store(tmp_path / "all", [diverged(row) if row["kind"] == "finetuned" else row for row in make_rows()]))
    assert gradient_norms.data(frames, frames.settings()[0]).empty


def test_the_page_holds_the_three_and_their_data(tmp_path: Path) -> None:
    page = write_report(make_store(tmp_path, with_gradients(make_rows(tasks=TASKS))))
    text = page.read_text()
    assert re.findall(r'<figure id="s0-(\w+)"', text) == ["heatmap", "ratio", "pareto", "layer_profile", "gradient_norms", "reliability"]
    assert text.count("<h3>Accuracy: Tiny-135M-Instruct.Q4_1, k = 4</h3>") == 1
    assert figure(text, "s0-pareto-0") and figure(text, "s1-gradient_norms-1")
    for name, count in {"accuracy": 3 * 4 * 2, "gradient_norms": 2 * 2 * len(STEPS) * 4, "pareto": 2 * 6}.items():
        with open(page.parent / "figures" / f"{name}.csv") as file:
            assert len(list(csv.DictReader(file))) == count, name


def test_a_page_of_gradient_norms_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gradient_norms", str(make_store(tmp_path, with_gradients(make_rows())))])
    main(only="gradient_norms")
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["gradient_norms.csv", "gradient_norms.html"]
    assert re.findall(r'<figure id="(s0-\w+)"', (tmp_path / "figures" / "gradient_norms.html").read_text()) == ["s0-gradient_norms"]
