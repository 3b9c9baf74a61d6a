"""The figures against plain loops, algebra, and tables made by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from iclgd_dist import metrics
from iclgd_dist.metrics import AttentionChange, Capture, ScoreChange

L, Q, H, T, D, C = 3, 5, 2, 6, 7, 3
NONE_L, NONE_LH = torch.zeros(L, dtype=torch.float64), torch.zeros(L, H, dtype=torch.float64)
NAN = math.nan


def close(got: Tensor | float, expected: Tensor | list | float) -> bool:
    """Float64 sums of a few dozen terms in another order differ by some 1e-16 relative; NaN equals NaN."""
    return torch.allclose(torch.as_tensor(got, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13, equal_nan=True)


def capture(seed: int, *, lengths: tuple[int, ...] = (6, 3, 5, 1, 4)) -> Capture:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(L, len(lengths), H, T, generator=draw)
    for query, length in enumerate(lengths):
        scores[:, query, :, length:] = 0
    attention = torch.randn(L, len(lengths), D, generator=draw)
    return Capture(attention, scores, torch.randn(len(lengths), C, generator=draw).double())


def change(zero_shot: Capture, state: Capture) -> AttentionChange:
    return metrics.attention_change(metrics.vectors(zero_shot.attention_LQD), state.attention_LQD)


def score_change(zero_shot: Capture, state: Capture) -> ScoreChange:
    return metrics.score_change(zero_shot.scores_LQHT, state.scores_LQHT)


ZS, ICL, FT = capture(1), capture(2), capture(3)


def slow_norm(x: list[float]) -> float:
    return math.sqrt(sum(v * v for v in x))


def slow_cosine(a: list[float], b: list[float]) -> float:
    length = slow_norm(a) * slow_norm(b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / length if length else NAN


def slow_minus(a: list[float], b: list[float]) -> list[float]:
    return [x - y for x, y in zip(a, b, strict=True)]


def slow_unit(a: list[float]) -> list[float]:
    return [x / slow_norm(a) for x in a]


def slow_attention(*, unit: bool) -> Tensor:
    found = torch.zeros(L, Q, dtype=torch.float64)
    for layer in range(L):
        for query in range(Q):
            zs, icl, ft = (state.attention_LQD[layer, query].tolist() for state in (ZS, ICL, FT))
            if unit:
                zs, icl, ft = slow_unit(zs), slow_unit(icl), slow_unit(ft)
            found[layer, query] = slow_cosine(slow_minus(icl, zs), slow_minus(ft, zs))
    return found


def slow_scores(kind: str, lengths: tuple[int, ...] = (6, 3, 5, 1, 4)) -> Tensor:
    """Each query is cut to its own length: the padding must not matter."""
    found = torch.zeros(L, Q, dtype=torch.float64)
    for layer in range(L):
        for query, length in enumerate(lengths):
            for head in range(H):
                zs, icl, ft = (state.scores_LQHT[layer, query, head, :length].tolist() for state in (ZS, ICL, FT))
                pair = {"sim_am": (icl, ft), "sim_am_zs": (icl, zs), "sim_am_delta": (slow_minus(icl, zs), slow_minus(ft, zs))}[kind]
                found[layer, query] += slow_cosine(*pair) / H
    return found


def test_sim_aou_equals_a_plain_loop() -> None:
    assert close(metrics.sim_aou(change(ZS, ICL), change(ZS, FT), floor_L=NONE_L), slow_attention(unit=False))


def test_sim_aou_norm_equals_a_plain_loop() -> None:
    assert close(metrics.sim_aou_norm(change(ZS, ICL), change(ZS, FT), floor_L=NONE_L), slow_attention(unit=True))


def test_similarities_of_attention_scores_equal_plain_loops_over_ragged_queries() -> None:
    icl, ft = score_change(ZS, ICL), score_change(ZS, FT)
    assert close(metrics.sim_am(icl, ft, floor_LH=NONE_LH), slow_scores("sim_am"))
    assert close(metrics.sim_am_zs(icl, ZS.scores_LQHT), slow_scores("sim_am_zs"))
    assert close(metrics.sim_am_delta(icl, ft, floor_LH=NONE_LH), slow_scores("sim_am_delta"))


def test_one_layer_alone_gives_what_all_layers_at_once_give() -> None:
    whole = metrics.sim_am_delta(score_change(ZS, ICL), score_change(ZS, FT), floor_LH=NONE_LH)
    icl, ft = (metrics.score_change(ZS.scores_LQHT[1], state.scores_LQHT[1]) for state in (ICL, FT))
    assert close(metrics.sim_am_delta(icl, ft, floor_LH=NONE_LH[1]), whole[1])


def test_a_change_compared_with_itself_is_1_and_with_its_opposite_minus_1() -> None:
    opposite = Capture(2 * ZS.attention_LQD - ICL.attention_LQD, 2 * ZS.scores_LQHT - ICL.scores_LQHT, ICL.label_scores_QC)
    assert close(metrics.sim_aou(change(ZS, ICL), change(ZS, ICL), floor_L=NONE_L), torch.ones(L, Q))
    assert torch.allclose(metrics.sim_aou(change(ZS, ICL), change(ZS, opposite), floor_L=NONE_L), -torch.ones(L, Q).double(), atol=1e-6)  # 2 z - i is float32
    assert close(metrics.sim_am_delta(score_change(ZS, ICL), score_change(ZS, ICL), floor_LH=NONE_LH), torch.ones(L, Q))


def test_sim_aou_does_not_depend_on_the_size_of_the_update_but_sim_aou_norm_does() -> None:
    zs, update = ZS.attention_LQD.double(), FT.attention_LQD.double() - ZS.attention_LQD.double()
    small, large = (metrics.attention_change(metrics.vectors(zs), zs + size * update) for size in (0.1, 10))
    icl = change(ZS, ICL)
    assert torch.allclose(metrics.sim_aou(icl, small, floor_L=NONE_L), metrics.sim_aou(icl, large, floor_L=NONE_L), atol=1e-12)
    assert not torch.allclose(metrics.sim_aou_norm(icl, small, floor_L=NONE_L), metrics.sim_aou_norm(icl, large, floor_L=NONE_L), atol=1e-3)


def test_a_change_at_ten_times_the_noise_floor_is_undefined_and_just_above_it_defined() -> None:
    zs, large, at_floor = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[9.0, -5.0]]]), torch.tensor([[[4.0, 5.0]]])  # changes of norm 10 and exactly 5
    origin = metrics.vectors(zs)
    floor = torch.tensor([0.5], dtype=torch.float64)
    below = torch.nextafter(floor, torch.zeros(1, dtype=torch.float64))
    for similarity in (metrics.sim_aou, metrics.sim_aou_norm):
        for icl, ft in ((large, at_floor), (at_floor, large)):
            pair = metrics.attention_change(origin, icl), metrics.attention_change(origin, ft)
            assert similarity(*pair, floor_L=floor).isnan().all()
            assert similarity(*pair, floor_L=below).isfinite().all()


def test_a_head_at_ten_times_the_noise_floor_is_left_out_of_the_mean_over_heads() -> None:
    zs = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])  # one layer, one query, two heads, two positions
    icl, ft = zs + torch.tensor([[[[3.0, 4.0], [6.0, 8.0]]]]), zs + torch.tensor([[[[3.0, 4.0], [8.0, 6.0]]]])
    both = metrics.score_change(zs, icl), metrics.score_change(zs, ft)
    floor = torch.tensor([[0.5, 0.5]], dtype=torch.float64)  # the first head's changes have norm 5
    assert close(metrics.sim_am_delta(*both, floor_LH=floor), [[0.96]])
    assert close(metrics.sim_am_delta(*both, floor_LH=floor * 0.99), [[0.98]])
    second_head = slow_cosine([6.0, 9.0], [8.0, 7.0])
    assert close(metrics.sim_am(*both, floor_LH=floor), [[second_head]])
    assert close(metrics.sim_am(*both, floor_LH=floor * 0.99), [[(1 + second_head) / 2]])
    assert metrics.sim_am_delta(*both, floor_LH=floor * 3).isnan().all()
    assert metrics.sim_am(*both, floor_LH=floor * 3).isnan().all()


def test_a_head_needs_both_changes_above_the_noise_floor_in_sim_am_delta() -> None:
    zs, small, large = torch.zeros(1, 1, 1, 2), torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[6.0, 8.0]]]])
    floor = torch.tensor([[0.5]], dtype=torch.float64)
    for pair in ((small, large), (large, small)):
        changes = [metrics.score_change(zs, state) for state in pair]
        assert metrics.sim_am_delta(*changes, floor_LH=floor).isnan().all()
        assert close(metrics.sim_am_delta(*changes, floor_LH=floor * 0.99), [[1.0]])


def test_sim_am_asks_only_finetuning_to_have_moved_and_sim_am_zs_asks_nobody() -> None:
    still, moved = score_change(ZS, ZS), score_change(ZS, FT)
    assert metrics.sim_am(moved, still, floor_LH=NONE_LH).isnan().all()
    assert metrics.sim_am(still, moved, floor_LH=NONE_LH).isfinite().all()
    assert close(metrics.sim_am_zs(still, ZS.scores_LQHT), torch.ones(L, Q))
    assert metrics.sim_am_delta(still, moved, floor_LH=NONE_LH).isnan().all()


def test_nothing_changed_leaves_every_similarity_undefined() -> None:
    icl, still = change(ZS, ICL), change(ZS, ZS)
    for similarity in (metrics.sim_aou, metrics.sim_aou_norm):
        assert similarity(icl, still, floor_L=NONE_L).isnan().all()
        assert similarity(still, icl, floor_L=NONE_L).isnan().all()
    gaussian = metrics.gaussian_state(metrics.vectors(ZS.attention_LQD), still.raw.norm, torch.Generator().manual_seed(1))
    assert metrics.sim_aou(icl, metrics.attention_change(metrics.vectors(ZS.attention_LQD), gaussian), floor_L=NONE_L).isnan().all()


def test_the_gaussian_state_lies_as_far_from_zero_shot_as_the_update() -> None:
    zs, norm = metrics.vectors(ZS.attention_LQD), change(ZS, FT).raw.norm
    state = metrics.gaussian_state(zs, norm, torch.Generator().manual_seed(5))
    assert torch.allclose(metrics.attention_change(zs, state).raw.norm, norm, rtol=1e-12)
    assert torch.equal(state, metrics.gaussian_state(zs, norm, torch.Generator().manual_seed(5)))
    assert not torch.equal(state, metrics.gaussian_state(zs, norm, torch.Generator().manual_seed(6)))


def test_the_uniform_update_is_drawn_from_0_to_1_whatever_finetuning_did() -> None:
    zero_shot = torch.full((1, 4, 1000), 3.0)
    change = metrics.uniform_update(metrics.vectors(zero_shot), torch.Generator().manual_seed(5))
    update = change.raw.values
    assert change.unit is change.raw  # the change of the normalised outputs is replaced too, not made from a random state
    assert update.min() >= 0
    assert update.max() < 1
    assert float(update.mean()) == pytest.approx(1 / 2, abs=0.02)  # 4,000 numbers: se .005, and .001 for the variance
    assert float(update.var()) == pytest.approx(1 / 12, abs=0.005)
    again = metrics.uniform_update(metrics.vectors(zero_shot), torch.Generator().manual_seed(5))
    assert torch.equal(update, again.raw.values)


def test_pooled_figures_equal_plain_loops() -> None:
    icl, ft = change(ZS, ICL), change(ZS, FT)
    inner = metrics.inner(icl.raw, ft.raw)
    for layer in range(L):
        dot = icl_square = ft_square = miss = 0.0
        icl_norms: list[float] = []
        ft_norms: list[float] = []
        zs_norms: list[float] = []
        for query in range(Q):
            zs = ZS.attention_LQD[layer, query].tolist()
            u_icl, u_ft = (slow_minus(state.attention_LQD[layer, query].tolist(), zs) for state in (ICL, FT))
            dot += sum(x * y for x, y in zip(u_icl, u_ft, strict=True))
            icl_square, ft_square = icl_square + slow_norm(u_icl) ** 2, ft_square + slow_norm(u_ft) ** 2
            miss += slow_norm(slow_minus(u_ft, u_icl)) ** 2
            for norms, vector in ((icl_norms, u_icl), (ft_norms, u_ft), (zs_norms, zs)):
                norms.append(slow_norm(vector))
        assert close(metrics.sim_aou_pooled(inner, icl.raw.norm, ft.raw.norm, floor_L=NONE_L)[layer], dot / math.sqrt(icl_square * ft_square))
        assert close(metrics.recovered_aou(inner, icl.raw.norm, ft.raw.norm)[layer], 1 - miss / icl_square)
        assert close(metrics.update_ratio(ft.raw.norm, icl.raw.norm)[layer], sum(ft_norms) / sum(icl_norms))
        assert close(metrics.relative_update(ft.raw.norm, metrics.vectors(ZS.attention_LQD).norm)[layer], sum(ft_norms) / sum(zs_norms))


@pytest.mark.parametrize(("size", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.5, 0.75), (2.0, 0.0), (3.0, -3.0), (-1.0, -3.0)])
def test_recovered_aou_is_1_at_the_change_of_icl_0_without_update_and_negative_when_overshooting(size: float, expected: float) -> None:
    zs, update = ZS.attention_LQD.double(), ICL.attention_LQD.double() - ZS.attention_LQD.double()
    icl, ft = (metrics.attention_change(metrics.vectors(zs), zs + factor * update) for factor in (1.0, size))
    assert close(metrics.recovered_aou(metrics.inner(icl.raw, ft.raw), icl.raw.norm, ft.raw.norm), torch.full((L,), expected))


def test_pooled_figures_without_a_change_are_0_or_undefined() -> None:
    still, ft, zs_norm = change(ZS, ZS).raw, change(ZS, FT).raw, metrics.vectors(ZS.attention_LQD).norm
    zero = metrics.inner(still, ft)
    assert metrics.sim_aou_pooled(zero, ft.norm, still.norm, floor_L=NONE_L).isnan().all()
    assert close(metrics.recovered_aou(zero, ft.norm, still.norm), torch.zeros(L))
    assert close(metrics.update_ratio(still.norm, ft.norm), torch.zeros(L))
    assert close(metrics.relative_update(still.norm, zs_norm), torch.zeros(L))
    assert metrics.recovered_aou(zero, still.norm, ft.norm).isnan().all()
    assert metrics.update_ratio(ft.norm, still.norm).isnan().all()


def test_sim_aou_pooled_of_opposite_changes_is_minus_1() -> None:
    norm = change(ZS, ICL).raw.norm
    assert close(metrics.sim_aou_pooled(-2 * norm.square(), norm, 2 * norm, floor_L=NONE_L), -torch.ones(L))


def test_sim_aou_pooled_is_undefined_when_the_root_mean_square_is_at_ten_times_the_floor() -> None:
    inner, small, large = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[3.0, 4.0]]).double(), torch.tensor([[30.0, 40.0]]).double()
    at = torch.tensor([math.sqrt(12.5) / 10], dtype=torch.float64)
    for pair in ((small, large), (large, small)):
        assert metrics.sim_aou_pooled(inner, *pair, floor_L=at * (1 + 1e-12)).isnan().all()
        assert metrics.sim_aou_pooled(inner, *pair, floor_L=at * (1 - 1e-12)).isfinite().all()


def test_the_geometric_mean_is_0_with_a_zero_and_undefined_with_an_undefined_value() -> None:
    assert metrics.geometric_mean(torch.tensor([1.0, 4.0, 16.0]).double()) == pytest.approx(4)
    assert metrics.geometric_mean(torch.tensor([1.0, 0.0]).double()) == 0
    assert math.isnan(metrics.geometric_mean(torch.tensor([0.0, NAN]).double()))


def test_the_noise_floor_is_the_largest_difference_of_the_first_32_queries() -> None:
    lengths = (4,) * 40
    a, b = capture(1, lengths=lengths), capture(1, lengths=lengths)
    b.attention_LQD[1, 31] += torch.tensor([3.0, 4.0, 0, 0, 0, 0, 0])
    b.attention_LQD[1, 3] += 0.5
    b.attention_LQD[2, 32] += 9  # the 33rd query does not count
    b.scores_LQHT[0, 7, 1, 2:4] += torch.tensor([5.0, 12.0])
    floor = metrics.noise_floor(a, b)
    assert torch.allclose(floor.attention_L, torch.tensor([0, 5.0, 0]).double(), atol=1e-6)  # captures are float32
    assert torch.allclose(floor.scores_LH, torch.tensor([[0, 13.0], [0, 0], [0, 0]]).double(), atol=1e-5)
    assert floor.attention_L.dtype == floor.scores_LH.dtype == torch.float64


def test_the_noise_floor_is_at_least_what_rounding_to_the_compute_dtype_changes() -> None:
    """Independent of the formula: round random captures to bfloat16 and see by how much they move."""
    wide = Capture(torch.randn(2, 32, 512), torch.randn(2, 32, 3, 512), torch.zeros(32, 2))
    low = Capture(wide.attention_LQD.bfloat16().float(), wide.scores_LQHT.bfloat16().float(), wide.label_scores_QC)
    eps = torch.finfo(torch.bfloat16).eps
    assert metrics.noise_floor(low, low).attention_L.max() == 0
    moved, floor = metrics.noise_floor(wide, low), metrics.noise_floor(low, low, eps=eps)
    for seen, least in ((moved.attention_L, floor.attention_L), (moved.scores_LH, floor.scores_LH)):
        assert torch.all((seen < least) & (least < 2 * seen))
    above = metrics.noise_floor(low, Capture(low.attention_LQD + 1, low.scores_LQHT, low.label_scores_QC), eps=eps)
    assert torch.allclose(above.attention_L, torch.full((2,), 512.0).double().sqrt())


def test_the_noise_floor_takes_captures_padded_to_different_lengths() -> None:
    a = capture(1, lengths=(4, 3))
    cut = Capture(a.attention_LQD, a.scores_LQHT[..., :4], a.label_scores_QC)
    assert metrics.noise_floor(a, cut).scores_LH.max() == 0
    with pytest.raises(AssertionError, match="same queries"):
        metrics.noise_floor(a, capture(1, lengths=(4,)))


@pytest.mark.parametrize("part", ["attention_LQD", "scores_LQHT", "label_scores_QC"])
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_capture_with_one_bad_number_is_not_finite(part: str, value: float) -> None:
    bad = capture(4)
    assert bad.is_finite()
    getattr(bad, part).view(-1)[3] = value
    assert not bad.is_finite()


def test_label_losses_equal_plain_arithmetic() -> None:
    scores = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -0.5, -4.0]]).double()
    found = metrics.answers(scores, torch.tensor([2, 0]))
    expected = [-math.log(math.exp(-3) / (math.exp(-1) + math.exp(-2) + math.exp(-3))), -math.log(math.exp(-0.5) / (2 * math.exp(-0.5) + math.exp(-4)))]
    assert close(found.nll_label_Q, expected)
    assert close(found.nll_raw_Q, [3.0, 0.5])


def test_a_tie_goes_to_the_lowest_index_and_is_told() -> None:
    best, is_tie = metrics.predictions(torch.tensor([[0.0, -1, -1], [-2, -1, -1], [-3, -3, -3], [-1, -2, 0]]).double())
    assert best.tolist() == [0, 1, 0, 2]
    assert is_tie.tolist() == [False, True, True, False]


def test_predictions_refuse_scores_that_are_not_finite() -> None:
    with pytest.raises(AssertionError, match="finite"):
        metrics.predictions(torch.tensor([[NAN, 0.0]]).double())


def test_balanced_accuracy_leaves_out_a_label_that_never_occurs() -> None:
    gold, predicted = torch.tensor([0, 0, 0, 0, 2]), torch.tensor([0, 0, 0, 1, 1])
    assert metrics.accuracy(predicted, gold) == pytest.approx(3 / 5)
    assert metrics.balanced_accuracy(predicted, gold) == pytest.approx((3 / 4 + 0) / 2)  # label 1 is predicted but never gold
    assert metrics.majority_baseline(gold) == pytest.approx(4 / 5)
    assert metrics.majority_share_predicted(predicted) == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("num_predicted", "num_gold", "expected"),
    [(95, 50, True), (94, 50, False), (100, 50, True), (100, 83, True), (96, 80, False), (97, 80, True), (100, 84, False), (95, 79, True), (95, 80, False)],
)
def test_collapsed_needs_95_percent_and_more_than_1_2_times_the_gold_share(num_predicted: int, num_gold: int, expected: bool) -> None:
    predicted = torch.tensor([1] * num_predicted + [0] * (100 - num_predicted))
    gold = torch.tensor([1] * num_gold + [2] * (100 - num_gold))
    assert metrics.collapsed(predicted, gold) is expected


def test_rec2ftp_equals_a_table_made_by_hand() -> None:
    right = torch.tensor(
        [[0, 1, 1], [0, 1, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1], [1, 0, 1]],  # zero-shot, in-context, finetuned
        dtype=torch.bool,
    )
    found = metrics.rec2ftp(right[:, 0], right[:, 1], right[:, 2])
    assert found == {
        "rec2ftp": pytest.approx(100 * 2 / 3),
        "rec2ftp_base": pytest.approx(100 * 4 / 6),
        "num_zs_wrong": 6,
        "num_zs_wrong_icl_right": 4,
        "num_zs_wrong_ft_right": 3,
        "num_zs_wrong_ft_right_icl_right": 2,
    }


def test_rec2ftp_is_undefined_when_finetuning_corrects_nothing() -> None:
    found = metrics.rec2ftp(torch.tensor([False, True]), torch.tensor([True, True]), torch.tensor([False, True]))
    assert math.isnan(found["rec2ftp"]) and found["rec2ftp_base"] == 100


def test_jaccard_counts_the_same_change_only() -> None:
    zero_shot, icl, ft = torch.tensor([0, 0, 0, 0, 0]), torch.tensor([1, 1, 0, 2, 0]), torch.tensor([1, 2, 1, 2, 0])
    assert metrics.jaccard_changed(zero_shot, icl, ft) == pytest.approx(2 / (3 + 4 - 2))
    assert math.isnan(metrics.jaccard_changed(zero_shot, zero_shot, zero_shot))


def test_cohen_kappa_equals_a_table_made_by_hand() -> None:
    # 20 both 0, 5 (0, 1), 10 (1, 0), 15 both 1: observed .7, chance .5 x .6 + .5 x .4 = .5
    a, b = torch.tensor([0] * 25 + [1] * 25), torch.tensor([0] * 20 + [1] * 5 + [0] * 10 + [1] * 15)
    assert metrics.agreement(a, b) == pytest.approx(0.7)
    assert metrics.cohen_kappa(a, b) == pytest.approx(0.4)
    assert metrics.cohen_kappa(a, a) == pytest.approx(1)


def test_cohen_kappa_is_undefined_when_either_side_is_constant() -> None:
    varied, constant = torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])
    for a, b in ((varied, constant), (constant, varied), (constant, constant)):
        assert math.isnan(metrics.cohen_kappa(a, b))


def test_kl_label_equals_plain_arithmetic_and_is_0_for_equal_scores_up_to_a_constant() -> None:
    p_scores, q_scores = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log(), torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    assert close(metrics.kl_label(p_scores, q_scores), [0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)])
    assert close(metrics.kl_label(p_scores, p_scores - 7), [0.0])


def test_figures_of_no_queries_are_undefined() -> None:
    nothing = torch.tensor([], dtype=torch.int64)
    for value in (
        metrics.accuracy(nothing, nothing),
        metrics.balanced_accuracy(nothing, nothing),
        metrics.majority_baseline(nothing),
        metrics.majority_share_predicted(nothing),
        metrics.agreement(nothing, nothing),
        metrics.cohen_kappa(nothing, nothing),
    ):
        assert math.isnan(value)
