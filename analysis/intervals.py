"""Intervals that cover at few seeds: of an interquartile mean, a share, a chance to be better.

Which interval for the interquartile mean? Coverage of nominal 95 % (Monte-Carlo error 0.3 %, ``python -m
analysis.coverage``), worst of four laws: normal, log-normal (σ = 0.75), Student t with 3 degrees of freedom, and
normal with one run in ten collapsed:

| n | percentile | BCa | bootstrap-t | trimmed t, Student | **calibrated t** |
|--:|--:|--:|--:|--:|--:|
| 5 | 0.882 | 0.880 | 0.977, width 10⁸ | 0.914 | 0.939 |
| 8 | 0.923 | 0.923 | 0.950 | 0.909 | 0.939 |
| 10 | 0.930 | 0.929 | 0.943 | 0.932 | 0.945 |
| 20 | 0.935 | 0.936 | 0.931 | 0.935 | 0.949 |

The trimmed t of Tukey and McLaughlin (1963) is short of its level because Student's law is only an approximation
to that of a trimmed mean; with the quantile simulated for normal data instead it is exact there and good
elsewhere. It also takes infinite values (diverged runs) as long as the trimming removes them, which no bootstrap does.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
CALIBRATED_UP_TO = 60  # above it Student's quantile is right to 0.3 % of coverage
CALIBRATION_DRAWS = 100_000
EDGE = 1e-9  # at a share of exactly 0 or 1 the variance is 0, which would be a root of its own


@dataclass(frozen=True)
class Interval:
    """An estimate and its interval.

    Attributes:
        estimate, low, high: in the units of the data; infinite where the data leave that side open.
        n: observations (seeds) behind it.
        method: what was computed, in words.
        level: nominal coverage.
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str
    level: float = LEVEL

    def __str__(self) -> str:
        """With its bounds; of runs that fell there are none."""
        bounds = "" if math.isinf(self.estimate) else f" [{number(self.low)}, {number(self.high)}]"
        return f"{number(self.estimate)}{bounds}"


def number(value: float, digits: int = 3) -> str:
    """A number for people: a few significant digits (1,230 and not 1.23e3 below a million), ∞, – for missing."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    rounded = float(f"{value:.{digits}g}")
    if 10**digits <= abs(rounded) < 1e6:
        return f"{rounded:,.0f}".replace("-", "−")
    return f"{rounded:.{digits}g}".replace("-", "−")


# --- interquartile mean -----------------------------------------------------------------------------------


def trimmed(n: int) -> int:
    """How many values the interquartile mean leaves out at each end: ``⌊n/4⌋``, as scipy and rliable do."""
    return n // 4


def trimmed_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interquartile mean and its standard error along the last axis, of (…, n) values.

    The error is ``s_w·√n/h``: s_w the standard deviation of the values winsorised at the trimming points, h the
    number of values kept (Tukey and McLaughlin 1963).
    """
    ordered = np.sort(values, axis=-1)
    n = ordered.shape[-1]
    g = trimmed(n)
    kept = ordered[..., g : n - g]
    if not np.isfinite(kept).all():
        with np.errstate(invalid="ignore"):  # inf − inf of a band with both is a NaN on purpose
            return kept.mean(-1), np.full(kept.shape[:-1], math.inf)
    winsorised = np.clip(ordered, kept[..., :1], kept[..., -1:])
    return kept.mean(-1), winsorised.std(-1, ddof=1) * math.sqrt(n) / kept.shape[-1]


@functools.cache
def critical(n: int, level: float = LEVEL) -> float:
    """The quantile of ``|interquartile mean|/error`` for n normal values: exact coverage for normal data.

    Simulated with fixed random numbers (error of the coverage 0.07 %); Student's quantile where nothing is
    trimmed or n is large.
    """
    from scipy import stats

    if trimmed(n) == 0 or n > CALIBRATED_UP_TO:
        return float(stats.t.ppf((1 + level) / 2, n - 2 * trimmed(n) - 1))
    draws = np.random.default_rng(n).standard_normal((CALIBRATION_DRAWS, n))
    center, error = trimmed_moments(draws)
    return float(np.quantile(np.abs(center / error), level))


