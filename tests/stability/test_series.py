import math
from typing import Any

import numpy as np
import pytest

from tests.stability.simulate import ar1
from twinrl.stability.series import Detector, Drift, Finding, Limit, NonFinite, Spike


def feed(detector: Detector, values: list[float], start: int = 0) -> list[Finding]:
    """All findings for the series ``g``; steps count from ``start``."""
    return [finding for i, value in enumerate(values) for finding in detector.observe(start + i, {"g": value})]


def noise(seed: int, steps: int, sigma: float = 0.2, correlation: float = 0.5) -> list[float]:
    """Log-normal norms around 1."""
    return np.exp(ar1(np.random.default_rng(seed), steps, sigma, correlation)).tolist()


def spike(**settings: Any) -> Spike:
    return Spike(Spike.Config(**settings), "g")


def drift(**settings: Any) -> Drift:
    return Drift(Drift.Config(**settings), "g")


# --- spikes -----------------------------------------------------------------------------------------------


def test_a_spike_is_found_at_its_step_with_its_usual_value() -> None:
    values = noise(0, 300)
    values[150] = 20.0
    (found,) = feed(spike(), values)
    assert (found.step, found.kind, found.series, found.value, found.onset) == (150, "spike", "g", 20.0, True)
    assert found.reference == pytest.approx(np.median(values[:150]), rel=0.01)
    assert found.score is not None
    assert found.score > 6


def test_either_rule_suffices() -> None:
    """Against noise with σ 1 a factor of 12 is no 6σ, and against σ 0.2 a z of 8 no factor of 10."""
    rough, calm = noise(1, 200, sigma=1.0, correlation=0), noise(1, 200, sigma=0.2, correlation=0)
    rough_spike, calm_spike = 12 * float(np.median(rough)), math.exp(9 * 0.2) * float(np.median(calm))
    by_ratio, by_z = {"z": 1e9}, {"ratio": 1e9}
    assert feed(spike(**by_ratio), [*rough, rough_spike])[-1].step == 200
    assert 200 not in [f.step for f in feed(spike(**by_z), [*rough, rough_spike])]
    assert feed(spike(**by_z), [*calm, calm_spike])[-1].step == 200
    assert not feed(spike(**by_ratio), [*calm, calm_spike])


def test_a_constant_series_has_a_floor_under_its_scale() -> None:
    """The median deviation is 0; without the floor any rise, even by a rounding error, would be infinitely many σ."""
    floor = math.exp(6 * 0.1 * math.sqrt(1 + 25 / 100))
    assert not feed(spike(), [1.0] * 100 + [0.99 * floor])
    (found,) = feed(spike(), [1.0] * 100 + [1.01 * floor])
    assert (found.step, found.score) == (100, pytest.approx(6, rel=0.02))


def test_a_small_norm_is_no_spike() -> None:
    assert not feed(spike(), [*noise(2, 100), 1e-6, *noise(3, 50)])


def test_nothing_is_judged_during_the_warmup() -> None:
    values = noise(4, 60)
    values[20] = values[40] = 50.0
    assert [f.step for f in feed(spike(warmup=25), values)] == [40]
    assert [f.step for f in feed(spike(warmup=10), values)] == [20, 40]


def test_an_episode_begins_once() -> None:
    values = noise(5, 300)
    for at in (100, 101, 103, 130):
        values[at] = 30.0
    found = feed(spike(cooldown=10), values)
    assert [(f.step, f.onset) for f in found] == [(100, True), (101, False), (103, False), (130, True)]


def test_spikes_do_not_hide_those_that_follow() -> None:
    values = noise(6, 400)
    planted = list(range(100, 300, 10))  # 20 among 200 steps
    for at in planted:
        values[at] = 15.0
    assert [f.step for f in feed(spike(), values)] == planted


def test_a_new_level_is_a_spike_for_half_a_window_and_then_a_drift() -> None:
    values = noise(7, 400) + [20 * v for v in noise(8, 800)]
    spikes, drifts = feed(spike(), values), feed(drift(), values)
    assert [f.step for f in spikes if f.onset] == [400]
    assert 495 <= spikes[-1].step <= 505
    assert [495 <= f.step <= 505 for f in drifts] == [True]
    assert drifts[0].reference == pytest.approx(1, rel=0.2)


def test_a_term_that_is_switched_on_gets_a_warmup_of_its_own() -> None:
    assert not feed(spike(), [0.0] * 500 + [1e3 * v for v in noise(9, 300)])
    assert not feed(drift(), [0.0] * 500 + [1e3 * v for v in noise(9, 600)])


def test_missing_and_nonfinite_values_leave_no_trace() -> None:
    values = noise(10, 600)
    values[300] = 30.0
    gaps: list[float | None] = list(values)
    for at in (50, 150, 299, 301):
        gaps[at:at] = [None, math.nan, math.inf, -math.inf]
    for make in (spike, drift):
        one, other = make(), make()
        expected = [f.value for f in feed(one, values)]
        assert [f.value for f in feed(other, gaps)] == expected  # type: ignore[arg-type]
        assert one.state() == other.state()
    assert spike().observe(0, {"another": 1.0}) == []


