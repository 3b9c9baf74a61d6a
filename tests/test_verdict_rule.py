"""The rule of the verdict: what two differences with their intervals say together, and what one says alone."""

from __future__ import annotations

import math

import pytest
from iclgd_analysis import verdict
from iclgd_analysis.intervals import Estimate


@pytest.mark.parametrize(
    ("norm", "gain", "expected"),
    [
        ((0.05, 0.01, 0.09), (0.04, 0.001, 0.08), "closer"),
        ((0.015, 0.01, 0.02), (0.04, 0.001, 0.08), "undecided"),
        ((0.05, 0.01, 0.09), (0.04, -0.001, 0.08), "undecided"),
        ((-0.05, -0.09, -0.01), (-0.04, -0.08, -0.001), "further"),
        ((0.001, -0.01, 0.012), (0.0, -0.019, 0.019), "not closer"),
        ((0.015, 0.011, 0.019), (0.015, 0.011, 0.019), "not closer"),
        ((0.05, math.nan, math.nan), (0.04, 0.001, 0.08), "undecided"),
    ],
)
def test_the_rule(norm: tuple[float, ...], gain: tuple[float, ...], expected: str) -> None:
    assert verdict.verdict(Estimate(*norm), Estimate(*gain), Estimate(0.1, 0.05, 0.15), 0.02) == expected
    said = verdict.verdict(Estimate(*norm), Estimate(*gain), Estimate(0.1, -0.05, 0.15), 0.02)
    assert said == (f"{expected}, but not task-specific" if expected == "closer" else expected)
    for unknown in (Estimate(), Estimate(-0.1, used=1, replicates=1)):  # no context, or of one draw only
        said = verdict.verdict(Estimate(*norm), Estimate(*gain), unknown, 0.02)
        assert said == (f"{expected}, task-specific or not" if expected == "closer" else expected)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        ((0.05, 0.01, 0.09), "closer"),
        ((0.015, 0.005, 0.025), "undecided"),
        ((0.05, -0.01, 0.11), "undecided"),
        ((0.015, 0.011, 0.019), "not closer"),
        ((-0.05, -0.09, -0.01), "further"),
        ((0.05, math.nan, math.nan), "undecided"),
    ],
)
def test_what_one_difference_says_alone(one: tuple[float, ...], expected: str) -> None:
    assert verdict._alone(Estimate(*one), 0.02) == expected
