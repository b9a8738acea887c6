"""Every number of a report, on simulated studies whose truth is known: ``python -m analysis.coverage``.

An *interval* must cover the truth in 93–97 % of the studies, a *test* of nothing must name something in at most 5 %
(family-wise), and what is planted must be named. Monte-Carlo error is stated beside every share. The laws are those of
studies of training runs: 10 or 20 seeds, divergence seen at every 50th of 1000 steps, seeds that share an effect.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from analysis import clusters, effects, falls, firth, intervals, leaderboard, margins, spikes, survival
from analysis.intervals import Interval
from analysis.survival import Times

STEPS, EVERY = 1000.0, 50.0
FACTORS = ("lr", "teacher", "clip")
COVERS, LEVEL, POWER = "covers", "level", "power"
BANDS = {COVERS: (0.93, 0.97), LEVEL: (0.0, 0.05), POWER: (0.8, 1.0)}


@dataclass(frozen=True)
class ValidityRow:
    """One line of the table.

    Attributes:
        what: statistic. study: the law it was tried on. n: seeds an arm.
        kind: covers, level or power. share: of the simulated studies. simulations: their number.
    """

    what: str
    study: str
    n: int
    kind: str
    share: float
    simulations: int

    @property
    def error(self) -> float:
        """Monte-Carlo standard error of the share."""
        return math.sqrt(max(self.share * (1 - self.share), 1 / self.simulations) / self.simulations)

    @property
    def within(self) -> bool:
        """Whether the share is inside its band, up to two errors."""
        low, high = BANDS[self.kind]
        return low - 2 * self.error <= self.share <= high + 2 * self.error


Check = Callable[[int], Iterator[ValidityRow]]


def inside(found: Sequence[Interval], truth: float) -> float:
    """Share of the intervals that hold the truth."""
    return float(np.mean([interval.low <= truth <= interval.high for interval in found]))


# --- times to divergence ----------------------------------------------------------------------------------


def divergence(rng: np.random.Generator, shape: tuple[int, ...], rate: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and events of exponential divergence with ``rate`` a run length, as evaluations see them."""
    seen = np.ceil(rng.exponential(STEPS / rate, shape) / EVERY) * EVERY
    return np.minimum(seen, STEPS), seen <= STEPS


def arms(rng: np.random.Generator, studies: int, n: int, rate: float) -> list[Times]:
    """One arm of each study."""
    return [Times(time, event) for time, event in zip(*divergence(rng, (studies, n), rate), strict=True)]


def mean_time(rate: float) -> float:
    """The true restricted mean: Σ over the evaluations' steps of the share that has not diverged before."""
    edges = np.arange(0.0, STEPS, EVERY)
    return float(EVERY * np.exp(-rate * edges / STEPS).sum())


def hazard_ratios(studies: int) -> Iterator[ValidityRow]:
    """Coverage of the penalised interval."""
    for n, ratio, base in itertools.product((10, 20), (1.0, 3.0), (0.2, 0.8)):
        rng = np.random.default_rng([1, n])
        pairs = zip(arms(rng, studies, n, base * ratio), arms(rng, studies, n, base), strict=True)
        found = [survival.hazard_ratio(a, b) for a, b in pairs]
        yield ValidityRow("hazard ratio", f"{ratio:g}, base {base:g}", n, COVERS, inside(found, ratio), studies)


def restricted_means(studies: int) -> Iterator[ValidityRow]:
    """Coverage of the restricted mean and of a difference of two."""
    for n, rate in itertools.product((10, 20), (0.2, 0.5, 1.0, 2.0, 5.0)):
        found = [survival.restricted_mean(a, STEPS) for a in arms(np.random.default_rng([2, n]), studies, n, rate)]
        yield ValidityRow("restricted mean", f"rate {rate:g}", n, COVERS, inside(found, mean_time(rate)), studies)
    for n, (high, low) in itertools.product((10, 20), ((1.0, 1.0), (2.0, 0.7), (1.0, 0.1), (0.2, 0.2))):
        rng = np.random.default_rng([3, n])
        pairs = zip(arms(rng, studies, n, high), arms(rng, studies, n, low), strict=True)
        found = [survival.restricted_mean_difference(a, b, STEPS) for a, b in pairs]
        share = inside(found, mean_time(high) - mean_time(low))
        yield ValidityRow("difference of restricted means", f"rates {high:g}, {low:g}", n, COVERS, share, studies)


