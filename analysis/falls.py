"""Which runs fell, and what it takes: a test over the arms paired by seeds, and falls that need two factors at once.

*Do the arms differ?* Runs of one seed share start, data and noise, so without any difference between arms what befell
a seed in one of them could as well have befallen it in another. Every run has its log-rank score, 1 for a fall less the
falls expected of it by its time (Peto and Peto 1972). The squares of the arms' sums are compared with what exchanges
within seeds give, as Cochran's Q is; over all runs where no seed is in two arms.

*Only together.* Where runs fall only if two factors meet, a logistic regression without an interaction fits perfectly
and names each factor. So the cell of two levels is compared with the rest of its row and with the rest of its column
(Fisher's exact test); both must differ, which is an intersection–union test and has the level of one (Berger 1982). It
is made for every cell of a pair, times their number (Bonferroni).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from analysis import effects, intervals
from analysis.effects import ARMS, Effect
from analysis.intervals import LEVEL, Interval

if TYPE_CHECKING:
    import pandas as pd

EXCHANGES = 5000
"""Drawn for the test over arms: the smallest p is 0.0002."""
AT_ONCE = 500
"""Exchanges that are held in memory together."""
FEW = 4
"""What two levels do together is theirs alone where the share elsewhere is at most one in so many of theirs."""


@dataclass(frozen=True)
class Together:
    """Two levels that matter where they meet.

    Attributes:
        levels: factor → level.
        fell, runs: with both. other_fell, other_runs: of all others.
        p: of this pair of factors, all cells together. p_holm: corrected for what else was tested.
        seeds: distinct ones behind it.
    """

    levels: Mapping[str, str]
    fell: int
    runs: int
    other_fell: int
    other_runs: int
    p: float
    p_holm: float
    seeds: int

    @property
    def factors(self) -> frozenset[str]:
        """The two factors."""
        return frozenset(self.levels)

    @property
    def named(self) -> bool:
        """Whether it is found at 5 % family-wise, not in one seed alone, and nearly all that happens."""
        mine, others = (self.fell, self.other_fell) if self.falls else (self.whole, self.other_whole)
        nearly_all = FEW * others * self.runs <= mine * self.other_runs
        return self.p_holm < 1 - LEVEL and self.seeds > 1 and nearly_all

    @property
    def whole(self) -> int:
        """Runs with both that did not fall."""
        return self.runs - self.fell

    @property
    def other_whole(self) -> int:
        """Others that did not fall."""
        return self.other_runs - self.other_fell

    @property
    def falls(self) -> bool:
        """Whether the two make runs fall together; else they keep runs whole together."""
        return self.fell * self.other_runs > self.other_fell * self.runs


@dataclass(frozen=True)
class FallEffects:
    """What decides whether runs fall; empty where none did.

    Attributes:
        arms: the test over all arms; None where nothing fell. odds: of the factors, log odds; none where all runs fell.
        together: the best cell of each pair of factors.
    """

    arms: Effect | None = None
    odds: Sequence[Effect] = ()
    together: Sequence[Together] = ()

    @property
    def pairs(self) -> list[Together]:
        """Those found."""
        return [pair for pair in self.together if pair.named]

    @property
    def alone(self) -> list[Effect]:
        """The odds that are found."""
        return [effect for effect in self.single if effect.named]

    @property
    def single(self) -> list[Effect]:
        """The odds of factors that are not found to act where they meet another: those have none of their own."""
        met = frozenset[str]().union(*(pair.factors for pair in self.pairs))
        return [effect for effect in self.odds if effect.factor not in met]


def fall_effects(
    trials: "pd.DataFrame",
    factors: Sequence[str],
    interactions: Sequence[tuple[str, str]] = (),
    reference: dict[str, object] | None = None,
) -> FallEffects:
    """What decides whether runs fall (``diverged``, ``time``): arms, factors and pairs of factors as one family."""
    fell, seeds = trials["diverged"].to_numpy(bool), trials["seed"].nunique()
    if not fell.any():
        return FallEffects()
    overall = arms_p(trials)
    nothing = Interval(np.nan, -np.inf, np.inf, len(trials), "exchanges within seeds")
    whole = Effect(ARMS, "", nothing, overall, overall, "log odds", seeds)
    if fell.all() or not factors:
        return FallEffects(whole)
    odds = effects.odds_effects(trials, factors, "diverged", interactions, reference)
    if len(factors) == 1:  # the factor's own test is the same question
        return FallEffects(whole, odds)
    together = [best for pair in combinations(factors, 2) if (best := _best_cell(trials, pair)) is not None]
    p = {effect.factor: effect.p for effect in odds}
    gate, parts = intervals.gated(overall, [*p.values(), *(pair.p for pair in together)])
    p_holm = dict(zip(p, parts.tolist(), strict=False))
    pairs = [replace(pair, p_holm=float(value)) for pair, value in zip(together, parts[len(p) :], strict=True)]
    corrected = [replace(effect, p_holm=p_holm[effect.factor]) for effect in odds]
    return FallEffects(replace(whole, p_holm=float(gate)), corrected, pairs)


# --- over arms ----------------------------------------------------------------------------------------------


def arms_p(trials: "pd.DataFrame") -> float:
    """p-value that all arms fall alike, by exchanges within seeds; the same numbers give the same p."""
    arm = np.unique(trials["arm"].to_numpy(str), return_inverse=True)[1]
    scores = log_rank_scores(trials["time"].to_numpy(float), trials["diverged"].to_numpy(bool))
    return exchanged(arm, trials["seed"].to_numpy(int), scores[None])[0]


def log_rank_scores(time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """(n,) 1 for an event, less the Nelson–Aalen estimate of all runs together at each one's time."""
    moments = np.unique(time[event])
    hazard = [float((event & (time == moment)).sum() / (time >= moment).sum()) for moment in moments]
    expected = np.concatenate([[0.0], np.cumsum(hazard)])
    return np.asarray(event - expected[np.searchsorted(moments, time, side="right")])


