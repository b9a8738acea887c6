"""Critical learning rates: how much faster an arm can go before it diverges, in doublings (log₂)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.intervals import Interval, mean_t
from twinrl.errors import InputError

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


def margin(rates: Sequence[Critical], arm: str, base: str) -> Interval:
    """Mean over common seeds of log₂(critical rate of ``arm``) − log₂(that of ``base``), with Student's interval.

    Raises:
        InputError: no seed has both brackets.
    """
    logs = {(c.arm, c.seed): c.log2 for c in rates if c.bracketed}
    seeds = [c.seed for c in rates if c.arm == arm and {(arm, c.seed), (base, c.seed)} <= set(logs)]
    if not seeds:
        raise InputError(
            f"no seed has critical learning rates of both {arm} and {base}", fix="widen margin.low and margin.high"
        )
    return mean_t(np.array([logs[arm, seed] - logs[base, seed] for seed in seeds]))