def iqm(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Interquartile mean with the calibrated trimmed-t interval.

    Arguments:
        values: one value a seed; a diverged run is ``±inf`` (the worst), NaN is refused.

    Raises:
        ValueError: NaN among the values, or none.

    *When to use*: to say where an arm lies. One value has no interval (it is infinitely wide); if more runs
    diverged than the trimming removes, the estimate is infinite.
    """
    array = np.asarray(values, dtype=float)
    if len(array) == 0 or np.isnan(array).any():
        raise ValueError("the interquartile mean needs at least one value and no NaN")
    n = len(array)
    if n == 1:
        return Interval(float(array[0]), -math.inf, math.inf, 1, "one value: no interval", level)
    center, error = trimmed_moments(array)
    half = critical(n, level) * float(error)
    if not math.isfinite(half):
        return Interval(float(center), -math.inf, math.inf, n, "too many diverged for an interval", level)
    return Interval(float(center), float(center) - half, float(center) + half, n, "calibrated trimmed t", level)


def mean_t(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Interval:
    """Mean with Student's interval, e.g. of differences paired by seed; infinite where a value is."""
    from scipy import stats

    array = np.asarray(values, dtype=float)
    n, mean = len(array), float(array.mean())
    if n == 1 or not np.isfinite(array).all():
        return Interval(mean, -math.inf, math.inf, n, "no interval", level)
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Interval(mean, mean - half, mean + half, n, "Student t", level)


# --- shares -----------------------------------------------------------------------------------------------


def clopper_pearson(k: int, n: int, level: float = LEVEL) -> Interval:
    """Exact interval of a share, k of n. Never covers too little; for k = 0 its upper end is the bound to state.

    *When to use*: "0 of 10 diverged" means "less than 31 % do", not "it does not diverge".
    """
    from scipy import stats

    found = stats.binomtest(k, n).proportion_ci(level, "exact")
    return Interval(k / n, float(found.low), float(found.high), n, "Clopper–Pearson", level)


def mid_p(wins: float, n: int, level: float = LEVEL) -> Interval:
    """Mid-P interval of a share: as Clopper–Pearson, but half of the observed outcome's probability counts.

    Covers 95 % on average over the share, where Clopper–Pearson covers 97–100 % at such n.

    Arguments:
        wins: successes; ties count one half, which the interpolated binomial law (incomplete beta) takes.
    """
    from scipy import optimize

    tail = (1 - level) / 2

    def below(share: float) -> float:  # P(X < wins) + ½P(X = wins)
        return 0.5 * (_at_most(wins - 1, n, share) + _at_most(wins, n, share))

    low = 0.0 if wins <= 0 else optimize.brentq(lambda p: 1 - below(p) - tail, 0, 1)
    high = 1.0 if wins >= n else optimize.brentq(lambda p: below(p) - tail, 0, 1)
    return Interval(wins / n, float(low), float(high), n, "mid-P", level)


def _at_most(k: float, n: int, share: float) -> float:
    """P(X ≤ k) of a binomial law, interpolated smoothly between whole k."""
    from scipy import special

    if k < 0:
        return 0.0
    return 1.0 if k >= n else float(special.betainc(n - k, k + 1, 1 - share))


# --- chance to be better ----------------------------------------------------------------------------------


def superiority(better: np.ndarray) -> np.ndarray:
    """Mean of a (…, n, m) array of wins 1, ties ½, losses 0 over all pairs."""
    return better.mean((-2, -1))


def wins(candidate: np.ndarray, base: np.ndarray) -> np.ndarray:
    """1 where candidate > base, ½ where equal, 0 elsewhere; broadcasts."""
    return 0.5 * ((candidate > base).astype(float) + (candidate >= base))


def improvement(candidate: np.ndarray, base: np.ndarray, level: float = LEVEL) -> Interval:
    """P(a run of ``candidate`` exceeds one of ``base``) over all pairs; rliable's probability of improvement.

    Interval: Newcombe (2006), method 5: the set of θ with ``|θ̂ − θ| ≤ z·√V(θ)``,
    ``V = θ(1−θ)/(nm)·[1 + N·((1−θ)/(2−θ) + θ/(1+θ))]``, ``N = (n+m)/2 − 1``. At n = m = 10 it covers
    94.5–97 % where the Wald interval falls to 51 % as θ nears 1.
    """
    from scipy import optimize, stats

    n, m = len(candidate), len(base)
    theta = float(superiority(wins(candidate[:, None], base[None, :])))
    z = float(stats.norm.ppf((1 + level) / 2))

    def excess(p: float) -> float:
        return abs(theta - p) - z * math.sqrt(newcombe_variance(p, n, m))

    low = 0.0 if theta <= 0 or excess(0.0) <= 0 else optimize.brentq(excess, 0.0, min(theta, 1 - EDGE))
    high = 1.0 if theta >= 1 or excess(1.0) <= 0 else optimize.brentq(excess, max(theta, EDGE), 1.0)
    return Interval(theta, float(low), float(high), min(n, m), "all pairs, Newcombe", level)


def newcombe_variance(theta: float, n: int, m: int) -> float:
    """Variance of the all-pairs estimate of θ under Newcombe's method 5."""
    spread = 1 + ((n + m) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
    return theta * (1 - theta) * spread / (n * m)


# --- several tests, how many seeds ------------------------------------------------------------------------


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's corrected p-values along the last axis of (…, k); as statsmodels' ``multipletests``, 1000 times faster.

    That one collects garbage at every call, 0.2 s in a process with pandas.
    """
    array = np.asarray(p, dtype=float)
    order = np.argsort(array, axis=-1)
    scaled = np.take_along_axis(array, order, -1) * np.arange(array.shape[-1], 0, -1)
    corrected = np.minimum(np.maximum.accumulate(scaled, axis=-1), 1.0)
    return np.take_along_axis(corrected, np.argsort(order, axis=-1), -1)


def gated(whole: float | np.ndarray, parts: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corrected p-values of "there is a difference at all" and of what it may be due to, 5 % for all together.

    By closed testing (Marcus, Peritz and Gabriel 1976): that there is no difference is rejected by its own test or by
    the least of the others, each at half the level; a part only where that is, by Holm's correction over the parts.

    Arguments:
        whole: p of no difference at all, which implies that none is due to any part; (…) in arrays.
        parts: (…, k) p of the parts, one or more.
    """
    corrected = holm(np.asarray(parts, dtype=float))
    gate = np.asarray(np.minimum(1.0, 2 * np.minimum(whole, corrected.min(-1))))
    return gate, np.maximum(corrected, gate[..., None])


def seeds_needed(effect: float, tests: int = 1, power: float = 0.8) -> int:
    """Seeds an arm must have for Wilcoxon's signed ranks to find a difference of ``effect`` standard deviations.

    The number for Student's paired test over Wilcoxon's efficiency against it, 3/π; never so few that the
    smallest possible p-value misses the level.

    Arguments:
        effect: true mean of the differences between paired runs over their standard deviation.
        tests: comparisons made, at 5 % family-wise (Bonferroni). power: chance to find it.
    """
    from bisect import bisect_left

    from statsmodels.stats.power import TTestPower

    size, alpha = min(abs(effect), 5.0), (1 - LEVEL) / tests  # larger ones need no more than the fewest seeds

    def finds(n: int) -> bool:
        return TTestPower().power(size, n, alpha) >= power

    high = 2
    while not finds(high):  # from below: far above, the non-central t law is NaN
        high *= 2
    found = bisect_left(range(high), True, lo=high // 2, key=finds)
    return max(math.ceil(found * math.pi / 3), fewest_seeds(tests))


def fewest_seeds(tests: int) -> int:
    """Paired seeds below which signed ranks cannot find anything: ``2·2⁻ⁿ·tests < 0.05`` needs n of them."""
    n = 1
    while 2 ** (1 - n) * tests >= 1 - LEVEL:
        n += 1
    return n
