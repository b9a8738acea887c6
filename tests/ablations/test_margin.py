"""Bisection for the critical learning rate: brackets, ends, number of probes."""

import math

import pytest

from ablations.margin import bisect, reachable
from ablations.study import Margin

MARGIN = Margin(low=1e-5, high=1e-1, tolerance=1.25)


def search(critical: float, margin: Margin = MARGIN) -> tuple[float | None, float | None, list[float]]:
    """Probe until nothing more is asked for; healthy up to ``critical``."""
    probes: dict[float, bool] = {}
    while True:
        healthy, diverged, following = bisect(margin, probes.get)
        if following is None:
            return healthy, diverged, list(probes)
        assert following not in probes
        probes[following] = following <= critical


@pytest.mark.parametrize("critical", [1.1e-5, 3e-4, 2.5e-3, 0.09])
def test_the_bracket_holds_the_edge_and_is_narrow(critical: float) -> None:
    healthy, diverged, probes = search(critical)
    assert healthy is not None
    assert diverged is not None
    assert healthy <= critical < diverged
    assert diverged / healthy <= MARGIN.tolerance
    assert len(probes) == 2 + math.ceil(math.log2(math.log(1e4) / math.log(1.25)))


def test_an_edge_outside_the_ends_is_said_after_its_probe() -> None:
    assert search(1e-6) == (None, 1e-5, [1e-5])
    assert search(1.0) == (0.1, None, [1e-5, 0.1])


def test_a_tolerance_below_the_digits_ends() -> None:
    healthy, diverged, _ = search(3e-4, Margin(low=1e-5, high=1e-1, tolerance=1 + 1e-9))
    assert healthy == 3e-4
    assert diverged == pytest.approx(3.001e-4)


def test_reachable_rates_are_those_that_some_edge_leads_to() -> None:
    margin = Margin(low=1e-3, high=1e-2, tolerance=1.5)
    asked = {rate for edge in range(5, 120) for rate in search(edge / 1e4, margin)[2]}
    assert reachable(margin) == asked
    assert len(asked) == 2 + (2**3 - 1)
