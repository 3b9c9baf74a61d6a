"""The search for learning rates: what is asked, judged, promoted and resumed; on made-up scores, without training."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from iclgd_dist.blocks import Cell, Judged
from iclgd_dist.config import Sweep, SweepError, load_sweep
from iclgd_dist.plan import Plan, make_plan
from iclgd_dist.search import Score, Study, check_sampler, rounds, rungs_of, studies_of
from iclgd_dist.search_spec import Search

LOW, HIGH = 1e-4, 1e-1
SEARCH = """
[search]
samples = {samples}
per_round = 4
{more}
[search.learning_rates]
vanilla = [1e-4, 1e-1]
layer_causal = [1e-4, 1e-1]
"""


def bowl(cell: Cell, seed: int, num_queries: int) -> float:
    """Return a loss with its best at 4e-3 (vanilla) or 1e-3, as flat and as steep as a real one; another seed is a little different."""
    assert cell.learning_rate is not None and cell.step is not None
    away = math.log10(cell.learning_rate / (4e-3 if cell.method == "vanilla" else 1e-3))
    return 0.5 + 0.12 * min(away**2, 4.0) + 0.02 / cell.step + 0.001 * seed


class Made:
    """A store that is made up: a cell is there once it was planned, with a figure of our own."""

    def __init__(self, figure: Callable[[Cell, int, int], float | None], fails: Callable[[Cell], bool] = lambda cell: False) -> None:
        self.figure, self.fails = figure, fails
        self.cells: dict[str, tuple[Cell, int, int]] = {}
        self.plans: list[Plan] = []
        self.stopped: set[str] = set()
        self.ends_after = 10**9
        self.accuracies = {"zero_shot": 0.6, "icl": 0.6}

    def run(self, plan: Plan, said: str) -> int:
        self.plans.append(plan)
        for block in plan.blocks:
            assert block.origin == "search"
            for cell in block.cells:
                if not self.fails(cell):
                    self.cells[cell.key] = (cell, block.seed, len(block.draw.queries))
        return 75 if len(self.plans) >= self.ends_after else 0

    def judge(self, keys: Sequence[str]) -> Mapping[str, Mapping[str, float | None]]:
        found = {}
        for key in keys:
            if key in self.cells:
                cell, seed, num_queries = self.cells[key]
                trained = cell.kind == "finetuned"
                found[key] = {
                    "nll_label": self.figure(cell, seed, num_queries) if trained else 0.7,
                    "balanced_accuracy": (0.8 if cell.learning_rate < 2e-3 else 0.5) if trained else self.accuracies[cell.kind],
                }
        return found

    def search(self, sweep: Sweep) -> list[Study]:
        studies = studies_of(sweep)
        for code in rounds(sweep, studies, lambda: set(self.cells), self.judge, self.run, lambda: self.stopped):
            if code:
                break
        return studies

    @property
    def num_finetuned(self) -> int:
        return sum(cell.kind == "finetuned" for cell, _, _ in self.cells.values())


@pytest.fixture
def made() -> Made:
    return Made(bowl)


@pytest.fixture
def swept(sweep_file: Path) -> Callable[..., Sweep]:
    text = sweep_file.read_text()

    def write(samples: int = 12, more: str = "", replace: tuple[str, str] = ("", "")) -> Sweep:
        sweep_file.write_text(text.replace(*replace) + SEARCH.format(samples=samples, more=more))
        return load_sweep(sweep_file)

    return write


@pytest.mark.parametrize("sampler", ["tpe", "random", "grid"])
def test_each_method_gets_its_samples_inside_its_range(swept: Callable[..., Sweep], made: Made, sampler: str) -> None:
    for study in made.search(swept(10, f'sampler = "{sampler}"')):
        asked = list(study.scores[0])
        assert 8 <= len(asked) <= 10 and all(LOW <= rate <= HIGH for rate in asked)
        assert all(rate == float(f"{rate:.2e}") for rate in asked)
        assert min(asked) < 5e-4 and max(asked) > 2e-2, "the whole range is looked at"
        assert [score.step for score in study.scores[0][asked[0]]] == [2, 4]
    assert [len(plan.blocks) for plan in made.plans] == [2, 2, 2], "both methods of a draw train together: a block for each seed"


def test_a_plan_says_what_only_a_search_looks_for(swept: Callable[..., Sweep]) -> None:
    assert make_plan(swept()).warnings == ()
    (warning,) = make_plan(swept(replace=("layer_causal = [0.003, 0.05]\n\n", "\n"))).warnings
    assert warning == "layer_causal: no learning rates but those that [search] looks for, which only `iclgd tune` does"


def test_the_best_is_found_with_few_samples(swept: Callable[..., Sweep]) -> None:
    """The median over ten seeds of the sampler is within 2 % of the best of a grid of three times as many."""
    grid = min(0.5 + 0.12 * math.log10(rate / 4e-3) ** 2 for rate in np.geomspace(LOW, HIGH, 24)) + 0.02 / 4 + 0.0015
    for sampler in ("tpe", "random"):
        found = []
        for seed in range(10):
            study, _ = Made(bowl).search(swept(8, f'sampler = "{sampler}"\nseed = {seed}'))
            assert study.method == "vanilla" and study.best
            found.append(study.best.objective)
        assert statistics.median(found) <= 1.02 * grid, (sampler, found)


def test_the_same_search_asks_the_same_and_a_killed_one_resumes(swept: Callable[..., Sweep]) -> None:
    sweep, whole, killed = swept(12), Made(bowl), Made(bowl)
    first = whole.search(sweep)
    killed.ends_after = 2
    killed.search(sweep)
    assert 0 < killed.num_finetuned < whole.num_finetuned
    killed.ends_after = 10**9
    before = set(killed.cells)
    again = killed.search(sweep)
    assert [study.scores for study in again] == [study.scores for study in first]
    assert killed.cells.keys() == whole.cells.keys()
    assert not {cell.key for plan in killed.plans[2:] for block in plan.blocks for cell in block.cells} & before, "what is there is not run again"
    num_plans = len(whole.plans)
    whole.search(sweep)
    assert len(whole.plans) == num_plans, "all is answered from the store"


def test_a_constraint_rules_out_what_misses_it(swept: Callable[..., Sweep], made: Made) -> None:
    vanilla, _ = made.search(swept(12, 'constraints = ["balanced_accuracy >= zero_shot"]'))
    assert vanilla.best and vanilla.best.learning_rate < 2e-3, "the lowest loss is at 4e-3, where accuracy is too low"
    apart = Made(bowl)
    apart.accuracies = {"zero_shot": 0.4, "icl": 0.75}
    below, _ = apart.search(swept(12, 'constraints = ["balanced_accuracy >= icl"]'))
    above, _ = apart.search(swept(12, 'constraints = ["balanced_accuracy >= zero_shot"]'))
    assert below.best and above.best and below.best.learning_rate < 2e-3 < above.best.learning_rate < 9e-3
    none, _ = Made(bowl).search(swept(8, 'constraints = ["balanced_accuracy >= 0.95"]'))
    assert none.best is None
    free, _ = Made(bowl).search(swept(12))
    assert free.best and 2e-3 < free.best.learning_rate < 9e-3


def test_what_diverges_is_never_best_and_what_cannot_run_is_no_score(swept: Callable[..., Sweep]) -> None:
    made = Made(
        lambda cell, seed, queries: None if cell.learning_rate > 1e-3 else bowl(cell, seed, queries), fails=lambda cell: (cell.learning_rate or 1) < 2e-4
    )
    study, _ = made.search(swept(12))
    assert study.best and 5e-4 <= study.best.learning_rate <= 1e-3
    assert all(not found for rate, found in study.scores[0].items() if rate < 2e-4)
    assert all(math.isinf(score.loss) for rate, found in study.scores[0].items() if rate > 1e-3 for score in found)


def test_rungs_grow_in_queries_then_in_seeds_and_keep_the_best(swept: Callable[..., Sweep], made: Made) -> None:
    rungs = "rungs = [{ num_queries = 4 }, { num_queries = 8 }]\nkeep = 0.25"
    sweep = swept(8, rungs, replace=("seeds = [1, 2]", "seeds = [1, 2, 3]"))
    assert [(rung.num_queries, rung.num_seeds) for rung in rungs_of(sweep)] == [(4, 1), (8, 1), (8, 3)]
    for study in made.search(sweep):
        num = len(study.scores[0])  # 8, or less where two samples are the same number
        assert [len(scores) for scores in study.scores] == [num, math.ceil(num / 4), 1] and num >= 6
        ranked = [score.learning_rate for score in study.ranking(0)]
        assert set(study.scores[1]) == set(ranked[: math.ceil(num / 4)])
        assert study.best and study.best.learning_rate in study.scores[2]
    sizes = {(queries, seed) for cell, seed, queries in made.cells.values() if cell.kind == "finetuned"}
    assert sizes == {(4, 1), (8, 1), (8, 2), (8, 3)}


def test_a_search_that_is_stopped_before_its_last_rung_still_says_what_was_best(swept: Callable[..., Sweep], made: Made) -> None:
    sweep = swept(8, "rungs = [{ num_queries = 4 }]")
    made.ends_after = 3  # two rounds of the first rung, and the second rung
    made.fails = lambda cell: len(made.plans) == 3
    study, _ = made.search(sweep)
    assert len(study.scores) == 2 and study.best and abs(math.log10(study.best.learning_rate / 4e-3)) < 0.5


@pytest.mark.parametrize(
    ("objective", "sign"), [("nll_raw", 1), ("kl_label_icl", 1), ("ece", 1), ("brier_batch", 1), ("balanced_accuracy", -1), ("sim_aou", -1)]
)
def test_what_is_better_small_is_made_small(swept: Callable[..., Sweep], objective: str, sign: int) -> None:
    search = swept(8, f'objective = "{objective}"').search
    assert search is not None and search.sign == sign


def test_the_best_step_counts_where_it_is_asked_for(swept: Callable[..., Sweep]) -> None:
    worse_later = Made(lambda cell, seed, queries: bowl(cell, seed, queries) + 0.1 * cell.step)
    last, _ = worse_later.search(swept(8))
    best, _ = worse_later.search(swept(8, 'step = "best"'))
    assert last.best and last.best.step == 4 and best.best and best.best.step == 2


def test_an_objective_that_should_be_large_is_made_large(swept: Callable[..., Sweep]) -> None:
    made = Made(bowl)
    study, _ = made.search(swept(8, 'objective = "balanced_accuracy"'))
    assert study.best and study.best.objective == 0.8 and study.best.loss == -0.8


def test_a_best_at_the_end_of_its_range_is_marked(swept: Callable[..., Sweep]) -> None:
    falling = Made(lambda cell, seed, queries: -math.log10(cell.learning_rate))
    assert {study.mark for study in falling.search(swept(12, 'sampler = "grid"'))} == {"at the edge of its range: widen it"}
    assert Made(bowl).search(swept(12))[0].mark == ""


def test_what_was_not_tried_is_not_the_end_of_a_range(swept: Callable[..., Sweep]) -> None:
    study = studies_of(swept(4))[0]
    made = {rate: [Score(rate, 4, loss, loss, 0.0)] for rate, loss in ((1e-3, 0.1), (1e-2, 0.2), (9e-2, 0.3))}
    study.scores.append(made)  # of [1e-4, 1e-1]: nothing below 1e-3
    assert study.mark == "nothing beyond it was tried: raise samples"
    study.scores[0] = {**made, 2e-4: []}
    assert study.mark == "nothing beyond it was tried: raise samples", "one that could not be computed is not tried"
    study.scores[0] = {1e-4: [Score(1e-4, 4, 0.1, 0.1, 0.0)], **made}
    assert study.mark == "at the edge of its range: widen it"
    study.scores[0] = {3e-3: [Score(3e-3, 4, 0.1, 0.1, 0.0)]}
    assert study.mark == "nothing beyond it was tried: raise samples"
    study.scores[0] = {rate: [Score(rate, 4, math.nan, math.inf, 0.0)] for rate in made}
    assert study.mark == "nll_label is defined nowhere"
    study.scores[0] = {rate: [Score(rate, 4, 0.3, 0.3, 0.1)] for rate in made}
    assert study.mark == "none holds all constraints"
    study.scores[0] = {rate: [] for rate in made}
    assert study.mark == "nothing was computed"


def test_more_samples_or_tasks_go_on_from_what_was_asked(swept: Callable[..., Sweep]) -> None:
    """Of 8 samples, then 14: the first 8 are the same, from the store. So they are where another method is searched before this one."""
    made = Made(bowl)
    few = made.search(swept(8))
    before = len(made.plans)
    more = made.search(swept(14))
    for first, then in zip(few, more, strict=True):
        assert set(first.scores[0]) <= set(then.scores[0]) and len(then.scores[0]) > len(first.scores[0])
    assert len(made.plans) == before + 2
    alone = Made(bowl).search(swept(8, replace=("", "")).model_copy(update={"methods": ("layer_causal",)}))
    assert [study.method for study in alone] == ["layer_causal"] and alone[0].scores == few[1].scores


def test_tpe_asks_near_what_was_good(swept: Callable[..., Sweep]) -> None:
    """Of its later samples more lie near the best than of random ones, which cover the range evenly."""

    def near(sampler: str) -> int:
        later = [list(Made(bowl).search(swept(16, f'sampler = "{sampler}"\nseed = {seed}'))[0].scores[0])[4:] for seed in range(4)]
        return sum(abs(math.log10(rate / 4e-3)) < 0.5 for rates in later for rate in rates)

    assert near("tpe") > 1.3 * near("random")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('objective = "nll_lable"', "did you mean 'nll_label'"),
        ('objective = "loss"', "search: unknown metric 'loss'"),  # known over all queries alone
        ('constraints = ["gradient_norm <= 1"]', "search: unknown metric 'gradient_norm'"),
        ('constraints = ["balanced_accuracy >= nan"]', 'must be like "balanced_accuracy >= zero_shot"'),
        ('constraints = ["sim_aou >= icl"]', "search.constraints: icl has no sim_aou; it has accuracy, balanced_accuracy, nll_label"),
        ('constraints = ["agreement_icl >= zero_shot"]', "search.constraints: zero_shot has no agreement_icl"),
        ('constraints = ["balanced_accuracy > zero_shot"]', 'must be like "balanced_accuracy >= zero_shot"'),
        ('constraints = ["balanced_accurracy >= zero_shot"]', "did you mean 'balanced_accuracy'"),
        ("rungs = [{ num_queries = 9 }]", "num_queries must be at most the sweep's 8, got 9"),
        ("rungs = [{ num_queries = 8 }, { num_queries = 4 }]", "must grow from rung to rung"),
        ("rungs = [{ num_queries = 8, num_seeds = 3 }]", "num_seeds must be at most the sweep's 2, got 3"),
        ("keep = 1.0", "keep must be less than 1"),
        ('sampler = "bayes"', "must be 'tpe', 'random' or 'grid'"),
        ('scheduler = "asha"', "'vanilla' is none, and its steps are almost free"),
        ('scheduler = "hyperband"', "must be 'none' or 'asha'"),
        ("reduction_factor = 1", "must be at least 2"),
        ("sample = 8", "unknown key 'sample' in [search]; did you mean 'samples'"),
        ("rungs = [{ num_querys = 8, num_queries = 8 }]", "unknown key 'num_querys' in [[search.rungs]]; did you mean 'num_queries'"),
    ],
)
def test_a_mistake_in_the_section_is_told_with_its_line(swept: Callable[..., Sweep], more: str, said: str) -> None:
    with pytest.raises(SweepError, match=r"tiny\.toml:\d+: ") as caught:
        swept(8, more)
    assert said in str(caught.value)


def test_ranges_are_of_methods_of_the_sweep_and_ascend(sweep_file: Path) -> None:
    text = sweep_file.read_text()
    for range_, said in (
        ("vanila = [1e-3, 1e-2]", "did you mean 'vanilla'"),
        ("vanilla = [1e-2, 1e-3]", "a lower and a higher"),
        ("vanilla = [0, 1e-3]", "greater than 0"),
        ("", "search.learning_rates"),
    ):
        sweep_file.write_text(f"{text}\n[search.learning_rates]\n{range_}\n")
        with pytest.raises(SweepError) as caught:
            load_sweep(sweep_file)
        assert said in str(caught.value)


def test_a_sweep_for_a_search_alone_needs_no_list_of_learning_rates(sweep_file: Path) -> None:
    lines = [line for line in sweep_file.read_text().splitlines() if "0.003" not in line and line != "[learning_rates]"]
    sweep_file.write_text("\n".join(lines))
    with pytest.raises(SweepError, match="learning_rates is required, got nothing"):
        load_sweep(sweep_file)
    sweep_file.write_text("\n".join(lines) + SEARCH.format(samples=4, more=""))
    assert load_sweep(sweep_file).rates_of("fruit") == {"vanilla": (), "layer_causal": ()}


ASHA = """
[resources]
max_actors = 1

