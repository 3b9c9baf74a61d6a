"""The benchmarks of the engine on a tiny model: they run, their results are compared, and what they call useful is what plain products count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from iclgd_dist import updates
from iclgd_dist.updates import TrainingSequence
from tests.benchmarks import flops, grid, lanes, loop, papers, reference, roofline, store
from tests.benchmarks.agreement import Stored
from tests.benchmarks.flops import Sizes
from tests.tiny import METHODS, save_tiny, tiny

TINY = ["--tiny", "--threads", "1"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `reference` start no processes: each would take seconds to import torch."""

    def timed(module: str, *arguments: Path) -> float:
        {"tests.benchmarks.grid": lambda *given: grid.main(given), "tests.benchmarks.papers": papers.main}[module](*map(str, arguments))
        return 1.0

    monkeypatch.setattr(reference, "_timed", timed)


def is_line_of_json(figures: dict) -> bool:
    return "\n" not in json.dumps(figures) and {"value", "goal", "holds"} <= figures.keys()


def test_reference_extrapolates_a_sample_of_cells_whose_results_are_ours(in_this_process: None) -> None:
    figures = reference.run([*TINY, "--sample", "1", "--queries-sample", "3"])
    assert is_line_of_json(figures)
    assert [(cell["method"], cell["step"]) for cell in figures["sampled"]] == [("vanilla", 4), ("layer_causal", 4)]
    assert figures["largest_errors"].keys() == {"label_scores", "delta_norms", "sim_aou", "sim_am_delta"}
    assert figures["goal"] == 0.9 * figures["flops_ratio"] == 0.9 * figures["papers"]["flops"] / figures["ours"]["flops"]
    assert figures["papers"]["seconds"] > figures["ours"]["seconds"] == 1.0


def test_what_cells_repeat_is_a_mean_and_training_is_linear_in_the_step() -> None:
    with grid.work(grid.parser(None).parse_args(TINY)) as work:
        same = {"start": 1.0, "zero_shot": 2.0}
        seconds = {("vanilla", 0.1, 4): same | {"training": 8.0}, ("layer_causal", 0.1, 4): same | {"training": 80.0}}
        # 2 methods x 2 rates x 2 steps, each 1 s and 2 s x 10; training to step 2 and to step 4 at 2 rates each.
        assert reference._extrapolated(work, seconds, 10.0) == pytest.approx(8 * 21 + 2 * (4 + 8) + 2 * (40 + 80))


def test_loop_computes_the_cells_that_we_compute() -> None:
    figures = loop.run([*TINY, "--rounds", "1"])
    assert is_line_of_json(figures)
    assert figures["num_cells"] == 2 + 2 * 2 * 2
    assert figures["largest_errors"].keys() == {"label_scores", "delta_norms", "sim_aou", "sim_am_delta", "sim_aou_prefix", "sim_am_delta_prefix"}
    assert figures["training_alone"]["seconds_per_learning_rate"].keys() == {"layer_causal", "vanilla"}


def test_roofline_times_every_part_of_a_block() -> None:
    figures = roofline.run(TINY)
    assert is_line_of_json(figures)
    assert figures["shares"].keys() == {"block", "vanilla", "layer_causal"}
    assert figures["value"] == min(figures["shares"].values()) > 0
    useful = {name for name, part in figures["parts"].items() if part["flops"] > 0}
    assert useful == {
        "baselines",
        "layer_causal, training and captures",
        "layer_causal, comparing and commits",
        "vanilla, training",
        "vanilla, captures",
        "vanilla, comparing and commits",
    }
    assert len(figures["gflops_by_product"]) == 8  # seven matrices of a layer and the head


def test_lanes_times_every_number_of_lanes() -> None:
    figures = lanes.run([*TINY, "--rounds", "1", "--lanes", "1,2,8"])
    assert is_line_of_json(figures)
    assert figures["seconds_per_learning_rate"]["vanilla"].keys() == {1, 2, 8}
    assert figures["value"] == min(figures["times_faster_at_8"][method] / goal for method, goal in (("layer_causal", 1.8), ("vanilla", 2.0)))


def test_store_reads_and_plans_against_what_it_made_up() -> None:
    figures = store.run(["--cells", "300", "--loose", "3", "--layers", "2", "--examples", "8", "--repeats", "1"])
    assert is_line_of_json(figures)
    assert figures["holds"], figures["value"]  # far below the goals at this size; torch is imported at none
    assert (figures["num_cells"], figures["read_with_loose"]["cells"]) == (340, 343)
    # Of each cell: itself, two folds, six layers and folds, eight examples, six rows of a metric. Pairs and controls: of some.
    assert figures["read_with_loose"]["rows"] == (1 + 2 + 6 + 8 + 6) * 343 + 3 * 6 * (170 + 2) + 5 * 6 * (34 + 1)


def test_store_says_when_the_disk_is_too_small() -> None:
    with pytest.raises(SystemExit, match="GiB of free disk are needed"):
        store.run(["--cells", str(10**12)])


