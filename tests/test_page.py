"""The page in a browser: filters, the view of a cell, nothing asked of any network. Needs a Chromium; without one these tests are skipped and say so."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from iclgd_analysis import explorer, load
from iclgd_analysis.report import write_report
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.made import NUM_LAYERS, NUM_QUERIES, RATES, STEPS, Row, changed, make_rows, make_store

TASKS, SEEDS = ("subj", "trec"), (1, 2, 3)
HOSTILE = "</script><script>window.wrong = 1</script><b>bold</b> & <img src=http://127.0.0.1:9/x onerror='window.wrong = 1'>"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path: `apt-get install chromium`, then the page is tried in it")


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    rows = make_rows(tasks=TASKS, seeds=SEEDS)
    for row in rows:
        if row["kind"] == "zero_shot":
            row["prompts"] = [f"Question {number} of {row['task']} {HOSTILE}" + " word" * (100 if number == 3 else 0) for number in range(NUM_QUERIES)]
        if row["kind"] == "icl":
            row["demonstrations"] = [f"Demonstration {number} of seed {row['seed']} {HOSTILE} Red" for number in range(4)]
    return rows


@pytest.fixture(scope="module")
def page_file(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_store(tmp_path_factory.mktemp("store"), rows))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield launched
        launched.close()


class Opened:
    """The page in a tab, and all that a tab must not do: ask for anything else, complain, run what came from data."""

    def __init__(self, browser: Browser, file: Path, *, anchor: str = "", **options: Any) -> None:
        self.tab: Page = browser.new_page(**options)
        self.wrong: list[str] = []
        self.tab.on("request", lambda request: request.url.partition("#")[0] == file.as_uri() or self.wrong.append(request.url))
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.goto(file.as_uri() + anchor)

    def count(self) -> int:
        return int(re.match(r"\d+", self.tab.inner_text("#num-shown"))[0])

    def choose(self, **values: object) -> None:
        for name, value in values.items():
            self.tab.select_option(f"#filters select[name={name}]", label=str(value))

    def close(self) -> None:
        assert self.tab.evaluate("window.wrong") is None
        self.tab.close()
        assert self.wrong == []


@pytest.fixture
def opened(browser: Browser, page_file: Path) -> Iterator[Opened]:
    page = Opened(browser, page_file, viewport={"width": 1280, "height": 900})
    yield page
    page.close()


def cell(rows: list[Row], kind: str = "finetuned", **named: object) -> Row:
    (found,) = [row for row in rows if row["kind"] == kind and all(row[name] == value for name, value in named.items())]
    return found


AT = {"task": "trec", "seed": 2, "step": STEPS[0]}


def test_every_figure_is_drawn_and_the_page_asks_for_nothing_and_says_nothing(opened: Opened) -> None:
    for panel in opened.tab.query_selector_all("[data-figure]"):
        panel.scroll_into_view_if_needed()
    opened.tab.locator("[data-figure]:not(:has(.main-svg))").first.wait_for(state="detached")
    assert opened.count() == len(TASKS) * (1 + len(SEEDS) * (1 + 2 * 3 * len(STEPS)))


def test_filters_leave_the_cells_and_the_sections_asked_for(opened: Opened, rows: list[Row]) -> None:
    sections = opened.tab.locator("section[data-setting]")
    assert sections.count() == len(TASKS) and all(one.is_visible() for one in sections.all())
    opened.choose(task="trec")
    assert opened.count() == sum(row["task"] == "trec" for row in rows)
    assert [one.is_visible() for one in sections.all()] == ["trec" in one.locator("h2").inner_text() for one in sections.all()]
    assert opened.tab.locator("nav li:visible[data-setting]").count() == 1
    opened.choose(seed=2)  # zero-shot belongs to every seed
    assert opened.count() == sum(row["task"] == "trec" and row["seed"] in (2, None) for row in rows)
    opened.choose(method="layer_causal", step=STEPS[0])
    expected = [row for row in rows if (row["task"], row["seed"], row["method"], row["step"]) == ("trec", 2, "layer_causal", STEPS[0])]
    assert opened.count() == len(expected) == len(RATES["layer_causal"])
    shown = [[td.inner_text() for td in tr.locator("td").all()] for tr in opened.tab.locator("#cells-table tbody tr").all()]
    head = [th.inner_text().replace("\u200b", "").replace("\n", "") for th in opened.tab.locator("#cells-table th").all()]
    for line, row in zip(shown, sorted(expected, key=lambda row: row["learning_rate"]), strict=True):
        assert line[head.index("sim_aou")] == f"{row['sim_aou']:.3f}".replace("-", "\u2212")
        assert float(line[head.index("lr")]) == row["learning_rate"]
    opened.tab.get_by_role("button", name="show all", exact=True).click()
    assert opened.count() == len(rows)
    assert all(one.is_visible() for one in sections.all())


def test_the_table_is_sorted_by_what_is_clicked_and_undefined_figures_stand_last(opened: Opened) -> None:
    column = 1 + [th.inner_text().replace("\u200b", "").replace("\n", "") for th in opened.tab.locator("#cells-table th").all()].index("nll_label")
    for is_down in (False, True):
        opened.tab.locator(f"#cells-table th:nth-child({column}) button").click()
        while opened.tab.locator("#more").is_visible():
            opened.tab.locator("#more").click()
        texts = opened.tab.locator(f"#cells-table td:nth-child({column})").all_inner_texts()
        numbers = [float(text) for text in texts if text != "\N{EN DASH}"]
        assert texts[len(numbers) :] == ["\N{EN DASH}"] * (len(texts) - len(numbers)) and len(numbers) < len(texts)
        assert numbers == sorted(numbers, reverse=is_down)


def test_a_point_says_what_it_is_and_opens_its_cell(opened: Opened, rows: list[Row]) -> None:
    opened.choose(task="trec", seed=2, method="vanilla", step=STEPS[1])  # of three learning rates the largest diverged
    opened.choose(x="R (update_ratio)", y="nll_label")
    wanted = cell(rows, task="trec", seed=2, method="vanilla", step=STEPS[1], learning_rate=RATES["vanilla"][1])
    opened.tab.locator("#plot").scroll_into_view_if_needed()
    box = opened.tab.locator("#plot").bounding_box()
    found, x = "", box["x"] + 52 + (box["width"] - 64) * 1.05 / 1.1  # of two points the one of the larger R: a margin from the right end of the axis
    for y in range(int(box["y"]), int(box["y"] + box["height"]), 6):
        opened.tab.mouse.move(x, y)
        if opened.tab.locator("#tip").is_visible():
            found = opened.tab.inner_text("#tip")
            assert opened.tab.locator("#tip *").count() == 0  # text, whatever it says
            opened.tab.mouse.click(x, y)
            break
    assert found.startswith(f"vanilla, lr 1e-2, step {STEPS[1]}, draw 2/0 (trec") and f"nll_label {wanted['nll_label']:.3f}" in found
    opened.tab.wait_for_selector("#cell:not([hidden])")
    assert wanted["key"][:16] in opened.tab.inner_text("#cell .note")


def test_the_view_of_a_cell_shows_its_layers_and_what_each_state_predicts_for_each_prompt(browser: Browser, page_file: Path, rows: list[Row]) -> None:
    wanted = cell(rows, method="vanilla", learning_rate=RATES["vanilla"][0], **AT)
    opened = Opened(browser, page_file, anchor=f"#cell-{wanted['key'][:16]}")
    opened.tab.wait_for_selector("#cell .js-plotly-plot .main-svg")
    others = [row for row in rows if row["method"] == "layer_causal" and all(row[name] == value for name, value in AT.items())]
    beside = min(others, key=lambda row: row["nll_label"])

    def check() -> None:
        for place, name in enumerate(explorer.LAYERED):
            drawn = opened.tab.evaluate(f"document.querySelectorAll('#cell .js-plotly-plot')[{place}].data.map(line => [line.name, [...line.y]])")
            for row in (wanted, beside):
                expected = [layer[name] for layer in row["layers"] if layer["fold"] == "all"]
                got = dict(map(tuple, drawn))[row["method"]]
                assert len(got) == len(expected) == NUM_LAYERS
                assert all(a is b is None or math.isclose(a, b, rel_tol=1e-3) for a, b in zip(got, expected, strict=True)), name
        states = [cell(rows, "zero_shot", task="trec"), cell(rows, "icl", task="trec", seed=2), wanted, beside]
        lines = [[td.inner_text() for td in tr.locator("td").all()] for tr in opened.tab.locator("table.queries tbody tr").all()]
        assert len(lines) == NUM_QUERIES
        for number, (prompt, fold, gold, *predicted, nll, sim_aou) in enumerate(lines):
            query = wanted["examples"][number]
            assert HOSTILE in prompt if number != 3 else prompt.endswith("\N{HORIZONTAL ELLIPSIS}")
            assert prompt.startswith(f"Question {number} of trec")
            assert (fold, gold) == (query["fold"], wanted["label_words"][query["gold"]])
            for text, state in zip(predicted, states, strict=True):
                guess = state["examples"][number]["prediction"]
                assert text == ("\u2713 " if guess == query["gold"] else "\u2717 ") + state["label_words"][guess]
            assert math.isclose(float(nll), query["nll_label"], abs_tol=6e-3)
            assert math.isclose(float(sim_aou.replace("\u2212", "-")), query["sim_aou"], abs_tol=6e-4)

    check()
    assert opened.tab.locator("#cell b, #cell img").count() == 0  # text stays text
    opened.tab.locator("#cell summary").first.click()
    assert opened.tab.locator("#cell .texts li").all_inner_texts() == [f"Demonstration {number} of seed 2 {HOSTILE} Red" for number in range(4)]
    beside = next(row for row in others if row is not beside)
    opened.tab.select_option("#cell select", value=str(beside["learning_rate"]))
    expect(opened.tab.locator("#cell select")).to_have_value(str(beside["learning_rate"]))
    opened.tab.wait_for_selector("#cell .js-plotly-plot .main-svg")
    check()
    differ = sum(
        len({row["examples"][n]["prediction"] for row in (cell(rows, "zero_shot", task="trec"), cell(rows, "icl", task="trec", seed=2), wanted, beside)}) > 1
        for n in range(NUM_QUERIES)
    )
    opened.tab.check("#cell input[type=checkbox]")
    assert 0 < opened.tab.locator("table.queries tbody tr").count() == differ < NUM_QUERIES
    opened.tab.get_by_role("button", name="close").click()
    assert opened.tab.locator("#cell").is_hidden()
    opened.close()


def test_a_diverged_cell_and_a_store_without_prompts_say_what_is_not_there(browser: Browser, tmp_path: Path) -> None:
    rows = make_rows()
    gone = cell(rows, method="vanilla", learning_rate=RATES["vanilla"][2], step=STEPS[1])
    there = cell(rows, method="vanilla", learning_rate=RATES["vanilla"][0], step=STEPS[1])
    file = write_report(make_store(tmp_path / "store", rows))
    opened = Opened(browser, file, anchor=f"#cell-{gone['key'][:16]}")
    opened.tab.wait_for_selector("#cell:not([hidden])")
    assert "diverged: no figures" in opened.tab.inner_text("#cell") and "holds no layers and queries of this cell" in opened.tab.inner_text("#cell")
    opened.close()
    opened = Opened(browser, file, anchor=f"#cell-{there['key'][:16]}")
    opened.tab.wait_for_selector("table.queries")
    assert "The store holds no prompts" in opened.tab.inner_text("#cell")
    assert opened.tab.inner_text("table.queries tbody tr:first-child td.prompt") == "query q000"
    opened.close()


def test_what_does_not_fit_on_the_page_is_said(rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, browser: Browser) -> None:
    monkeypatch.setattr(explorer, "MAX_NUMBERS", 30 * (3 * NUM_LAYERS + 3 * NUM_QUERIES))
    file = write_report(make_store(tmp_path / "store", rows))
    (num_left_out,) = map(int, re.findall(r"Layers and queries of (\d+) cells are not on the page, which has room for", file.read_text()))
    held = json.loads(re.search(r'id="cells-data">(.*?)</script>', file.read_text())[1])["columns"]
    num_done = sum(row["status"] == "done" for row in rows)
    assert num_left_out == num_done - sum(place is not None for place in held["place"]) and num_done / 3 < num_left_out < num_done
    last = cell(rows, task="trec", seed=1, method="layer_causal", learning_rate=RATES["layer_causal"][0], step=STEPS[1])
    for step, has_layers in ((STEPS[1], True), (STEPS[0], False)):
        row = cell(rows, **{name: last[name] for name in ("task", "seed", "method", "learning_rate")}, step=step)
        opened = Opened(browser, file, anchor=f"#cell-{row['key'][:16]}")
        opened.tab.wait_for_selector("#cell:not([hidden])")
        assert opened.tab.locator("table.queries").count() == has_layers
        opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_scrolling_sideways_and_dark_is_dark(browser: Browser, page_file: Path, scheme: str) -> None:
    opened = Opened(browser, page_file, viewport={"width": 400, "height": 800}, color_scheme=scheme)
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= 400
    opened.tab.locator("#cells-table button", has_text="open").nth(9).click()
    opened.tab.wait_for_selector("table.queries")
    assert opened.tab.evaluate("document.documentElement.scrollWidth") <= 400
    paper = [int(part) for part in re.findall(r"\d+", opened.tab.evaluate("getComputedStyle(document.body).backgroundColor"))]
    assert max(paper) < 60 if scheme == "dark" else min(paper) > 200
    opened.close()


def test_on_paper_every_figure_is_drawn_and_the_cells_are_left_out(opened: Opened) -> None:
    pdf = opened.tab.pdf()
    assert pdf.startswith(b"%PDF") and len(pdf) > 50_000
    opened.tab.emulate_media(media="print")
    assert opened.tab.locator("#cells").is_hidden()
    assert opened.tab.evaluate("[...document.querySelectorAll('[data-figure]')].every(panel => panel.dataset.drawn)")


def test_methods_whose_options_are_markup_stay_text_in_figures_and_tables(browser: Browser, tmp_path: Path) -> None:
    link = "<a href='https://evil.example/'>x</a><b>B</b>"
    rows = []
    for number, options in enumerate((link, "plain")):
        made = make_rows(rates={"own": (1e-3, 1e-2)}, words=["Red", link])
        for row in made:
            if row["kind"] == "finetuned":
                row |= {"method_options": json.dumps({"note": options}), "key": f"{number}{row['key'][1:]}"}
        rows += made if not number else [row for row in made if row["kind"] == "finetuned"]
    opened = Opened(browser, write_report(make_store(tmp_path / "store", rows)))
    opened.tab.locator("#cells-table button", has_text="open").nth(3).click()
    opened.tab.wait_for_selector("#cell .js-plotly-plot .main-svg")
    assert link in opened.tab.inner_text("#cell h3") and link in opened.tab.inner_text("table.queries")
    assert opened.tab.locator("#cell a, #cell b, #cells-table a, #legend a, .main-svg a").count() == 0
    opened.close()


def test_what_settings_share_is_no_cell_without_layers_and_each_untrained_model_has_its_own_zero_shot(browser: Browser, tmp_path: Path) -> None:
    rows = make_rows(rates={"vanilla": (1e-3, 1e-2)}, seeds=(1, 2))
    rows += [changed(row, train_on="other_task") for row in rows if row["kind"] == "finetuned"]
    rows += [changed(row, init="random", init_scheme="fairseq", init_seed=seed) for seed in (1, 2) for row in rows if row["train_on"] in ("true", None)]
    for row in rows:
        if row["kind"] == "icl":
            row["demonstrations"] = [f"Demonstration {number} of seed {row['seed']}" for number in range(4)]
        if row["kind"] == "zero_shot" and row["init_seed"]:
            row["balanced_accuracy"] = row["init_seed"] / 10
    file = write_report(make_store(tmp_path / "store", rows))
    assert "are not on the page" not in file.read_text()
    of_second = cell(rows, init_seed=2, seed=2, learning_rate=1e-3, step=STEPS[1])
    opened = Opened(browser, file, anchor=f"#cell-{of_second['key'][:16]}")
    opened.tab.wait_for_selector("table.queries")
    assert opened.tab.inner_text("#cell table:not(.queries) tbody tr:first-child td:nth-child(2)") == "0.200"
    zero_shot = cell(rows, "zero_shot", init_seed=1)
    opened.tab.evaluate(f"location.hash = '#cell-{zero_shot['key'][:16]}'")  # the address is followed while the page is open
    opened.tab.locator("#cell .note", has_text=zero_shot["key"][:16]).wait_for()
    assert opened.tab.locator("#cell table:not(.queries) thead th").all_inner_texts() == ["figure", "in-context", "zero-shot"]
    for train_on, also in (("true", ""), ("other_task", "; finetuned on other task instead")):
        shown = cell(rows, init_seed=None, seed=2, learning_rate=1e-3, step=STEPS[1], train_on=train_on)
        opened.tab.evaluate(f"location.hash = '#cell-{shown['key'][:16]}'")
        opened.tab.locator("#cell .note", has_text=shown["key"][:16]).wait_for()
        assert opened.tab.locator("#cell summary").first.inner_text() == f"4 demonstrations in the context{also}"
    page = json.loads(explorer.data(load(tmp_path / "store"), load(tmp_path / "store").settings())["json"])
    assert page["texts"] == [[f"Demonstration {number} of seed {seed}" for number in range(4)] for seed in (1, 2)], "once, however many settings show them"
    opened.close()


def test_an_opened_cell_stands_below_the_filters_of_however_many_lines(browser: Browser, page_file: Path) -> None:
    opened = Opened(browser, page_file, viewport={"width": 520, "height": 900})
    opened.tab.locator("#cells-table td button").nth(5).click()
    opened.tab.wait_for_selector("#cell .js-plotly-plot .main-svg")
    of = "document.querySelector('{}').getBoundingClientRect()"
    assert opened.tab.evaluate(of.format("#filters") + ".height") > 60, "more than a line"
    assert opened.tab.evaluate(f"{of.format('#cell h3')}.top >= {of.format('#filters')}.bottom")
    opened.close()


def test_the_keyboard_keeps_its_place(opened: Opened) -> None:
    focused = "document.activeElement.textContent"
    opened.tab.locator("#cells-table th button", has_text="lr").focus()
    opened.tab.keyboard.press("Enter")
    assert opened.tab.evaluate(focused) == "lr"
    opened.tab.locator("#cells-table td button").first.focus()
    opened.tab.keyboard.press("Enter")
    opened.tab.wait_for_selector("#cell:not([hidden])")
    opened.tab.get_by_role("button", name="close").focus()
    opened.tab.keyboard.press("Enter")
    assert opened.tab.evaluate(focused) == "open" and opened.tab.evaluate("document.activeElement.closest('tr').rowIndex") == 1