[[method]]
name = "wide"
base = "vanilla"
weights = "all_linear"

[search]
samples = 6
scheduler = "asha"
{more}
[search.learning_rates]
wide = [1e-4, {highest}]
"""


def stopped_early(text: str, more: str = 'sampler = "grid"', highest: float = 0.1) -> str:
    """Return the tiny sweep with one seed and one method, whose learning rates a scheduler may stop after a step of three."""
    changes = {"seeds = [1, 2]": 'seeds = [1]\nmethods = ["wide"]', "steps = [2, 4]": "steps = [1, 2, 4]", "layer_causal = [0.003, 0.05]\n": ""}
    changes["vanilla = [0.003, 0.05]"] = "wide = [0.003]"
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    return text + ASHA.format(more=more, highest=highest)


@pytest.fixture
def stopped(sweep_file: Path) -> Callable[..., Sweep]:
    text = sweep_file.read_text()

    def write(more: str = 'sampler = "grid"') -> Sweep:
        sweep_file.write_text(stopped_early(text, more))
        return load_sweep(sweep_file)

    return write


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("", '"tpe" learns nothing: set "random" or "grid"'),
        ('sampler = "grid"\nconstraints = ["balanced_accuracy >= 0.5"]', "stops by the objective alone: leave constraints out"),
        ('sampler = "grid"\nobjective = "sim_aou"', "must be known of a fold at each step: accuracy, balanced_accuracy"),
    ],
)
def test_what_asha_cannot_do_is_told(stopped: Callable[..., Sweep], more: str, said: str) -> None:
    with pytest.raises(SweepError, match=r"tiny\.toml:\d+: ") as caught:
        stopped(more)
    assert said in str(caught.value)


def test_with_asha_each_learning_rate_is_a_block_and_what_was_stopped_is_not_asked_for_again(stopped: Callable[..., Sweep]) -> None:
    def loss(cell: Cell, seed: int, num_queries: int) -> float:
        return 0.5 + math.log10(cell.learning_rate / 2e-3) ** 2 / cell.step

    sweep, made = stopped(), Made(loss)
    made.fails = lambda cell: cell.learning_rate is not None and not 1e-3 < cell.learning_rate < 1e-2 and cell.step > 1  # stopped after the first step
    (study,) = made.search(sweep)
    (plan,) = made.plans
    assert [len(block.learning_rates("wide")) for block in plan.blocks] == [1] * 6
    assert [block.judged for block in plan.blocks] == [Judged("nll_label", 1.0, 2, (1, 2, 4))] * 6  # nothing is known yet
    assert sum(cell.kind != "finetuned" for block in plan.blocks for cell in block.cells) == 2
    kept = [score.learning_rate for score in study.ranking(0) if score.step == 4]
    assert len(kept) == 2 and [score.learning_rate for score in study.ranking(0)][:2] == kept  # the stopped ones stand behind, whatever they scored
    again = Made(loss)
    again.cells = dict(made.cells)
    again.stopped = {block.name for block in plan.blocks if block.learning_rates("wide")[0] not in kept}
    (same,) = again.search(sweep)
    assert not [plan for plan in again.plans if plan.blocks] and same.ranking(0) == study.ranking(0)
    again.cells = {key: held for key, held in made.cells.items() if held[0].learning_rate != kept[0] or held[0].step == 1}
    again.search(sweep)  # one that was killed, not stopped, goes on
    (block,) = again.plans[-1].blocks
    known = sorted(
        (cell.learning_rate, cell.step, loss(cell, 1, 8)) for cell, _, _ in again.cells.values() if cell.kind == "finetuned" and cell not in block.cells
    )
    assert block.judged is not None and block.judged.known == tuple(known) and len(known) == 6 + 2, "what it is compared with"
    assert {cell.learning_rate for plan in again.plans for block in plan.blocks for cell in block.cells} == {kept[0]}
    forgotten = Made(loss)  # and one whose cells were set aside, stopped or not; the baselines ride with whatever runs
    forgotten.cells = {key: held for key, held in made.cells.items() if held[0].kind == "finetuned" and held[0].learning_rate != 1e-4}
    forgotten.stopped = again.stopped
    forgotten.search(sweep)
    (plan,) = forgotten.plans
    assert [sorted({str(cell.learning_rate) for cell in block.cells}) for block in plan.blocks] == [["0.0001", "None"]]
    bare = Made(loss)
    bare.cells = {key: held for key, held in made.cells.items() if held[0].kind == "finetuned"}
    bare.stopped = again.stopped
    bare.search(sweep)
    (plan,) = bare.plans
    assert [(block.judged, {cell.kind for cell in block.cells}) for block in plan.blocks] == [(None, {"zero_shot", "icl"})]


def test_asha_compares_trials_of_one_draw_only(stopped: Callable[..., Sweep], sweep_file: Path) -> None:
    stopped()
    sweep_file.write_text(sweep_file.read_text().replace("seeds = [1]", "seeds = [1, 2]"))
    with pytest.raises(SweepError, match="one seed and one order are required, fruit has 2"):
        studies_of(load_sweep(sweep_file))


def test_a_sampler_whose_package_is_missing_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tpe, random = (Search(learning_rates={"vanilla": (1e-4, 1e-1)}, sampler=name) for name in ("tpe", "random"))
    check_sampler(tpe)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_sampler(random)
    with pytest.raises(SweepError, match=r"needs Optuna: pip install 'iclgd-dist\[search\]', or set sampler = \"random\""):
        check_sampler(tpe)