def log_ranks(studies: int) -> Iterator[ValidityRow]:
    """How often the log-rank test finds a difference that is, or is not, there."""
    for n, ratio in ((10, 1.0), (20, 1.0), (20, 6.0)):
        rng = np.random.default_rng([4, n])
        pairs = zip(arms(rng, studies, n, 0.8 * ratio), arms(rng, studies, n, 0.8), strict=True)
        found = np.mean([survival.log_rank({"a": a, "b": b}) < 0.05 for a, b in pairs])
        kind = LEVEL if ratio == 1 else POWER
        yield ValidityRow("log-rank", f"hazard ratio {ratio:g}", n, kind, float(found), studies)


# --- ranking ----------------------------------------------------------------------------------------------


def rankings(studies: int) -> Iterator[ValidityRow]:
    """Family-wise error of three arms that are the base's equals, and power for one that is better."""
    for n, shift in ((10, 0.0), (20, 0.0), (20, 1.2)):
        rng, named, better = np.random.default_rng([5, n]), 0, 0
        for _ in range(studies):
            seeds, other = rng.standard_normal(n), rng.standard_normal((3, n))
            other[0] -= shift * math.sqrt(2)  # in deviations of a paired difference
            base = seeds + rng.standard_normal(n)
            p = intervals.holm([leaderboard.signed_rank_p(seeds + arm, base) for arm in other]) < 0.05
            named, better = named + bool(p[1 if shift else 0 :].any()), better + bool(p[0])
        yield ValidityRow("ranking, Holm", f"3 arms, {shift:g} σ in one" if shift else "3 equal arms", n, LEVEL,
                      named / studies, studies)  # fmt: skip
        if shift:
            yield ValidityRow("ranking, Holm", f"3 arms, {shift:g} σ in one", n, POWER, better / studies, studies)


def chances(studies: int) -> Iterator[ValidityRow]:
    """Coverage of the probability of improvement over all pairs, and of the share of seeds won."""
    from scipy import stats

    for n, shift in itertools.product((10, 20), (0.0, 0.75, 1.5)):
        rng = np.random.default_rng([6, n])
        better, base = rng.standard_normal((studies, n)) + shift, rng.standard_normal((studies, n))
        truth = float(stats.norm.cdf(shift / math.sqrt(2)))
        found = [intervals.improvement(a, b) for a, b in zip(better, base, strict=True)]
        yield ValidityRow("P(better), all pairs", f"shift {shift:g} σ", n, COVERS, inside(found, truth), studies)
    for n in (10, 20):  # few seeds have few outcomes, so coverage waves with the chance: on average over chances
        rng = np.random.default_rng([11, n])
        chance, by_wins = rng.uniform(0.02, 0.98, studies), [intervals.mid_p(k, n) for k in range(n + 1)]
        found = [by_wins[k] for k in rng.binomial(n, chance)]
        covered = float(np.mean([i.low <= p <= i.high for i, p in zip(found, chance, strict=True)]))
        yield ValidityRow("P(better), by seed", "chances from 2 to 98 %", n, COVERS, covered, studies)


def critical_rates(studies: int) -> Iterator[ValidityRow]:
    """Coverage of a margin in doublings, brackets 0.3 wide, for several spreads of the seeds."""
    for n, spread in itertools.product((10, 20), (0.0, 0.15, 0.3, 1.0)):
        rng, covered = np.random.default_rng([7, n]), 0
        for _ in range(studies):
            truth, start, rates = rng.uniform(0, 2), rng.uniform(-8, -7), []
            for arm, center in (("base", start), ("arm", start + truth)):
                low = 0.3 * np.floor((center + spread * rng.standard_normal(n)) / 0.3)
                rates += [margins.Critical(arm, k, 2.0**e, 2.0 ** (e + 0.3)) for k, e in enumerate(low)]
            covered += inside([margins.margin(rates, "arm", "base")], truth) > 0
        yield ValidityRow(
            "critical-rate margin", f"seeds ± {spread:g} doublings", n, COVERS, covered / studies, studies
        )


# --- factors ----------------------------------------------------------------------------------------------


def factorial(seeds: int) -> "tuple[list[effects.FactorColumns], np.ndarray, np.ndarray]":
    """A full 2³ design crossed with seeds: its blocks, (n,) whether the teacher is changed, (n,) seeds."""
    import pandas as pd

    rows = [dict(zip(FACTORS, levels, strict=True)) | {"seed": seed, "y": 0.0}
            for levels in itertools.product("ab", repeat=3) for seed in range(seeds)]  # fmt: skip
    trials = pd.DataFrame(rows)
    blocks = effects.design(trials, ["y"], FACTORS, (), {})
    return blocks, (trials["teacher"] == "b").to_numpy(float), trials["seed"].to_numpy()