@pytest.mark.slow
def test_spikes_in_ordinary_noise_are_rare() -> None:
    """Σ 0.1–0.5, correlation up to 0.95: less than one false alarm in 20 000 steps."""
    laws = [(sigma, correlation) for sigma in (0.1, 0.3, 0.5) for correlation in (0, 0.8, 0.95)]
    alarms = [len(feed(spike(), noise(k, 1000, *law))) for k in range(10) for law in laws]
    assert sum(alarms) <= len(alarms) * 1000 / 20_000


# --- drifts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [4, pytest.param(12, marks=pytest.mark.campaign)])
def test_drifts_in_ordinary_noise_are_rare(runs: int) -> None:
    """Σ 0.1–0.5, correlation up to 0.9, with and without a decay by 20: below 1 % of series of 2000 steps."""
    laws = [(sigma, correlation) for sigma in (0.1, 0.3, 0.5) for correlation in (0, 0.8, 0.9)]
    falls = np.geomspace(1, 0.05, 2000)
    alarms = 0
    for k in range(runs):
        for law in laws:
            level = np.array(noise(k, 2000, *law))
            alarms += bool(feed(drift(), level.tolist())) + bool(feed(drift(), (level * falls).tolist()))
    assert alarms <= 0.01 * 2 * runs * len(laws)


@pytest.mark.parametrize("rise", [3.0, 10.0, 100.0])
def test_a_lasting_rise_is_found_once_within_a_window(rise: float) -> None:
    for seed in range(20):
        at = 450 + 17 * seed  # anywhere in a block
        values = noise(seed, at) + [rise * v for v in noise(seed + 100, 1000)]
        (found,) = feed(drift(), values)
        assert at + 90 <= found.step <= at + 200
        assert found.score is not None
        assert found.score > 3


def test_slow_growth_is_found_and_found_again() -> None:
    """By 40 over 4000 steps; a step-to-step detector sees nothing of it."""
    values = (np.array(noise(0, 4000)) * np.geomspace(1, 40, 4000)).tolist()
    assert not feed(spike(), values)
    assert 3 <= len(feed(drift(), values)) <= 5


def test_the_baseline_follows_a_level_down() -> None:
    """A fall by 10 and a rise to half the first level: 5 times the lowest."""
    values = [10 * v for v in noise(0, 600)] + noise(1, 600) + [5 * v for v in noise(2, 400)]
    (found,) = feed(drift(), values)
    assert 1290 <= found.step <= 1400
    assert found.reference == pytest.approx(1, rel=0.2)


def test_a_rise_has_to_leave_the_noise() -> None:
    """By 4 under σ 1, that is 1.4 σ: the factor is exceeded, the noise is not."""
    values = noise(4, 600, sigma=1.0) + [4 * v for v in noise(5, 600, sigma=1.0)]
    assert not feed(drift(), values)
    assert len(feed(drift(z=1.0), values)) == 1


def test_single_spikes_are_no_drift() -> None:
    values = noise(3, 2000)
    values[::5] = [1000.0] * 400
    assert not feed(drift(), values)


# --- limits and non-finite values -----------------------------------------------------------------------------


def test_a_limit_finds_values_from_it_on() -> None:
    found = feed(Limit("g", 2.3, cooldown=2), [1.0, 2.29, 2.3, 4.6, 1.0, 1.0, 2.5, math.nan])
    assert [(f.step, f.kind, f.reference, f.onset) for f in found] == [
        (2, "spike", 2.3, True),
        (3, "spike", 2.3, False),
        (6, "spike", 2.3, True),
    ]
    assert found[1].score == 2.0


def test_nonfinite_values_are_found_in_watched_series_only() -> None:
    detector = NonFinite(["a", "b"], cooldown=1)
    steps: list[dict[str, Any]] = [
        {"a": 1.0, "b": math.nan, "c": math.nan},
        {"a": math.inf, "b": -math.inf},
        {"a": 1.0, "b": None},
        {},
    ]
    found = [finding for i, values in enumerate(steps) for finding in detector.observe(i, values)]
    assert [(f.step, f.series, f.onset) for f in found] == [(0, "b", True), (1, "a", True), (1, "b", False)]
    assert all(f.reference is None and f.score is None and f.kind == "nonfinite" for f in found)
    assert found[2].value == -math.inf


def test_a_finding_is_strict_json() -> None:
    assert Finding(3, "nonfinite", "g", math.nan, None, None, True).as_dict() == {
        "step": 3,
        "kind": "nonfinite",
        "series": "g",
        "value": "nan",
        "reference": None,
        "score": None,
        "onset": True,
    }
