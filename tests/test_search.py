"""The search for learning rates: what is asked, judged, promoted and resumed; on made-up scores, without training."""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iclgd_dist.config import Sweep, SweepError, load_sweep
from iclgd_dist.plan import make_plan
from iclgd_dist.search import Score, check_sampler, rungs_of, studies_of
from iclgd_dist.search_spec import Search
from tests.searches import Made, bowl

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
    studies = made.search(swept(10, f'sampler = "{sampler}"'))
    assert sampler == "grid" or list(studies[0].scores[0])[:4] != list(studies[1].scores[0])[:4], "each has numbers of its own"
    for study in studies:
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


def test_a_sampler_whose_package_is_missing_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tpe, random = (Search(learning_rates={"vanilla": (1e-4, 1e-1)}, sampler=name) for name in ("tpe", "random"))
    check_sampler(tpe)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_sampler(random)
    with pytest.raises(SweepError, match=r"needs Optuna: pip install 'iclgd-dist\[search\]', or set sampler = \"random\""):
        check_sampler(tpe)