def main_effects(studies: int) -> Iterator[ValidityRow]:
    """Main effects with the seed as a block: coverage, family-wise error, power."""
    from scipy import stats

    for n, planted in itertools.product((10, 20), (0.0, 0.8)):
        (blocks, teacher, seed), rng = factorial(n), np.random.default_rng([8, n])
        x = np.concatenate([np.ones((len(seed), 1)), *(b.columns for b in blocks),
                            effects.factor_block("seed", _series(seed)).columns], axis=1)  # fmt: skip
        y = rng.standard_normal((studies, len(seed))) + rng.standard_normal((studies, n))[:, seed] + planted * teacher
        inverse, freedom = np.linalg.inv(x.T @ x), len(seed) - x.shape[1]
        beta = y @ x @ inverse
        error = np.sqrt(((y - beta @ x.T) ** 2).sum(1, keepdims=True) / freedom * np.diag(inverse)[1:4])
        named = intervals.holm(2 * stats.t.sf(np.abs(beta[:, 1:4] / error), freedom)) < 0.05
        law = f"2³, teacher {planted:g} σ" if planted else "2³, nothing planted"
        half = stats.t.ppf(0.975, freedom) * error[:, 1]
        covered = float((np.abs(beta[:, 2] - planted) <= half).mean())
        others = named[:, [0, 2]] if planted else named
        yield ValidityRow("main effect", law, n, COVERS, covered, studies)
        yield ValidityRow("main effects, Holm", law, n, LEVEL, float(others.any(1).mean()), studies)
        if planted:
            yield ValidityRow("main effects, Holm", law, n, POWER, float(named[:, 1].mean()), studies)


def _series(values: np.ndarray) -> "effects.pd.Series":
    import pandas as pd

    return pd.Series(values)


def odds(studies: int) -> Iterator[ValidityRow]:
    """Factors of divergence by Firth's regression: family-wise error with shared seeds, power, coverage."""
    for n, planted in ((10, 0.0), (10, 2.0)):
        (blocks, teacher, seed), rng = factorial(n), np.random.default_rng([9, n])
        x = np.concatenate([np.ones((len(seed), 1)), *(b.columns for b in blocks)], axis=1)
        shared = 0.0 if planted else 0.5 * rng.standard_normal((studies, n))[:, seed]
        chance = 1 / (1 + np.exp(1.0 - shared - planted * teacher))
        outcomes = (rng.random((studies, len(seed))) < chance).astype(float)
        fits = [firth.fit(x, y) for y in outcomes]
        p = np.array([[firth.p_value(x, y, [k], fit) for k in (1, 2, 3)]
                      for y, fit in zip(outcomes, fits, strict=True)])  # fmt: skip
        named, law = intervals.holm(p) < 0.05, f"2³, teacher {planted:g}" if planted else "2³, nothing planted"
        others = named[:, [0, 2]] if planted else named
        yield ValidityRow("odds of divergence, Holm", law, n, LEVEL, float(others.any(1).mean()), studies)
        if planted:
            yield ValidityRow("odds of divergence, Holm", law, n, POWER, float(named[:, 1].mean()), studies)
            ends = [firth.profile_interval(x, y, 2, fit, intervals.LEVEL)
                    for y, fit in zip(outcomes, fits, strict=True)]  # fmt: skip
            covered = float(np.mean([low <= planted <= high for low, high in ends]))
            yield ValidityRow("log odds ratio", law, n, COVERS, covered, studies)


def grids(studies: int) -> Iterator[ValidityRow]:
    """A 2 × 2 grid: arms, factors and their interaction as one family; as :func:`analysis.effects.study_effects`."""
    from scipy import stats

    for n, planted in itertools.product((8, 20), (0.0, 1.0)):
        a, b, seed = (part.ravel() for part in np.meshgrid([0.0, 1.0], [0.0, 1.0], np.arange(n), indexing="ij"))
        own = np.stack([a - 0.5, b - 0.5, (a - 0.5) * (b - 0.5)], axis=1)
        x = np.concatenate([np.ones((len(seed), 1)), own, effects.factor_block("seed", _series(seed)).columns], axis=1)
        rng = np.random.default_rng([11, n])
        noise = rng.standard_normal((studies, len(seed))) + rng.standard_normal((studies, n))[:, seed.astype(int)]
        y = noise + planted * (a == b)
        inverse, freedom = np.linalg.inv(x.T @ x), len(seed) - x.shape[1]
        beta = y @ x @ inverse
        variance = ((y - beta @ x.T) ** 2).sum(1, keepdims=True) / freedom
        t = beta[:, 1:4] / np.sqrt(variance * np.diag(inverse)[1:4])
        arms_p = stats.f.sf((t**2).mean(1), 3, freedom)  # the three are orthogonal, and span the arms
        gate, parts = intervals.gated(arms_p, 2 * stats.t.sf(np.abs(t), freedom))
        named = np.column_stack([gate, parts]) < 0.05
        law = f"2², levels that agree {planted:g} σ" if planted else "2², nothing planted"
        wrong = named[:, [1, 2]] if planted else named
        yield ValidityRow("arms, factors, pairs", law, n, LEVEL, float(wrong.any(1).mean()), studies)
        if planted and n > 8:
            yield ValidityRow("arms, factors, pairs", law, n, POWER, float(named[:, 3].mean()), studies)


