"""An arm's curve: the median of the living, few points, and no extreme lost."""

import math

import pytest

from ablations.ledger import TrialRecord
from ablations.summary import curve, thinned
from twinrl.tracking.thinning import MOST_POINTS

STEPS, SPIKE = 2000, 1217


def log(*values: float) -> list[dict[str, float]]:
    return [{"step": step, "m": value} for step, value in enumerate(values, start=1)]


def record(step: int | None = None) -> TrialRecord:
    return TrialRecord("c", 0, "f", "finished", diverged=None if step is None else {"step": step, "kind": "x"})


def test_it_is_the_median_of_the_living() -> None:
    logs = [(log(1, 2, 3), record()), (log(3, 4, 5), record()), (log(5, math.nan), record(2))]
    points = list(curve(logs, "m"))
    assert [(p.step, p.median, p.alive) for p in points] == [(1, 3, 3), (2, 3, 2), (3, 4, 2)]
    assert [(p.lowest, p.highest) for p in points] == [(1, 5), (2, 4), (3, 5)]
    assert all(p.lowest <= p.low <= p.median <= p.high <= p.highest for p in points)
    assert list(curve(logs, "absent")) == []


def test_a_repeated_step_counts_with_its_last_value_and_all_its_extremes() -> None:
    rolled_back = [{"step": 1, "m": 1.0}, {"step": 2, "m": 90.0}, {"step": 2, "m": 2.0}]
    (_, point) = curve([(rolled_back, record())], "m")
    assert (point.median, point.highest) == (2, 90)


@pytest.mark.parametrize("seeds", [1, 3, 8])
def test_long_curves_are_thinned_and_one_seeds_spike_stays(seeds: int) -> None:
    logs = [([{"step": step, "m": 1 + math.sin(step + seed)} for step in range(1, STEPS + 1)], record())
            for seed in range(seeds)]  # fmt: skip
    logs[0][0][SPIKE - 1]["m"] = 1000.0
    logs[-1][0][SPIKE]["m"] = -1000.0
    whole = list(curve(logs, "m"))
    points = thinned(whole)
    assert len(points) <= MOST_POINTS
    assert [p.step for p in points] == sorted({p.step for p in points})
    assert points[-1].step == STEPS
    assert {p.step: p.highest for p in points}[SPIKE] == 1000
    assert {p.step: p.lowest for p in points}[SPIKE + 1] == -1000
    for extreme in (min, max):
        assert extreme(p.median for p in points) == extreme(p.median for p in whole)


def test_short_curves_are_left_alone() -> None:
    points = list(curve([(log(*range(MOST_POINTS)), record())], "m"))
    assert thinned(points) == points
