import math

import numpy as np
import pytest

from analysis import survival, validity
from analysis.survival import Times
from analysis.validity import STEPS
from tests.analysis.simulated import at_least, at_most

STUDIES = 250
"""Few; ``campaign`` tries 2,000 of each kind in test_validity.py."""


def arm(times: list[float], events: list[int]) -> Times:
    return Times(np.array(times, float), np.array(events, bool))


SURVIVED = arm([STEPS] * 10, [0] * 10)
BROKEN = arm(list(range(100, 600, 50)), [1] * 10)


# --- hazard ratio -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [1.0, 3.0])
def test_hazard_ratio_covers_the_planted_one(ratio: float) -> None:
    rng = np.random.default_rng(0)
    fast, slow = (validity.arms(rng, STUDIES, 10, rate) for rate in (0.8 * ratio, 0.8))
    found = [survival.hazard_ratio(a, b) for a, b in zip(fast, slow, strict=True)]
    assert at_least(0.93, STUDIES) < validity.inside(found, ratio) < 1


def test_hazard_ratio_is_near_lifelines_with_many_runs() -> None:
    import pandas as pd
    from lifelines import CoxPHFitter

    rng = np.random.default_rng(1)
    fast, slow = Times(*validity.divergence(rng, (400,), 2.0)), Times(*validity.divergence(rng, (400,), 0.7))
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
    a, b = Times(*validity.divergence(rng, (12,), 1.5)), Times(*validity.divergence(rng, (12,), 0.7))
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


@pytest.mark.slow
def test_log_rank_keeps_its_level_and_finds_a_difference() -> None:
    rng = np.random.default_rng(3)
    pairs = zip(*(validity.arms(rng, 100, 10, 1.0) for _ in "ab"), strict=True)
    p = np.array([survival.log_rank({"a": a, "b": b}) for a, b in pairs])
    assert (p < 0.05).mean() < at_most(0.05, len(p))
    assert survival.log_rank({"a": SURVIVED, "b": BROKEN}) < 1e-4
    assert math.isnan(survival.log_rank({"a": SURVIVED, "b": SURVIVED}))


# --- restricted means -------------------------------------------------------------------------------------


def test_restricted_mean_is_lifelines_also_with_censoring() -> None:
    from lifelines.utils import restricted_mean_survival_time

    rng = np.random.default_rng(4)
    time, event = validity.divergence(rng, (15,), 1.0)
    times = Times(time, event & (rng.random(15) < 0.6))
    theirs = restricted_mean_survival_time(survival.kaplan_meier(times), 800)
    assert survival.restricted_mean(times, 800).estimate == pytest.approx(theirs)


@pytest.mark.parametrize("rate", [0.2, 0.7, 2.0])
def test_restricted_mean_covers_the_planted_one(rate: float) -> None:
    time, event = validity.divergence(np.random.default_rng(5), (2000, 10), rate)
    truth, few = validity.mean_time(rate), zip(time[:STUDIES], event[:STUDIES], strict=True)
    found = [survival.restricted_mean(Times(t, e), STEPS) for t, e in few]
    assert at_least(0.93, STUDIES) < validity.inside(found, truth) < 1
    mean = time.mean(1)  # what the usual interval would do
    half = 1.96 * time.std(1) / math.sqrt(10)
    assert (np.abs(mean - truth) <= half).mean() < 0.925  # of 2,000: four errors below 95 %


@pytest.mark.slow
def test_difference_of_restricted_means_covers() -> None:
    rng = np.random.default_rng(6)
    pairs = zip(*(validity.arms(rng, STUDIES, 10, rate) for rate in (2.0, 0.7)), strict=True)
    found = [survival.restricted_mean_difference(a, b, STEPS) for a, b in pairs]
    assert at_least(0.93, STUDIES) < validity.inside(found, validity.mean_time(2.0) - validity.mean_time(0.7)) < 1


def test_no_event_leaves_the_restricted_mean_unsure() -> None:
    found = survival.restricted_mean(SURVIVED, STEPS)
    assert found.estimate == STEPS
    assert 0.7 * STEPS < found.low < 0.9 * STEPS
    assert SURVIVED.share.high == pytest.approx(0.308, abs=1e-3)


def test_times_refuse_nonsense() -> None:
    with pytest.raises(ValueError, match="positive"):
        arm([0.0], [1])
