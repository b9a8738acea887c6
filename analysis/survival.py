"""Time to divergence: curves, log-rank, hazard ratios and restricted means that survive arms without events.

An arm in which nothing (or everything) diverges is a good result, and it breaks the usual tools: the partial
likelihood of Cox grows for ever and its Wald interval is (0, ∞); Greenwood's variance is 0. Here

- the **hazard ratio** maximises Firth's penalised likelihood ``ℓ(β) + ½·log I(β)`` (Heinze and Schemper 2001) with
  Efron's treatment of ties, and its interval is that of the penalised likelihood ratio (firthmodels 0.8 agrees where
  no times are tied; it treats ties as Breslow did, which moves log ratios by tenths where runs are judged every so
  many steps);
- the **restricted mean** ``∫₀^τ S(t) dt`` has an interval from random Dirichlet weights on the runs, with half a run
  that diverges at once and half a run that never does added. For yes/no data this is Jeffreys' interval of a
  share. The two half runs lie as far out as can be: where times are spread over the run they make the interval
  too wide, by coverage of the order 1/n. So its credible level is ``95 % − 0.1/n``, chosen by simulation: it
  covers 94–97 % of exponential and Weibull studies at n = 10–20 (``benchmarks/results/coverage.md``), where
  Greenwood's covers 75–90 %. What is left above 95 % is where one or two of ten runs diverge: an interval that missed
  from below would miss whenever nothing diverges, which is too often;
- in a **difference** of two the arms know something of each other: the half run that diverges does so at a step that
  is drawn anew for every weighting, from the steps at which runs of either arm diverged and the very first one.
  Where it always diverged at once, as in a single arm, two arms of ten runs with two divergences each had 99 %. Both
  arms' errors add up instead of being cut off at one end, so its credible level is ``95 % + 0.05/n``.

Curves and log-rank are lifelines'.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.intervals import LEVEL, Interval, clopper_pearson

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS = 4000
EXCESS = 0.1  # what the added runs widen an arm's interval by, in coverage times n
SHORTFALL = 0.05  # what an interval of a difference lacks, in the same unit
WIDEST_HAZARD = 12.0  # |log hazard ratio| beyond which nothing is told apart from infinity


@dataclass(frozen=True)
class Times:
    """Time to divergence of the runs of one arm.

    Attributes:
        time: (n,) steps to divergence, or steps watched where the run did not diverge; positive.
        event: (n,) whether it diverged.
    """

    time: np.ndarray
    event: np.ndarray

    def __post_init__(self) -> None:
        if len(self.time) == 0 or len(self.time) != len(self.event) or not (self.time > 0).all():
            raise ValueError("Times needs positive times and as many events, at least one")

    @property
    def n(self) -> int:
        """Number of runs."""
        return len(self.time)

    @property
    def events(self) -> int:
        """Number of runs that diverged."""
        return int(self.event.sum())

    @property
    def share(self) -> Interval:
        """Share of runs that diverged, with its exact interval."""
        return clopper_pearson(self.events, self.n)


def times_of(trials: "pd.DataFrame") -> Times:
    """The times in a frame of trials (columns ``time`` and ``diverged``)."""
    return Times(trials["time"].to_numpy(float), trials["diverged"].to_numpy(bool))


# --- lifelines --------------------------------------------------------------------------------------------


def kaplan_meier(times: Times, label: str = "survival") -> Any:
    """lifelines' fitted ``KaplanMeierFitter`` (curve and log-log interval)."""
    from lifelines import KaplanMeierFitter

    return KaplanMeierFitter(alpha=1 - LEVEL).fit(times.time, times.event, label=label)


def log_rank(arms: Mapping[str, Times]) -> float:
    """p-value that all arms have one law of time to divergence; NaN without any event."""
    from lifelines.statistics import multivariate_logrank_test

    if len(arms) < 2 or not any(times.events for times in arms.values()):
        return math.nan
    groups = np.concatenate([[name] * times.n for name, times in arms.items()])
    time = np.concatenate([times.time for times in arms.values()])
    event = np.concatenate([times.event for times in arms.values()])
    return float(multivariate_logrank_test(time, groups, event).p_value)


# --- hazard ratio -----------------------------------------------------------------------------------------


def efron_terms(arm: Times, base: Times) -> tuple[np.ndarray, np.ndarray, int]:
    """The partial likelihood of two arms as ``ℓ(β) = d·β − Σ log(a + b·e^β)``.

    Returns:
        (E,) a and (E,) b, the base's and the arm's runs at risk at each event, and d, the arm's events. Of k
        tied events the l-th sees the risk set less the share l/k of the tied ones (Efron 1977).
    """
    a, b = [], []
    for moment in np.unique(np.concatenate([arm.time[arm.event], base.time[base.event]])):
        tied_arm = int((arm.event & (arm.time == moment)).sum())
        tied_base = int((base.event & (base.time == moment)).sum())
        removed = np.arange(tied_arm + tied_base) / (tied_arm + tied_base)
        a.append((base.time >= moment).sum() - removed * tied_base)
        b.append((arm.time >= moment).sum() - removed * tied_arm)
    if not a:
        return np.zeros(0), np.zeros(0), 0
    return np.concatenate(a), np.concatenate(b), arm.events


def penalised(beta: np.ndarray, a: np.ndarray, b: np.ndarray, d: int) -> np.ndarray:
    """Firth's ``ℓ(β) + ½·log I(β)`` at each of (K,) β, with ``I = Σ p(1−p)``, ``p = b·e^β/(a + b·e^β)``."""
    risk = b * np.exp(beta[:, None])
    p = risk / (a + risk)
    information = (p * (1 - p)).sum(-1)
    with np.errstate(divide="ignore"):
        return d * beta - np.log(a + risk).sum(-1) + 0.5 * np.log(information)


