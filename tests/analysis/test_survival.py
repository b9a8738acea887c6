import math

import numpy as np
import pytest

from analysis import survival
from analysis.survival import Times

STEPS, EVERY = 1000.0, 50.0


def simulate(rng: np.random.Generator, shape: tuple[int, ...], rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and events of exponential divergence with ``rate`` a run length, seen at every 50th of 1000 steps."""
    seen = np.ceil(rng.exponential(STEPS / rate, shape) / EVERY) * EVERY
    return np.minimum(seen, STEPS), seen <= STEPS


def arm(times: list[float], events: list[int]) -> Times:
    return Times(np.array(times, float), np.array(events, bool))


SURVIVED = arm([STEPS] * 10, [0] * 10)
BROKEN = arm(list(range(100, 600, 50)), [1] * 10)


# --- hazard ratio -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_hazard_ratio_covers_the_planted_one(ratio: float) -> None:
    rng = np.random.default_rng(0)
    fast, slow = simulate(rng, (2000, 10), 0.8 * ratio), simulate(rng, (2000, 10), 0.8)
    found = [survival.hazard_ratio(Times(fast[0][k], fast[1][k]), Times(slow[0][k], slow[1][k])) for k in range(2000)]
    covered = np.mean([f.low <= ratio <= f.high for f in found])  # Monte-Carlo error 0.5 %
    assert 0.93 < covered < 0.97


def test_hazard_ratio_is_near_lifelines_with_many_runs() -> None:
    import pandas as pd
    from lifelines import CoxPHFitter

    rng = np.random.default_rng(1)
    fast, slow = Times(*simulate(rng, (400,), 2.0)), Times(*simulate(rng, (400,), 0.7))
    frame = pd.DataFrame({
        "time": np.concatenate([fast.time, slow.time]), "event": np.concatenate([fast.event, slow.event]),
        "arm": [1] * 400 + [0] * 400,
    })  # fmt: skip
    cox = CoxPHFitter().fit(frame, "time", "event")  # Efron's ties as ours
    found = survival.hazard_ratio(fast, slow)
    assert found.estimate == pytest.approx(float(cox.hazard_ratios_["arm"]), rel=0.01)
    low, high = np.exp(cox.confidence_intervals_.loc["arm"])
    assert [found.low, found.high] == pytest.approx([low, high], rel=0.02)


def test_likelihood_terms_are_lifelines_partial_likelihood() -> None:
    import pandas as pd
    from lifelines import CoxPHFitter

    rng = np.random.default_rng(2)
    a, b = Times(*simulate(rng, (12,), 1.5)), Times(*simulate(rng, (12,), 0.7))
    at_risk_base, at_risk_arm, d = survival.efron_terms(a, b)
    frame = pd.DataFrame({
        "time": np.concatenate([a.time, b.time]), "event": np.concatenate([a.event, b.event]),
        "arm": [1] * 12 + [0] * 12,
    })  # fmt: skip
    cox = CoxPHFitter().fit(frame, "time", "event")
    beta = float(cox.params_["arm"])
    ours = d * beta - np.log(at_risk_base + at_risk_arm * math.exp(beta)).sum()
    assert ours == pytest.approx(cox.log_likelihood_)


def test_hazard_ratio_without_events_in_one_arm_is_finite_and_symmetric() -> None:
    found, inverse = survival.hazard_ratio(SURVIVED, BROKEN), survival.hazard_ratio(BROKEN, SURVIVED)
    assert 0 < found.low < found.estimate < found.high < 1
    assert found.estimate == pytest.approx(1 / inverse.estimate, rel=1e-3)
    assert found.low == pytest.approx(1 / inverse.high, rel=1e-3)


def test_hazard_ratio_without_any_event_says_nothing() -> None:
    found = survival.hazard_ratio(SURVIVED, SURVIVED)
    assert math.isnan(found.estimate)
    assert (found.low, found.high) == (0.0, math.inf)


# --- curves -----------------------------------------------------------------------------------------------


def test_log_rank_keeps_its_level_and_finds_a_difference() -> None:
    rng = np.random.default_rng(3)
    a, b = simulate(rng, (250, 10), 1.0), simulate(rng, (250, 10), 1.0)
    p = np.array([survival.log_rank({"a": Times(a[0][k], a[1][k]), "b": Times(b[0][k], b[1][k])}) for k in range(250)])
    assert (p < 0.05).mean() < 0.105  # 5 % and four Monte-Carlo errors
    assert survival.log_rank({"a": SURVIVED, "b": BROKEN}) < 1e-4
    assert math.isnan(survival.log_rank({"a": SURVIVED, "b": SURVIVED}))


# --- restricted means -------------------------------------------------------------------------------------


def test_restricted_mean_is_lifelines_also_with_censoring() -> None:
    from lifelines.utils import restricted_mean_survival_time

    rng = np.random.default_rng(4)
    time, event = simulate(rng, (15,), 1.0)
    times = Times(time, event & (rng.random(15) < 0.6))
    theirs = restricted_mean_survival_time(survival.kaplan_meier(times), 800)
    assert survival.restricted_mean(times, 800).estimate == pytest.approx(theirs)


@pytest.mark.parametrize("rate", [0.2, 0.7, 2.0])
def test_restricted_mean_covers_the_planted_one(rate: float) -> None:
    rng = np.random.default_rng(5)
    time, event = simulate(rng, (2000, 10), rate)
    truth = float(simulate(rng, (1_000_000,), rate)[0].mean())
    found = [survival.restricted_mean(Times(t, e), STEPS) for t, e in zip(time, event, strict=True)]
    covered = np.mean([f.low <= truth <= f.high for f in found])  # error 0.5 %
    assert 0.93 < covered < 0.98  # two Monte-Carlo errors beyond 97 %
    mean = time.mean(1)  # what the usual interval would do
    half = 1.96 * time.std(1) / math.sqrt(10)
    assert (np.abs(mean - truth) <= half).mean() < 0.925


def test_difference_of_restricted_means_covers() -> None:
    rng = np.random.default_rng(6)
    a, b = simulate(rng, (2000, 10), 2.0), simulate(rng, (2000, 10), 0.7)
    truth = float(simulate(rng, (1_000_000,), 2.0)[0].mean() - simulate(rng, (1_000_000,), 0.7)[0].mean())
    found = [
        survival.restricted_mean_difference(Times(a[0][k], a[1][k]), Times(b[0][k], b[1][k]), STEPS)
        for k in range(2000)
    ]
    assert 0.93 < np.mean([f.low <= truth <= f.high for f in found]) < 0.98


def test_no_event_leaves_the_restricted_mean_unsure() -> None:
    found = survival.restricted_mean(SURVIVED, STEPS)
    assert found.estimate == STEPS
    assert 0.7 * STEPS < found.low < 0.9 * STEPS
    assert SURVIVED.share.high == pytest.approx(0.308, abs=1e-3)


def test_times_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="positive"):
        arm([0.0], [1])
