"""The package gives the numbers of the papers' own code, and the check that says so can say no."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from iclgd_dist import metrics, updates
from iclgd_dist.model import LanguageModel
from tests import oracle
from tests.oracle import TOLERANCE, Errors, check_part, main, read_inputs
from tests.tiny import METHODS

CASE = Path(__file__).parent / "data" / "oracle_a"
QUANTITIES = {"weights", "loss_sum", "loss_per_layer", "sample_size", "attn_q_training"}  # of training
QUANTITIES |= {"self_attn_out_hiddens", "self_attn_out_at_-2", "attn_map", "attn_map_ctx", "attn_q", "option_logprobs", "pred_label", "gold_label"}
QUANTITIES |= {"sim_aou", "sim_aou_norm", "sim_am", "sim_am_zs", "sim_am_delta", "rec2ftp", "rec2ftp_counts"}
RANKS = {"kendall_tokens", "kendall_examples", "topk_recall_tokens", "topk_recall_examples"}


def copy_of_case(directory: Path, *, part: str, rates: tuple[str, ...], **changed) -> Path:
    """Return a case with one part, some learning rates, and inputs changed."""
    case = directory / "case"
    shutil.copytree(CASE, case, ignore=lambda folder, names: {"f64", "f32"} - {part} if folder == str(CASE) else set())
    for file in (case / part).glob("*_lr*"):
        if file.stem.rpartition("_lr")[2] not in rates:
            file.unlink()
    inputs = json.loads((case / "inputs.json").read_text())
    (case / "inputs.json").write_text(json.dumps(inputs | changed))
    return case


def edit_metrics(file: Path, run: str, name: str, value) -> None:
    found = json.loads(file.read_text())
    found[run][name] = value
    file.write_text(json.dumps(found))


def wrong(errors: Errors, part: str = "f64") -> set[str]:
    return {name for name, error in errors.items() if error > TOLERANCE[part]}


@pytest.mark.parametrize("part", ["f64", "f32"])
def test_every_number_of_the_papers_own_code_is_reproduced(part: str) -> None:
    errors = check_part(CASE, part, read_inputs(CASE))
    assert set(errors) == QUANTITIES | RANKS
    assert wrong(errors, part) == set()
    if part == "f64":
        assert max(errors.values()) < 1e-12  # what float64 gives where two programs do the same; 1e-8 is for other machines


def test_a_smaller_case_in_another_order_is_checked_without_the_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = copy_of_case(tmp_path, part="f64", rates=("0.003",), ft_order_equals_icl_order=False)
    assert main([str(case)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["case"], found["holds"], found["f64"]["holds"], "f32" in found) == ("case", True, True, False)
    assert set(found["f64"]["errors"]) == QUANTITIES
    assert "kendall_tokens" in found["left_out"]


def test_a_number_that_differs_or_is_undefined_on_one_side_only_fails_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = copy_of_case(tmp_path, part="f32", rates=("0.05",))
    similar = json.loads((case / "f32" / "metrics.json").read_text())["vanilla_lr0.05"]["sim_aou"]
    edit_metrics(case / "f32" / "metrics.json", "vanilla_lr0.05", "sim_aou", [*similar[:2], similar[2] + 2e-4])
    edit_metrics(case / "f32" / "metrics.json", "layer_causal_lr0.05", "rec2ftp", None)
    assert main([str(tmp_path)]) == 1  # a directory that holds cases
    found = json.loads(capsys.readouterr().out)
    errors = found["f32"]["errors"]
    assert (found["holds"], found["f32"]["holds"]) == (False, False)
    assert errors["sim_aou"] == pytest.approx(2e-4, rel=0.1)
    assert errors["rec2ftp"] is None
    assert wrong(Errors({name: error for name, error in errors.items() if error is not None}), "f32") == {"sim_aou"}


def test_several_cases_are_checked_in_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "check_part", lambda case, part, inputs: Errors(weights=1e-9 if case.name == "a" else 1e-7))
    for name in ("a", "b"):
        copy_of_case(tmp_path, part="f64", rates=()).rename(tmp_path / name)
    assert main([str(tmp_path / "a")]) == 0
    capsys.readouterr()
    assert main([str(tmp_path)]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["holds"] is False
    assert [(case["case"], case["holds"]) for case in found["cases"]] == [("a", True), ("b", False)]


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("inputs.json", "is no case"),
        ("f32", "neither f64 nor f32"),
        ("model", "config.json is missing"),
        ("f32/eval_icl.npz", "eval_icl.npz"),
        ("*/train*", "lrNUMBER"),
    ],
)
def test_a_directory_that_is_no_whole_case_is_refused_in_one_line(removed: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = copy_of_case(tmp_path, part="f32", rates=("0.05",))
    for path in list(case.glob(removed)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main([str(case)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and named in shown.err and shown.err.count("\n") == 1


# --- Faults that the check has to find


@pytest.fixture
def case(tmp_path: Path) -> Path:
    return copy_of_case(tmp_path, part="f64", rates=("0.05",))


def errors_of(case: Path) -> Errors:
    return check_part(case, "f64", read_inputs(case))


def test_a_loss_divided_exactly_moves_the_weights_by_the_last_digits_of_a_float32(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle.ReferenceModel, "normed", LanguageModel.normed)
    assert 1e-11 < errors_of(case)["weights"] < TOLERANCE["f64"]


def test_a_loss_summed_instead_of_averaged_is_found(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = updates.lane_losses
    monkeypatch.setattr(updates, "lane_losses", lambda lm, hidden, targets: losses(lm, hidden, targets) * len(targets))
    assert wrong(errors_of(case)) >= {"weights", "loss_sum", "loss_per_layer", "option_logprobs", "sim_aou", "sim_am_delta"}


def test_biases_that_are_not_trained_are_found(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = updates.zeros
    monkeypatch.setattr(updates, "zeros", lambda *args, **options: {name: replace(delta, bias_NO=None) for name, delta in zeros(*args, **options).items()})
    assert wrong(errors_of(case)) >= {"weights", "self_attn_out_hiddens", "sim_aou"}


def test_layers_that_learn_from_the_loss_above_are_found(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "layer_causal", METHODS["vanilla"])
    assert wrong(errors_of(case)) >= {"weights", "loss_sum", "sim_aou", "sim_aou_norm", "sim_am", "sim_am_delta"}


def test_states_recorded_one_token_too_early_are_found(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Early(oracle.QueryPass):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            for batch in self.batches:
                batch.position_B -= 1

    monkeypatch.setattr(oracle, "QueryPass", Early)
    found = wrong(errors_of(case))
    assert found >= {"self_attn_out_hiddens", "attn_map", "attn_map_ctx", "sim_aou", "sim_am_zs", "kendall_tokens"}
    assert found.isdisjoint({"weights", "loss_sum", "option_logprobs", "pred_label"})


def test_outputs_normalised_after_subtracting_are_found(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "sim_aou_norm", metrics.sim_aou)  # a cosine normalises the difference anyway
    assert wrong(errors_of(case)) == {"sim_aou_norm"}


def test_items_one_token_off_are_found(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = oracle.Inputs.columns.fget
    monkeypatch.setattr(oracle.Inputs, "columns", property(lambda inputs: [column - 1 for column in columns(inputs)]))
    assert wrong(errors_of(case)) == RANKS - {"topk_recall_examples"}