FALLS = {"nothing planted": (0.4, 0.4, 0.4), "one factor": (0.05, 0.95, 0.95), "only together": (0.02, 0.02, 0.98)}
"""Law → chances to fall: with an EMA teacher, with a live one, with a live one and a reward."""


def fallen(studies: int, what: str) -> Iterator[ValidityRow]:
    """A 2 × 2 grid in which runs fall: arms, factors and two levels that meet as one family, with shared seeds.

    Arguments:
        what: which of :data:`FALLS`.
    """
    import pandas as pd

    rng, found = np.random.default_rng([13, len(what)]), []
    trials = pd.DataFrame(itertools.product(("live", "ema"), ("with", "without"), range(10)),
                          columns=["teacher", "reward", "seed"])  # fmt: skip
    trials["arm"], trials["time"] = trials["teacher"] + trials["reward"], 1.0
    neither, live, both = FALLS[what]
    p = np.where(trials["teacher"] == "live", np.where(trials["reward"] == "with", both, live), neither)
    for _ in range(studies):
        luck = np.repeat(rng.standard_normal((1, 10)), 4, 0).ravel()  # seeds that fall more easily, in every arm
        odds = np.log(p / (1 - p)) + 0.5 * luck
        trials["diverged"] = rng.random(len(trials)) < 1 / (1 + np.exp(-odds))
        told = falls.fall_effects(trials, ("teacher", "reward"))
        alone = {effect.factor for effect in told.alone}
        found.append((bool(told.arms and told.arms.named), "teacher" in alone, "reward" in alone, bool(told.pairs)))
    arms_differ, teacher, reward, together = np.array(found).T
    law, name = f"2², {what}", "falls: arms, factors, pairs"
    if what == "nothing planted":
        yield ValidityRow(name, law, 10, LEVEL, float(np.any(found, axis=1).mean()), studies)
        return
    wrong = reward | together if what == "one factor" else teacher | reward
    right = teacher if what == "one factor" else together
    yield ValidityRow(name, law, 10, LEVEL, float(wrong.mean()), studies)
    yield ValidityRow(name, law, 10, POWER, float((right & arms_differ).mean()), studies)


# --- spikes -----------------------------------------------------------------------------------------------


def recurrences(studies: int) -> Iterator[ValidityRow]:
    """How often data rows, times or branches of random batches are named."""
    from pathlib import Path

    from analysis.frames import Run

    rng, rows, places = np.random.default_rng(10), 0, 0
    for _ in range(studies):
        events = [
            {"step": k, "kind": "spike", "terms": ["a"], "rows": rng.choice(500, 32, replace=False).tolist(),
             "t": (rng.random(32) ** 2).tolist(), "branches": rng.choice(["mul", "any", "adv"], 32).tolist()}
            for k in range(12)
        ]  # fmt: skip
        rows += bool(spikes.recurring_rows(Run.of(Path(), [], events)))
        places += bool(clusters.clusters(events, draws=200, seed=int(rng.integers(1 << 30))))
    yield ValidityRow("recurring data rows", "random batches", 12, LEVEL, rows / studies, studies)
    yield ValidityRow("clusters in t and branches", "random batches", 12, LEVEL, places / studies, studies)


CHECKS: dict[str, Check] = {
    "ranking": rankings,
    "chances": chances,
    "hazard ratios": hazard_ratios,
    "restricted means": restricted_means,
    "log-rank": log_ranks,
    "critical rates": critical_rates,
    "main effects": main_effects,
    "odds": odds,
    "grids": grids,
    **{f"falls, {what}": partial(fallen, what=what) for what in FALLS},
    "recurrences": recurrences,
}


def table(findings: Sequence[ValidityRow]) -> str:
    """The findings as Markdown."""
    head = ["| statistic | simulated studies | n | | share | ± | of | |", "|---|---|--:|---|--:|--:|--:|---|"]
    rows = [
        f"| {f.what} | {f.study} | {f.n} | {f.kind} | {100 * f.share:.1f} % | {100 * f.error:.1f} | "
        f"{f.simulations:,} | {'' if f.within else 'outside'} |"
        for f in findings
    ]
    return "\n".join([*head, *rows])
