"""`iclgd check-method`: each promise of a method, kept by the built-in ones and broken by one of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from iclgd_dist import cli
from iclgd_dist.check import check_method
from iclgd_dist.extensions import BUILTIN, MethodSpec
from iclgd_dist.updates import make_method

RULES = """
import torch
from dataclasses import replace
from iclgd_dist.updates import LayerCausal, Vanilla

class Good(Vanilla):
    def direction(self, gradient, state):
        return gradient.sign()

class Mixed(Vanilla):
    def direction(self, gradient, state):
        return gradient.mean(0, keepdim=True).expand_as(gradient)

class Restless(Vanilla):
    def direction(self, gradient, state):
        return gradient + 1e-3 / self.rate.clamp(min=1e-9).view(-1, *[1] * (gradient.dim() - 1))

    def lanes(self, lm, indices, learning_rates, seed):
        lanes = super().lanes(lm, indices, learning_rates, seed)
        self.rate = lanes.rate_N
        lanes.rate_N = lanes.rate_N.clamp(min=1e-9)
        return lanes

class Random(Vanilla):
    def direction(self, gradient, state):
        return torch.randn_like(gradient)

class Writes(Vanilla):
    def train(self, lm, demonstrations, learning_rates, *, steps, seed=0):
        for probe in super().train(lm, demonstrations, learning_rates, steps=steps, seed=seed):
            lm.layers[0].self_attn.k_proj.weight += 1e-3
            yield probe

class Forgets(Vanilla):
    def train(self, lm, demonstrations, learning_rates, *, steps, seed=0):
        yield from list(super().train(lm, demonstrations, learning_rates, steps=steps, seed=seed))[-1:]

class Idle(Vanilla):
    def direction(self, gradient, state):
        return gradient * 0

class Renames(Vanilla):
    def train(self, lm, demonstrations, learning_rates, *, steps, seed=0):
        for probe in super().train(lm, demonstrations, learning_rates, steps=steps, seed=seed):
            yield replace(probe, deltas={"x." + name: delta for name, delta in probe.deltas.items()})

class Raises(Vanilla):
    def train(self, *args, **options):
        raise RuntimeError("not today")
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    (tmp_path / "rules.py").write_text(RULES)
    return tmp_path


def problems(folder: Path, name: str) -> dict[str, str]:
    spec = MethodSpec(name="mine", code=f"rules.py:{name}").with_text(folder)
    return {finding.what: finding.problem for finding in check_method(lambda: make_method(spec)) if not finding.holds}


@pytest.mark.parametrize("name", list(BUILTIN))
def test_the_built_in_methods_keep_every_promise(name: str) -> None:
    findings = list(check_method(lambda: make_method(BUILTIN[name])))
    assert len(findings) == 9 and all(finding.holds for finding in findings), findings


@pytest.mark.parametrize(
    ("name", "what", "said"),
    [
        ("Mixed", "lanes are independent", "learning rate 0.003 alone gives other deltas"),
        ("Restless", "learning rate 0 adds nothing", "largest change"),
        ("Random", "the same twice", "largest difference"),
        ("Writes", "the model's own weights are untouched", "written: model.layers.0.self_attn.k_proj.weight"),
        ("Forgets", "it yields a probe after each of the steps asked for", "asked for [1, 4], got [4]"),
        ("Idle", "a learning rate above 0 adds something", "every delta is 0"),
        ("Renames", "its deltas fit the model's projections", "no projection is called 'x.model.layers.0.self_attn.k_proj'"),
        ("Raises", "it trains a tiny random llama", "RuntimeError: not today"),
    ],
)
def test_a_promise_that_is_broken_is_named(rules: Path, name: str, what: str, said: str) -> None:
    assert said in problems(rules, name)[what]


def test_a_rule_of_ones_own_that_keeps_them_passes(rules: Path) -> None:
    assert problems(rules, "Good") == {}


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["iclgd", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, errors = capsys.readouterr()
    return int(end.value.code or 0), out, errors


def test_the_command_says_what_holds_and_what_fails(rules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(rules)
    code, out, _ = run(monkeypatch, capsys, "check-method", "rules.py:Good")
    assert code == 0 and out.count("holds") == 9 and "fails" not in out
    code, out, _ = run(monkeypatch, capsys, "check-method", "rules.py:Mixed")
    assert code == 2 and "fails lanes are independent: learning rate" in out
    code, out, errors = run(monkeypatch, capsys, "check-method", "rules.py:Good", "--option", "scale = 2.0")
    assert (code, out) == (2, "") and "TypeError" in errors and errors.count("\n") == 1
    for argument, message in (
        ("rules.py", "must name a file and a class in it"),
        ("other.py:Good", "other.py: no such file"),
        ("rules.py:Nobody", "must define Nobody"),
    ):
        code, out, errors = run(monkeypatch, capsys, "check-method", argument)
        assert (code, out) == (2, "") and message in errors and errors.count("\n") == 1