@pytest.mark.parametrize("benchmark", [reference, loop])
def test_a_learning_rate_that_is_off_by_a_hundredth_is_found(benchmark: Callable, in_this_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    direction = updates.GradientDescent.direction
    monkeypatch.setattr(updates.GradientDescent, "direction", lambda *given: 1.01 * direction(*given))
    with pytest.raises(AssertionError, match="differs by"):
        benchmark.run(TINY)


def test_every_figure_that_is_off_is_found() -> None:
    with grid.work(grid.parser(None).parse_args(TINY)) as work:
        store = grid.new_store(work.folder)
        grid.main([str(work.sweep), str(store.root)])
        stored, key = Stored(store), ("vanilla", work.block.learning_rates("vanilla")[-1], 4)
        found = loop.Loop(work).run()[key]
    stored.errors(key, found)
    for name in ("label_scores", "delta_norms", "sim_aou", "sim_am_delta", "sim_aou_prefix", "sim_am_delta_prefix"):
        with pytest.raises(AssertionError, match=f"{name} differs by|another label is predicted"):
            stored.errors(key, found | {name: 1.01 * found[name] + 0.003 * (name != "delta_norms")})


def test_a_lane_that_learns_otherwise_among_others_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    direction = updates.GradientDescent.direction
    monkeypatch.setattr(updates.GradientDescent, "direction", lambda self, gradient, state: direction(self, gradient, state) * (1 + 0.01 * len(gradient)))
    with pytest.raises(AssertionError, match="of the first lane differs by"):
        lanes.run([*TINY, "--rounds", "1", "--lanes", "1,2"])


# --- Useful FLOPs against a counter of the products that torch runs


def _in_place(total: torch.Size, a: torch.Size, b: torch.Size, out_val: object = None, **options: object) -> int:
    """Return the FLOPs of addmm_, which the counter leaves out."""
    return addmm_flop(total, a, b)  # type: ignore[no-any-return]


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _in_place}) as counter:
        work()
    return counter.get_total_flops()


@pytest.fixture
def model(tmp_path: Path) -> torch.nn.Module:
    save_tiny(tmp_path / "model", 97)
    model, _ = papers.load(str(tmp_path / "model"))
    model.set_attn_implementation("eager")  # the counter does not see the products of the fused one
    return model


def unseen(sizes: Sizes, num_tokens: int, num_products: int) -> float:
    """Return the FLOPs of the half of attention that is masked: the counter takes it for computed."""
    return num_products * sizes.layers * (2 * sizes.query * num_tokens**2 - sizes.product(num_tokens))


def test_a_forward_pass_counts_what_torch_counts(model: torch.nn.Module) -> None:
    sizes, ids = Sizes.of(model.config.to_dict()), torch.arange(3, 14)[None]
    with torch.no_grad():
        got = counted(lambda: model(ids, use_cache=False))
    assert got == sizes.rising(11) + 11 * sizes.head + unseen(sizes, 11, 2)


@pytest.mark.parametrize("method", ["vanilla", "layer_causal"])
def test_a_step_of_plain_training_counts_what_torch_counts(model: torch.nn.Module, method: str) -> None:
    sizes, ids = Sizes.of(model.config.to_dict()), list(range(3, 14))
    with papers.learning(model):
        got = counted(lambda: papers.update(model, ids, 2, method, 0.1))
    num_products = 2 + 3 + (sizes.layers - 1) / sizes.layers * (method == "vanilla")
    more = 2 * 2 * sizes.head if method == "vanilla" else 0  # plainly, logits are made of the two tokens that are in no loss too
    assert got == pytest.approx(sizes.learning(11, 9, method, has_deltas=False) + unseen(sizes, 11, 1) * num_products + more, rel=1e-12)


@pytest.mark.parametrize("method", ["vanilla", "layer_causal"])
def test_no_more_is_called_useful_than_the_engine_runs(method: str) -> None:
    lm, ids = tiny("llama", torch.float32), torch.arange(3, 14)
    lm.model.set_attn_implementation("eager")
    sizes = Sizes.of(lm.model.config.to_dict())
    got = counted(lambda: list(METHODS[method].train(lm, [TrainingSequence(ids, 2)], [0.1, 0.2, 0.3], steps=[1])))
    useful = 3 * sizes.learning(11, 9, method, has_deltas=True)
    assert useful <= got <= 1.3 * useful  # the masked half of attention is much of a tiny model


def test_a_block_has_the_flops_of_its_prompts() -> None:
    with grid.work(grid.parser(None).parse_args(TINY)) as work:
        config, encoded = work.block.model.config, work.encoded
        sizes, lead = Sizes.of(config), len(encoded.prefix_ids)
        ours, theirs = flops.of_block(encoded, config, work.passes), flops.of_papers(encoded, config, work.passes)
        one = flops.of_block(encoded, config, {"vanilla": (1, [4])})
    assert ours["vanilla, captures"] == 4 * one["vanilla, captures"] == ours["layer_causal, captures"]
    assert ours["vanilla, training"] == 2 * one["vanilla, training"]  # one trajectory gives every step
    assert theirs["vanilla, training"] > 2 * 1.4 * sizes.layers * sum(map(len, encoded.training.sequences)) * sizes.layer
    assert theirs["in_context"] == 8 * sum(sizes.rising(len(encoded.context_ids) + len(ids)) for ids in encoded.queries)
    # What is read above the last layer's keys and values is one token of each query.
    short = sizes.rising(lead + len(encoded.queries[0])) - sizes.rising(lead + len(encoded.queries[0]), num_read=1)
    assert short == pytest.approx(
        (lead + len(encoded.queries[0]) - 1) * (sizes.layer - sizes.key_and_value)
        + 2 * (sizes.product(lead + len(encoded.queries[0])) - sizes.product(1, lead + len(encoded.queries[0]) - 1))
    )
