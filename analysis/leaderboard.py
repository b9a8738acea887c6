"""Arms side by side: where each lies, how sure that is, and how often it beats the base."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.frames import Study, higher_is_better
from analysis.intervals import Interval, holm, improvement, iqm, mean_t, mid_p, seeds_needed, wins
from analysis.ledger import ENDED
from twinrl.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


class TooFewSeedsError(InputError):
    """An arm has fewer than two finished seeds; the message says how many it takes."""


PAIRED_FROM = 5
"""Common seeds from which a comparison is paired."""


@dataclass(frozen=True)
class Line:
    """One arm of the leaderboard.

    Attributes:
        arm: its name. interval: interquartile mean of the metric. n: runs judged.
        better: P(better than the base), None for the base itself. p: two-sided, uncorrected; p_holm: corrected.
        difference: mean difference to the base paired by seed; None without common seeds.
        diverged: runs of the arm that diverged. left_out: runs without a verdict (unfinished, pruned).
    """

    arm: str
    interval: Interval
    n: int
    better: Interval | None
    difference: Interval | None
    p: float
    p_holm: float
    diverged: int
    left_out: int


def values_of(trials: "pd.DataFrame", metric: str) -> "pd.Series":
    """The metric of the trials that ended, by seed; a diverged trial without a finite value has the worst, ±inf.

    A run that diverged and went on to its end keeps the value it ended with.

    Raises:
        InputError: the metric is missing, or a finished run has no number for it.
    """
    if metric not in trials.columns:
        logged = ", ".join(str(name) for name in trials.columns if "/" in str(name))
        raise InputError(f"no run logged {metric}", expected=f"one of {logged or 'no metric at all'}")
    ended = trials[trials["status"].isin(ENDED)].set_index("seed")
    values = ended[metric].astype(float)
    cut_short = ended["diverged"] & ((ended["step"] < ended["planned"]) | ~np.isfinite(values))
    worst = -math.inf if higher_is_better(metric) else math.inf
    values = values.mask(cut_short, worst)
    if values.isna().any():
        seeds = ", ".join(str(seed) for seed in values.index[values.isna()])
        raise InputError(
            f"{metric} is missing or nan in finished runs", got=f"seeds {seeds}", fix="evaluate them again"
        )
    return values


def leaderboard(study: Study, metric: str, effect: float = 1.0) -> list[Line]:
    """The arms, best first.

    Arguments:
        metric: which column; its direction follows from its name.
        effect: difference worth finding, in standard deviations of paired differences; for the advice on seeds.

    Raises:
        InputError: one arm only, fewer than two seeds in an arm, or runs of different lengths.
    """
    check_rankable(study, metric, effect)
    columns = {arm: values_of(study.arm(arm), metric) for arm in study.arms}
    lines = [_line(study, arm, columns[arm], columns[study.base], higher_is_better(metric)) for arm in study.arms]
    sign = -1 if higher_is_better(metric) else 1
    return sorted(_with_holm(lines), key=lambda line: (sign * line.interval.estimate, line.diverged))


def check_rankable(study: Study, metric: str, effect: float = 1.0) -> None:
    """Raises InputError where a ranking would not mean anything, saying how many seeds it would take."""
    if len(study.arms) < 2:
        raise InputError("a leaderboard compares arms", got=f"one arm, {study.arms[0]}", expected="two or more")
    lengths = sorted(set(study.trials["planned"]))
    if len(lengths) > 1:
        raise InputError(
            "the runs were asked for different numbers of steps", got=", ".join(map(str, lengths)),
            expected="one length", fix="compare runs of one length",
        )  # fmt: skip
    for arm in study.arms:
        have = len(values_of(study.arm(arm), metric))
        if have < 2:
            need = seeds_needed(effect, tests=len(study.arms) - 1)
            raise TooFewSeedsError(
                f"arm {arm} has {have} finished seed{'s' * (have != 1)}, which ranks nothing",
                expected=f"{need} seeds an arm to find a difference of {effect:g} standard deviations between paired "
                f"runs ({len(study.arms) - 1} comparisons, power 80 %)",
                fix=f"run {need - have} more",
            )  # fmt: skip


def _line(study: Study, arm: str, values: "pd.Series", base: "pd.Series", higher: bool) -> Line:
    trials = study.arm(arm)
    better, difference, p = (None, None, math.nan) if arm == study.base else compare(values, base, higher)
    return Line(
        arm, iqm(values.to_numpy()), len(values), better, difference, p, p,
        int(trials["diverged"].sum()), len(trials) - len(values),
    )  # fmt: skip


def compare(values: "pd.Series", base: "pd.Series", higher: bool) -> tuple[Interval, Interval | None, float]:
    """P(better), mean paired difference (None without pairs) and p-value of an arm against the base.

    Paired by seed from five common seeds on: exact mid-P share of seeds won, and Wilcoxon's signed ranks. Else
    all pairs: Newcombe's interval, and the Mann–Whitney test.
    """
    from scipy import stats

    sign = 1.0 if higher else -1.0
    common = [seed for seed in values.index if seed in base.index]
    mine, other = sign * values[common].to_numpy(float), sign * base[common].to_numpy(float)
    pairs = mean_t((mine - other) * sign) if len(common) >= 2 and np.isfinite([mine, other]).all() else None
    if len(common) < PAIRED_FROM:
        a, b = sign * values.to_numpy(float), sign * base.to_numpy(float)
        return improvement(a, b), pairs, float(stats.mannwhitneyu(a, b, method="auto").pvalue)
    won = wins(mine, other)
    return mid_p(float(won.sum()), len(common)), pairs, signed_rank_p(mine, other)


def signed_rank_p(mine: np.ndarray, other: np.ndarray) -> float:
    """Wilcoxon's p for pairs; where one of a pair diverged its difference is the largest, where both did, zero."""
    from scipy import stats

    both = ~np.isfinite(mine) & (mine == other)
    difference = np.where(both, 0.0, np.where(both, 0.0, mine) - np.where(both, 0.0, other))
    if not difference.any():
        return 1.0
    finite = np.abs(difference[np.isfinite(difference)])
    largest = 2 * finite.max(initial=0.0) + 1.0
    return float(stats.wilcoxon(np.clip(difference, -largest, largest), zero_method="pratt").pvalue)


