"""Critical learning rates: how much faster an arm can go before it diverges, in doublings (log₂).

They come from trials at several learning rates (a factor of the study), or from the brackets of
``twinrl ablate margin``: per arm and seed a rate that stayed healthy and one that did not. What is between them is
not known. Where the seeds differ by more than the bracket's width w, the midpoints' errors are independent of each
other and already part of their spread s; where all seeds fall into one bracket, they share one error, uniform in it.
The interval of a mean over n seeds takes both:

    ±√( (t·s/√n)² + (z·b)² ),   b² = Σ_arms w²/12 · exp(−4π²σ²/w²),   σ² = s_arm² − w²/12

with Sheppard's correction for σ and, for what is left of the shared error, the first harmonic of the rounding error of
a normal variable of deviation σ (Widrow, Kollár and Liu 1996).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.intervals import Interval, mean_t
from twinrl.config.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Critical:
    """The critical learning rate of one arm and seed.

    Attributes:
        arm, seed: which.
        healthy: largest rate below every divergence that survived (0 if none did).
        broken: smallest rate that diverged (infinite if none did).
    """

    arm: str
    seed: int
    healthy: float
    broken: float

    @property
    def bracketed(self) -> bool:
        """Whether both sides are known."""
        return self.healthy > 0 and math.isfinite(self.broken)

    @property
    def width(self) -> float:
        """log₂ of broken over healthy; infinite where a side is open."""
        return math.log2(self.broken) - math.log2(self.healthy) if self.bracketed else math.inf

    @property
    def log2(self) -> float:
        """log₂ of the geometric middle of the bracket; NaN where a side is open."""
        return 0.5 * (math.log2(self.healthy) + math.log2(self.broken)) if self.bracketed else math.nan


def critical_rates(trials: "pd.DataFrame", lr: str = "optim.lr") -> list[Critical]:
    """The bracket of every arm and seed, from trials at several learning rates.

    Arguments:
        trials: columns ``arm``, ``seed``, ``diverged`` and ``lr`` (numbers).

    Raises:
        InputError: a column is missing.
    """
    if missing := [name for name in ("arm", "seed", "diverged", lr) if name not in trials.columns]:
        raise InputError(f"no column {missing[0]} to find critical learning rates by", expected=f"trials with {lr}")
    found = []
    for (arm, seed), group in trials.groupby(["arm", "seed"], sort=False):
        rates = group[lr].astype(float).to_numpy()
        diverged = group["diverged"].to_numpy(bool)
        broken = float(rates[diverged].min(initial=math.inf))
        healthy = float(rates[~diverged & (rates < broken)].max(initial=0.0))
        found.append(Critical(str(arm), int(seed), healthy, broken))
    return found


def from_brackets(brackets: Sequence[Mapping[str, Any]]) -> list[Critical]:
    """Brackets of ``twinrl ablate margin``: mappings with ``arm``, ``seed``, ``healthy`` and ``diverged`` (or None).

    Raises:
        InputError: one of these is missing.
    """
    if missing := [key for b in brackets for key in ("arm", "seed", "healthy", "diverged") if key not in b]:
        raise InputError(f"a bracket of the critical learning rate lacks {missing[0]}")
    return [
        Critical(str(b["arm"]), int(b["seed"]), float(b["healthy"] or 0.0), float(b["diverged"] or math.inf))
        for b in brackets
        if b["healthy"] or b["diverged"]
    ]


def critical_rate(rates: Sequence[Critical], arm: str) -> Interval:
    """Mean over seeds of log₂ of the critical rate of ``arm``.

    Raises:
        InputError: no seed has a bracket.
    """
    mine = [rate for rate in rates if rate.arm == arm and rate.bracketed]
    if not mine:
        raise InputError(f"no seed has a critical learning rate of {arm}", fix="widen margin.low and margin.high")
    return _widened(np.array([rate.log2 for rate in mine]), shared_error([mine]))


def margin(rates: Sequence[Critical], arm: str, base: str) -> Interval:
    """Mean over common seeds of log₂(critical rate of ``arm``) − log₂(that of ``base``).

    Raises:
        InputError: no seed has both brackets.
    """
    found = {(c.arm, c.seed): c for c in rates if c.bracketed}
    seeds = [c.seed for c in rates if c.arm == arm and {(arm, c.seed), (base, c.seed)} <= set(found)]
    if not seeds:
        raise InputError(
            f"no seed has critical learning rates of both {arm} and {base}", fix="widen margin.low and margin.high"
        )
    mine, theirs = ([found[name, seed] for seed in seeds] for name in (arm, base))
    differences = np.array([a.log2 - b.log2 for a, b in zip(mine, theirs, strict=True)])
    return _widened(differences, shared_error([mine, theirs]))


def shared_error(groups: Sequence[Sequence[Critical]]) -> float:
    """Standard deviation, in doublings, of the error that the seeds of each group share (``b`` above)."""
    total = 0.0
    for rates in groups:
        square = float(np.mean([rate.width**2 for rate in rates]))
        spread = float(np.var([rate.log2 for rate in rates], ddof=1)) if len(rates) > 1 else 0.0
        total += square / 12 * math.exp(-4 * math.pi**2 * max(0.0, spread - square / 12) / square)
    return math.sqrt(total)


def _widened(values: np.ndarray, shared: float) -> Interval:
    """Student's interval of a mean, widened by an error of standard deviation ``shared`` that is in all values."""
    from scipy import stats

    plain = mean_t(values)
    half = math.hypot(plain.high - plain.estimate, float(stats.norm.ppf((1 + plain.level) / 2)) * shared)
    ends = plain.estimate - half, plain.estimate + half
    return Interval(plain.estimate, *ends, plain.n, "Student t and the brackets' width", plain.level)
