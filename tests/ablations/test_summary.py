"""An arm's curve: the median of the living, few points, and no extreme lost."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ablations import summary
from ablations.ledger import TrialRecord
from ablations.summary import MOST_POINTS, Curve, SeedLog, alive, curve, curves
from tests.rounding import bound

STEPS, SPIKE = 2000, 1217
Log = list[float]


def of(*logs: Log) -> Curve:
    """The curve of seeds that log a value a step, from step 1."""
    values = [np.array([value if math.isfinite(value) else math.nan for value in log]) for log in logs]
    return curve([np.arange(1, len(log) + 1) for log in logs], values)


def seed(last: int, failed: int | None = None) -> SeedLog:
    diverged = None if failed is None else {"step": failed, "kind": "x"}
    return SeedLog(Path(), TrialRecord("c", 0, "f", "finished", diverged=diverged), (), last)


def test_it_is_the_median_of_the_living() -> None:
    found = of([1, 2, 3], [3, 4, 5], [5, math.nan])
    assert found.step.tolist() == [1, 2, 3]
    assert found.median.tolist() == [3, 3, 4]
    assert (found.lowest.tolist(), found.highest.tolist()) == ([1, 2, 3], [5, 4, 5])
    assert len(of([math.nan]).step) == 0


@pytest.mark.parametrize("seeds", [1, 2, 5, 10])
def test_the_band_is_numpys(seeds: int) -> None:
    values = np.random.default_rng(seeds).lognormal(size=(seeds, 50))
    values[0, ::3] = math.nan if seeds > 1 else 1.0
    found = of(*values.tolist())
    expected = np.nanquantile(values, (0.1, 0.5, 0.9), axis=0)
    np.testing.assert_allclose([found.low, found.median, found.high], expected, rtol=bound(8, dtype=torch.float64))


def test_a_repeated_step_counts_with_its_last_value_and_all_its_extremes() -> None:
    found = curve([np.array([1, 2, 2])], [np.array([1.0, 90.0, 2.0])])
    assert (found.median.tolist(), found.highest.tolist()) == ([1, 2], [1, 90])


def test_seeds_are_alive_until_they_fail_or_end() -> None:
    assert alive([seed(9), seed(9, failed=4), seed(6)]) == [(0, 3), (3, 3), (4, 2), (6, 2), (7, 1), (9, 1)]
    assert alive([seed(9), seed(9)]) == [(0, 2), (9, 2)]


@pytest.mark.parametrize("seeds", [1, 3, 8])
def test_long_curves_are_thinned_and_one_seeds_spike_stays(seeds: int) -> None:
    logs = [[1 + math.sin(step + seed) for step in range(1, STEPS + 1)] for seed in range(seeds)]
    logs[0][SPIKE - 1] = 1000.0
    logs[-1][SPIKE] = -1000.0
    whole = of(*logs)
    points = whole.thinned()
    assert len(points.step) <= MOST_POINTS
    assert (np.diff(points.step) > 0).all()
    assert points.step[-1] == STEPS
    assert points.highest[points.step == SPIKE] == 1000
    assert points.lowest[points.step == SPIKE + 1] == -1000
    for extreme in (min, max):
        assert extreme(points.median) == extreme(whole.median)


def test_short_curves_are_left_alone() -> None:
    found = of([float(step) for step in range(MOST_POINTS)])
    assert found.thinned() is found


def write(folder: Path, rows: list[dict[str, object]], failed: int | None = None) -> SeedLog:
    """A run directory with a log."""
    folder.mkdir()
    lines = [json.dumps({"iteration": k, **row}) for k, row in enumerate(rows)]
    (folder / "log.jsonl").write_text("".join(f"{line}\n" for line in lines))
    diverged = None if failed is None else {"step": failed, "kind": "x"}
    return summary._log(folder, TrialRecord("c", 0, "f", "finished", diverged=diverged))


@pytest.mark.parametrize("together", [1, summary.NUMBERS_AT_ONCE])
def test_every_series_is_there_and_what_ends_before_the_failure_ranks_nothing(
    tmp_path: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "NUMBERS_AT_ONCE", together)
    whole = [{"step": k, "norm": 1.0 + k, "quality": 0.5} for k in range(1, 4)]
    fallen = [{"step": 1, "norm": 2.0, "quality": 0.5}, {"step": 2, "norm": 3.0}, {"step": 3, "norm": "inf"}]
    half = dict(curves([write(tmp_path / "a", whole), write(tmp_path / "b", fallen, failed=2)]))
    assert list(half) == ["norm", "quality"]
    assert half["quality"].step.tolist() == [1, 2, 3, 4]
    assert math.isnan(half["quality"].median[-1])
    assert half["norm"].median.tolist()[:3] == [2.0, 3.0, 4.0]
    third = dict(
        curves([write(tmp_path / f"c{k}", whole) for k in range(2)] + [write(tmp_path / "d", fallen, failed=2)])
    )
    assert third["quality"].step.tolist() == [1, 2, 3]
    assert third["norm"].step.tolist() == [1, 2, 3]