def _with_holm(lines: Sequence[Line]) -> list[Line]:
    tested = [line for line in lines if not math.isnan(line.p)]
    corrected = holm([line.p for line in tested])
    p = {line.arm: float(value) for line, value in zip(tested, corrected, strict=True)}
    return [replace(line, p_holm=p.get(line.arm, math.nan)) for line in lines]


# --- prompts, cost ----------------------------------------------------------------------------------------


def per_prompt(study: Study, nfe: int = 1) -> "pd.DataFrame":
    """Judge accuracy of each prompt (rows) in each arm (columns): the mean over runs that were judged.

    *When to use*: a mean accuracy of 0.9 may be one prompt of ten that is gone. Empty where it was not logged.
    """
    import pandas as pd

    suffix, prefix = f"_{nfe}nfe", "val/accuracy/"
    columns = [name for name in study.metrics if name.startswith(prefix) and name.endswith(suffix)]
    means = study.trials.groupby("arm", sort=False)[columns].mean().T if columns else pd.DataFrame()
    return means.rename(index=lambda name: str(name)[len(prefix) : -len(suffix)])


def collapsed_prompts(accuracy: "pd.DataFrame", floor: float = 0.5) -> dict[str, list[str]]:
    """Arm → prompts whose accuracy is below ``floor``."""
    return {str(arm): [str(p) for p in accuracy.index[accuracy[arm] < floor]] for arm in accuracy.columns}
