import math

import numpy as np
import pytest
from scipy import stats

from analysis import coverage, intervals

SIMULATIONS = 20_000  # Monte-Carlo error of a coverage: 0.15 %; one sort of an array, so it is quick


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("law", list(coverage.LAWS))
def test_iqm_interval_covers_at_few_seeds(law: str, n: int) -> None:
    covered = coverage.coverage(coverage.calibrated_t, coverage.LAWS[law], n, SIMULATIONS)
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize("n", [3, 5, 8])
def test_iqm_interval_is_exact_for_normal_values(n: int) -> None:
    covered = coverage.coverage(coverage.calibrated_t, coverage.LAWS["normal"], n, SIMULATIONS)
    assert covered == pytest.approx(0.95, abs=0.006)  # four errors


def test_the_alternatives_are_worse_at_ten_seeds() -> None:
    worst = {
        name: min(coverage.coverage(coverage.METHODS[name], law, 8, 4000) for law in coverage.LAWS.values())
        for name in ("trimmed t", "calibrated t")
    }
    assert worst["trimmed t"] < 0.93 < worst["calibrated t"]


def test_iqm_agrees_with_rliable_and_scipy() -> None:
    metrics = pytest.importorskip("rliable.metrics")
    values = np.random.default_rng(0).gamma(2.0, size=11)
    found = intervals.iqm(values)
    assert found.estimate == pytest.approx(metrics.aggregate_iqm(values[:, None]))
    assert found.estimate == pytest.approx(stats.trim_mean(values, 0.25))


def test_iqm_bears_as_many_diverged_runs_as_it_trims() -> None:
    healthy = intervals.iqm([*range(8), math.inf, math.inf])
    assert math.isfinite(healthy.high)
    assert healthy.estimate == pytest.approx(np.mean([2, 3, 4, 5, 6, 7]))
    broken = intervals.iqm([*range(7), math.inf, math.inf, math.inf])
    assert (broken.estimate, broken.low, broken.high) == (math.inf, -math.inf, math.inf)


def test_iqm_moves_with_the_data() -> None:
    values = np.random.default_rng(1).standard_normal(10)
    plain, moved = intervals.iqm(values), intervals.iqm(3 * values + 5)
    assert [moved.low, moved.high] == pytest.approx([3 * plain.low + 5, 3 * plain.high + 5])


def test_one_value_has_no_interval_and_nan_is_refused() -> None:
    assert intervals.iqm([1.0]).high == math.inf
    with pytest.raises(ValueError, match="no NaN"):
        intervals.iqm([1.0, math.nan])


def test_clopper_pearson_states_the_bound_of_zero_events() -> None:
    assert intervals.clopper_pearson(0, 10).high == pytest.approx(1 - 0.025**0.1)
    assert intervals.clopper_pearson(10, 10).low == pytest.approx(0.025**0.1)


@pytest.mark.parametrize("n", [10, 20])
def test_mid_p_covers_on_average_and_is_shorter_than_exact(n: int) -> None:
    shares = np.linspace(0.02, 0.98, 97)
    found = [intervals.mid_p(k, n) for k in range(n + 1)]
    inside = np.array([[f.low <= p <= f.high for f in found] for p in shares])
    weights = stats.binom.pmf(np.arange(n + 1), n, shares[:, None])
    assert 0.94 < (weights * inside).sum(1).mean() < 0.97
    exact = intervals.clopper_pearson(3, n)
    assert found[3].high - found[3].low < exact.high - exact.low


def test_mid_p_takes_ties_as_halves() -> None:
    low, middle, high = (intervals.mid_p(k, 10) for k in (5, 5.5, 6))
    assert low.low < middle.low < high.low
    assert intervals.mid_p(5, 10).low == pytest.approx(1 - intervals.mid_p(5, 10).high)


def test_improvement_agrees_with_rliable() -> None:
    metrics = pytest.importorskip("rliable.metrics")
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal(10) + 1, rng.standard_normal(12)
    found = intervals.improvement(a, b)
    assert found.estimate == pytest.approx(metrics.probability_of_improvement(a[:, None], b[:, None]))
    assert found.low < found.estimate < found.high


@pytest.mark.parametrize("shift", [0.0, 0.75, 1.5])
def test_improvement_covers(shift: float) -> None:
    rng, n = np.random.default_rng(3), 10
    x, y = rng.standard_normal((SIMULATIONS, n)), rng.standard_normal((SIMULATIONS, n)) + shift
    estimates = intervals.superiority(intervals.wins(y[:, :, None], x[:, None, :]))
    truth = float(stats.norm.cdf(shift / math.sqrt(2)))
    inside = np.abs(estimates - truth) <= stats.norm.ppf(0.975) * math.sqrt(intervals.newcombe_variance(truth, n, n))
    assert 0.93 < inside.mean() < 0.97
    found = intervals.improvement(y[0], x[0])  # the same set, as interval
    assert (found.low <= truth <= found.high) == bool(inside[0])


def test_improvement_of_an_arm_that_always_wins_is_still_unsure() -> None:
    found = intervals.improvement(np.arange(10) + 100.0, np.arange(10.0))
    assert found.estimate == 1.0
    assert 0.6 < found.low < 0.9
    assert found.high == 1.0


def test_seeds_needed_gives_the_promised_power() -> None:
    n = intervals.seeds_needed(1.0)
    rng = np.random.default_rng(4)
    p = stats.wilcoxon(rng.standard_normal((SIMULATIONS, n)) + 1.0, axis=1).pvalue
    assert 0.8 <= (p < 0.05).mean() < 0.88
    assert intervals.seeds_needed(0.5) > 2 * n
    assert intervals.seeds_needed(1.0, tests=8) > n


def test_fewest_seeds_is_where_signed_ranks_begin_to_find_something() -> None:
    n = intervals.fewest_seeds(2)
    smallest = [stats.wilcoxon(np.arange(1.0, k + 1)).pvalue for k in (n - 1, n)]
    assert 2 * smallest[1] < 0.05 <= 2 * smallest[0]
    assert intervals.seeds_needed(100.0, tests=2) == n


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,230"), (-0.5, "−0.5"), (math.inf, "∞"), (math.nan, "–"), (1.5e7, "1.5e+07")]
)
def test_numbers_for_people(value: float, text: str) -> None:
    assert intervals.number(value) == text


@pytest.mark.slow
def test_holm_is_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(0).random((3, 7)) ** 3
    assert intervals.holm(p)[1] == pytest.approx(multipletests(p[1], method="holm")[1])