def exchanged(arm: np.ndarray, seed: np.ndarray, scores: np.ndarray, exchanges: int = EXCHANGES) -> list[float]:
    """p-values of several outcomes of one design.

    Arguments:
        arm, seed: (n,) whole numbers. scores: (k, n). exchanges: drawn.
    """
    sizes, of_seed = np.bincount(arm), np.unique(seed, return_inverse=True)[1]
    stratum = np.where(np.bincount(of_seed)[of_seed] > 1, of_seed, -1)  # seeds of one run are exchanged with each other
    order = np.argsort(stratum, kind="stable")
    rng, members = np.random.default_rng(0), np.eye(len(sizes))[arm]
    expected = scores.mean(1, keepdims=True) * sizes

    def unevenness(outcomes: np.ndarray) -> np.ndarray:
        """Of (k, m, n) outcomes: (k, m)."""
        return np.asarray(((outcomes @ members - expected[:, None]) ** 2 / sizes).sum(-1))

    seen, above = unevenness(scores[:, None]), np.zeros(len(scores))
    for begun in range(0, exchanges, AT_ONCE):
        lots = rng.random((min(AT_ONCE, exchanges - begun), len(arm)))
        source = np.empty(lots.shape, int)
        source[:, order] = np.argsort(2 * stratum + lots, axis=1)  # stratum by stratum, shuffled within each
        above += (unevenness(scores[:, source]) >= seen - 1e-9).sum(1)
    return ((1 + above) / (1 + exchanges)).tolist()


# --- two factors ------------------------------------------------------------------------------------------


def _best_cell(trials: "pd.DataFrame", pair: tuple[str, str]) -> Together | None:
    """The cell that stands out most of its row and its column; None where the two never vary apart."""
    fell = trials["diverged"].to_numpy(bool)
    first, second = (trials[name].astype(str).to_numpy() for name in pair)
    cells = list(_cells(first, second))
    if not cells:
        return None
    level, other = min(cells, key=lambda cell: _cell_p(first == cell[0], second == cell[1], fell))
    mine = (first == level) & (second == other)
    p = min(1.0, len(cells) * _cell_p(first == level, second == other, fell))
    return Together(
        dict(zip(pair, (level, other), strict=True)), int(fell[mine].sum()), int(mine.sum()), int(fell[~mine].sum()),
        int((~mine).sum()), p, p, trials["seed"].nunique(),
    )  # fmt: skip


def _cells(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[str, str]]:
    """The combinations of levels that were run, and whose row and column have others."""
    for level in dict.fromkeys(first):
        for other in dict.fromkeys(second):
            row, column = first == level, second == other
            if (row & column).any() and (row & ~column).any() and (column & ~row).any():
                yield level, other


def _cell_p(row: np.ndarray, column: np.ndarray, fell: np.ndarray) -> float:
    """The larger p of the two comparisons; 1 where they point in different directions."""
    from scipy import stats

    mine, found, directions = row & column, [], set()
    for rest in (row & ~column, column & ~row):
        table = [[int(fell[group].sum()), int((~fell[group]).sum())] for group in (mine, rest)]
        found.append(float(stats.fisher_exact(table).pvalue))
        directions.add(np.sign(fell[mine].mean() - fell[rest].mean()))
    return max(found) if len(directions) == 1 else 1.0
