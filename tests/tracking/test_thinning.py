"""Thinned curves are short and keep every extreme, whatever the length of the run."""

import math

import numpy as np
import pytest

from twinrl.tracking.thinning import MOST_POINTS, MetricPoint, Thinner


def thin(values: list[float], total: int | None = None, every: int = 1, name: str = "x") -> list[MetricPoint]:
    """The points of one series that has a value every so many iterations."""
    thinner = Thinner(total or len(values) * every)
    points = []
    for k, value in enumerate(values):
        points += thinner.feed({"iteration": k * every, "step": 0, name: value})
    return points + thinner.flush()


def series(points: list[MetricPoint], name: str = "x") -> list[tuple[int, float]]:
    return [(point.iteration, point.value) for point in points if point.name == name]


@pytest.mark.parametrize("rows", [1, 2, 7, 139, 140, 141, 320, 1000, 3000, 20_001])
def test_few_points_and_each_is_a_row(rows: int) -> None:
    values = np.random.default_rng(rows).standard_normal(rows).tolist()
    found = series(thin(values))
    assert len(found) == len(set(found)) <= MOST_POINTS
    assert all(values[iteration] == value for iteration, value in found)
    assert found == sorted(found)
    assert found[-1] == (rows - 1, values[-1])


@pytest.mark.parametrize("rows", [1, 100, 280])
def test_short_runs_are_complete(rows: int) -> None:
    values = np.random.default_rng(0).standard_normal(rows).tolist()
    assert series(thin(values)) == list(enumerate(values))


@pytest.mark.parametrize("sign", [1, -1])
def test_every_single_step_spike_survives_at_full_height(sign: int) -> None:
    spikes = {17: 50.0, 1234: 1000.0, 1300: 80.0, 2998: 60.0}
    values = [sign * spikes.get(k, math.sin(k)) for k in range(3000)]
    assert {(k, sign * height) for k, height in spikes.items()} <= set(series(thin(values)))


def test_envelope_is_exact_in_every_bucket() -> None:
    values = np.random.default_rng(1).standard_normal(2800)
    kept = np.full(2800, np.nan)
    for iteration, value in series(thin(values.tolist())):
        kept[iteration] = value
    width = Thinner(2800).width
    buckets, originals = kept.reshape(-1, width), values.reshape(-1, width)
    np.testing.assert_array_equal(np.nanmax(buckets, 1), originals.max(1))
    np.testing.assert_array_equal(np.nanmin(buckets, 1), originals.min(1))


def test_sparse_series_are_complete() -> None:
    values = np.random.default_rng(2).standard_normal(100).tolist()
    assert series(thin(values, every=30)) == [(30 * k, value) for k, value in enumerate(values)]


@pytest.mark.parametrize("factor", [1.5, 3, 15])
def test_runs_longer_than_planned_stay_short(factor: float) -> None:
    total = 1000
    values = np.random.default_rng(3).standard_normal(int(factor * total)).tolist()
    values[-40] = 99.0
    found = series(thin(values, total=total))
    assert len(found) <= MOST_POINTS
    assert (len(values) - 40, 99.0) in found
    assert found[: len(found) // 4] == series(thin(values[:total]))[: len(found) // 4]


def test_non_finite_values_are_counted_instead_of_drawn() -> None:
    values = [math.nan if k in (5, 6, 900) else (math.inf if k == 901 else 1.0 * k) for k in range(1400)]
    points = thin(values)
    assert all(math.isfinite(value) for _, value in series(points)), "each is followed by a number in its bucket"
    counts = series(points, "nonfinite/x")
    assert counts[-1] == (901, 4.0)
    assert [count for _, count in counts] == sorted(count for _, count in counts)


def test_a_series_that_ends_with_nan_has_no_number_as_its_latest_point() -> None:
    values = [1.26, *[math.nan] * 4, 3.0, *[math.inf] * 3]
    found = series(thin(values))
    assert found[0] == (0, 1.26)
    assert (5, 3.0) in found
    assert found[-1][0] == 8
    assert math.isnan(found[-1][1])
    wide = series(thin([1.0, math.nan, *[1.0] * 2, math.nan], total=1400))  # in one bucket
    assert [iteration for iteration, _ in wide][-1] == 4
    assert math.isnan(wide[-1][1])


def test_points_do_not_depend_on_how_the_log_arrives() -> None:
    values = np.random.default_rng(4).standard_normal(500).tolist()
    rows = [{"iteration": k, "step": k, "x": value} for k, value in enumerate(values)]
    once, resumed = Thinner(500), Thinner(500)
    first = [point for row in rows[:333] for point in once.feed(row)]
    rest = [point for row in rows[333:] for point in once.feed(row)]
    assert [point for row in rows[:333] for point in resumed.feed(row)] == first
    assert [point for row in rows[333:] for point in resumed.feed(row)] == rest


def test_words_and_counters_are_no_series_and_time_adds_up() -> None:
    thinner = Thinner(2)
    thinner.feed({"iteration": 0, "step": 0, "perf/step_seconds": 0.5, "phase": "warm-up", "x": 1})
    (point,) = [p for p in thinner.feed({"iteration": 1, "step": 1, "perf/step_seconds": 2.0}) if p.name == "x"]
    assert point == MetricPoint("x", 0, 1.0, 0.5)
    assert thinner.seconds == 2.5
    assert {p.name for p in thinner.flush()} == {"perf/step_seconds"}