def hazard_ratio(arm: Times, base: Times, level: float = LEVEL) -> Interval:
    """Hazard of diverging in ``arm`` over that in ``base``; finite and with an interval for every outcome.

    Without any event in either arm there is nothing to estimate: estimate NaN, interval (0, ∞). *When to use*:
    beside the curves; where they cross, one ratio does not describe them, and the restricted mean does.
    """
    from scipy import optimize, stats

    a, b, d = efron_terms(arm, base)
    n = min(arm.n, base.n)
    if not ((a > 0) & (b > 0)).any():
        return Interval(math.nan, 0.0, math.inf, n, "no event while both arms were at risk", level)

    def objective(beta: float) -> float:
        return float(penalised(np.array([beta]), a, b, d)[0])

    best = optimize.minimize_scalar(lambda x: -objective(x), bounds=(-WIDEST_HAZARD, WIDEST_HAZARD), method="bounded").x
    drop = float(stats.chi2.ppf(level, 1)) / 2

    def excess(beta: float) -> float:
        return objective(best) - objective(beta) - drop

    low = optimize.brentq(excess, -WIDEST_HAZARD, best) if excess(-WIDEST_HAZARD) > 0 else -math.inf
    high = optimize.brentq(excess, best, WIDEST_HAZARD) if excess(WIDEST_HAZARD) > 0 else math.inf
    return Interval(math.exp(best), math.exp(low), math.exp(high), n, "Firth, penalised likelihood ratio", level)


# --- restricted mean --------------------------------------------------------------------------------------


def weighted_restricted_mean(times: Times, tau: float, weights: np.ndarray) -> np.ndarray:
    """``∫₀^τ S(t) dt`` of the Kaplan–Meier curve with (B, n) positive weights on the runs; (B,)."""
    order = np.lexsort((~times.event, times.time))  # at one time events come before censorings
    time, event, weights = times.time[order], times.event[order], weights[:, order]
    at_risk = np.maximum(np.cumsum(weights[:, ::-1], axis=1)[:, ::-1], np.finfo(float).tiny)
    survival = np.cumprod(1 - np.where(event, weights / at_risk, 0.0), axis=1)
    edges = np.minimum(np.concatenate([[0.0], time, [max(tau, time[-1])]]), tau)
    before = np.concatenate([np.ones((len(weights), 1)), survival], axis=1)
    return (before * np.diff(edges)).sum(1)


def _draws(times: Times, tau: float, seed: int, diverges_at: Sequence[float] = (0.0,)) -> np.ndarray:
    """Restricted means under random weights, with half a run that never diverges and half a run that does.

    Arguments:
        diverges_at: steps of which one is drawn for each weighting.
    """
    m = len(diverges_at)
    steps = np.maximum(np.asarray(diverges_at, float), 1e-9 * tau)
    ends = Times(np.concatenate([times.time, steps, [tau]]), np.concatenate([times.event, np.full(m, True), [False]]))
    weights = _dirichlet(times.n, seed)
    drawn = np.zeros((WEIGHTS, m))
    drawn[np.arange(WEIGHTS), np.random.default_rng([seed, m]).integers(0, m, WEIGHTS)] = weights[:, -2]
    return weighted_restricted_mean(ends, tau, np.concatenate([weights[:, :-2], drawn, weights[:, -1:]], axis=1))


@functools.lru_cache(maxsize=16)
def _dirichlet(n: int, seed: int) -> np.ndarray:
    """(WEIGHTS, n + 2) weights that sum to 1, the same ones for every arm of n runs."""
    return np.random.default_rng(seed).dirichlet(np.concatenate([np.ones(n), [0.5, 0.5]]), WEIGHTS)


def _tails(credible: float) -> tuple[float, float]:
    """Shares of the draws below the ends of an interval of this credible level."""
    return (1 - credible) / 2, (1 + credible) / 2


def restricted_mean(times: Times, tau: float, level: float = LEVEL) -> Interval:
    """Mean time without divergence within the first ``tau`` steps.

    *When to use*: the effect size to report when hazards are not proportional; in steps, so it can be read.
    """
    estimate = float(weighted_restricted_mean(times, tau, np.ones((1, times.n)))[0])
    low, high = np.quantile(_draws(times, tau, seed=1), _tails(level - EXCESS / times.n))
    low, high = min(float(low), estimate), max(float(high), estimate)  # the end of the watch, if nothing diverged
    return Interval(estimate, low, high, times.n, "Dirichlet weights, half a run at each end", level)


def restricted_mean_difference(arm: Times, base: Times, tau: float, level: float = LEVEL) -> Interval:
    """Restricted mean of ``arm`` minus that of ``base``, in steps; the arms' runs count as independent."""
    ones = [np.ones((1, times.n)) for times in (arm, base)]
    estimate = weighted_restricted_mean(arm, tau, ones[0]) - weighted_restricted_mean(base, tau, ones[1])
    at = [0.0, *arm.time[arm.event], *base.time[base.event]]
    n = min(arm.n, base.n)
    credible = min(level + SHORTFALL / n, (1 + level) / 2)
    low, high = np.quantile(_draws(arm, tau, 1, at) - _draws(base, tau, 2, at), _tails(credible))
    return Interval(
        float(estimate[0]), float(low), float(high), n, "Dirichlet weights, half a run where runs end", level
    )
