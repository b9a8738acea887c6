"""Logistic regression with Firth's penalty: yes/no outcomes in which a factor may decide everything.

Where all runs of a level diverge, the likelihood has no maximum. Firth (1993) maximises
``ℓ(β) + ½·log|XᵀWX|``, W = diag p(1−p), instead; Heinze and Schemper (2002) test and bound coefficients by its
profile. The modified score is ``Xᵀ(y − p + h·(½ − p))``, h the diagonal of the hat matrix.

firthmodels (0.8) has the same coefficients and single tests, but no test of several coefficients at once, which a
factor of three levels needs; on separated tables some of its profile bounds do not converge.
"""

import math
from dataclasses import dataclass

import numpy as np

ITERATIONS = 50
TOLERANCE = 1e-7
LARGEST_STEP = 4.0
WIDEST_ODDS = 15.0  # |log odds ratio| beyond which nothing is told apart from infinity


@dataclass(frozen=True)
class FirthFit:
    """Coefficients (k,) and the penalised log-likelihood there."""

    beta: np.ndarray
    value: float


def _state(x: np.ndarray, y: np.ndarray, beta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Penalised log-likelihood, modified score (k,) and information (k, k) at ``beta``."""
    p = 1 / (1 + np.exp(-np.clip(x @ beta, -30, 30)))
    w = p * (1 - p)
    information = (x * w[:, None]).T @ x
    hat = ((x @ np.linalg.inv(information)) * x).sum(1) * w
    likelihood = float(np.log(np.where(y > 0, p, 1 - p)).sum())
    value = likelihood + 0.5 * float(np.linalg.slogdet(information)[1])
    return value, x.T @ (y - p + hat * (0.5 - p)), information


def fit(x: np.ndarray, y: np.ndarray, fixed: dict[int, float] | None = None) -> FirthFit:
    """Maximum of the penalised likelihood, by Newton's method with halved steps.

    Arguments:
        x: (n, k) design of full rank, with a column of ones. y: (n,) zeros and ones.
        fixed: coefficients held at a value, by column; the penalty stays that of the whole model.
    """
    fixed = fixed or {}
    beta = np.zeros(x.shape[1])
    beta[list(fixed)] = list(fixed.values())
    free = [k for k in range(x.shape[1]) if k not in fixed]
    value, score, information = _state(x, y, beta)
    for _ in range(ITERATIONS):
        if not free or np.abs(score[free]).max() < TOLERANCE:
            break
        step = np.zeros_like(beta)
        step[free] = np.linalg.solve(information[np.ix_(free, free)], score[free])
        step *= min(1.0, LARGEST_STEP / np.abs(step).max())
        for _ in range(25):
            trial = _state(x, y, beta + step)
            if trial[0] >= value - 1e-12:
                break
            step /= 2
        beta, (value, score, information) = beta + step, trial
    return FirthFit(beta, value)


def p_value(x: np.ndarray, y: np.ndarray, columns: list[int], full: FirthFit | None = None) -> float:
    """p-value that the coefficients of ``columns`` are all 0, by the penalised likelihood ratio."""
    from scipy import stats

    full = full or fit(x, y)
    restricted = fit(x, y, dict.fromkeys(columns, 0.0))
    return float(stats.chi2.sf(max(0.0, 2 * (full.value - restricted.value)), len(columns)))


def profile_interval(x: np.ndarray, y: np.ndarray, column: int, full: FirthFit, level: float) -> tuple[float, float]:
    """The values of one coefficient that the penalised likelihood ratio does not reject; ±∞ beyond ±15."""
    from scipy import optimize, stats

    drop = float(stats.chi2.ppf(level, 1)) / 2

    def excess(value: float) -> float:
        return full.value - fit(x, y, {column: value}).value - drop

    def end(side: float) -> float:
        """Searched outward by steps that double, since a fit far out takes many iterations."""
        inner, step = float(full.beta[column]), side
        while True:
            outer = min(max(inner + step, -WIDEST_ODDS), WIDEST_ODDS)
            if excess(outer) > 0:
                return float(optimize.brentq(excess, inner, outer, xtol=1e-4))
            if abs(outer) == WIDEST_ODDS:
                return side * math.inf
            inner, step = outer, 2 * step

    return end(-1.0), end(1.0)
