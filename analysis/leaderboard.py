"""Arms side by side: where each lies, how sure that is, and how often it beats the base."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.frames import StudyFrame, higher_is_better
from analysis.intervals import Interval, clopper_pearson, holm, improvement, iqm, mean_t, mid_p, seeds_needed, wins
from analysis.ledger import ENDED
from twinrl.config.errors import InputError
from twinrl.run import layout

if TYPE_CHECKING:
    import pandas as pd


class TooFewSeedsError(InputError):
    """An arm has fewer than two finished seeds; the message says how many it takes."""


SHARES = ("accuracy", "precision", "recall")
"""Quantities that are shares of 1."""
NOT_NEGATIVE = ("fd", "density", "coverage", "velocity_mse")
"""Others that cannot be below 0."""
COLLAPSED = 0.5
"""Judge accuracy below which a prompt counts as collapsed."""
PAIRED_FROM = 5
"""Common seeds from which a comparison is paired."""


@dataclass(frozen=True)
class ArmLine:
    """One arm of the leaderboard.

    Attributes:
        arm: its name. interval: interquartile mean of the metric. n: runs judged.
        better: P(better than the base), None for the base itself. p: two-sided, uncorrected; p_holm: corrected.
        difference: mean difference to the base paired by seed; None without common seeds.
        diverged: runs of the arm that failed. left_out: runs without a verdict (unfinished, pruned).
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
    """The metric of the trials that ended, by seed; a trial that failed has the worst, ±inf.

    But for one that recovered: it keeps the value it ended with.

    Raises:
        InputError: the metric is missing, or a finished run has no number for it.
    """
    if metric not in trials.columns:
        logged = ", ".join(str(name) for name in trials.columns if "/" in str(name))
        raise InputError(f"no run logged {metric}", expected=f"one of {logged or 'no metric at all'}")
    ended = trials[trials["status"].isin(ENDED)].set_index("seed")
    values = ended[metric].astype(float)
    worst = -math.inf if higher_is_better(metric) else math.inf
    lost = ended["diverged"] & ~(ended["recovered"] & (ended["step"] >= ended["planned"]) & np.isfinite(values))
    values = values.mask(lost, worst)
    if values.isna().any():
        seeds = ", ".join(str(seed) for seed in values.index[values.isna()])
        raise InputError(
            f"{metric} is missing or nan in finished runs", got=f"seeds {seeds}", fix="evaluate them again"
        )
    return values


def check_units(metric: str, values: "pd.Series") -> None:
    """Raises InputError where a share was logged as a fraction by some runs and in per cent by others."""
    if _quantity(metric) not in SHARES:
        return
    finite = values[np.isfinite(values)]
    above = finite[finite > 1 + 1e-6]
    if len(above) and len(above) < len(finite):
        raise InputError(
            f"{metric} is a share of 1 in some runs and in per cent in others",
            got=f"{finite.min():g} to {finite.max():g}", expected="one unit", fix="divide the ones in per cent by 100",
        )  # fmt: skip


def leaderboard(study: StudyFrame, metric: str, effect: float = 1.0) -> list[ArmLine]:
    """The arms, best first.

    Arguments:
        metric: which column; its direction follows from its name.
        effect: difference worth finding, in standard deviations of paired differences; for the advice on seeds.

    Raises:
        InputError: one arm only, fewer than two seeds in an arm, or runs of different lengths.
    """
    check_rankable(study, metric, effect)
    columns = {arm: values_of(study.arm(arm), metric) for arm in study.arms}
    lines = [_line(study, arm, columns[arm], columns[study.base], metric) for arm in study.arms]
    sign = -1 if higher_is_better(metric) else 1
    return sorted(_with_holm(lines), key=lambda line: (sign * line.interval.estimate, line.diverged))


def check_rankable(study: StudyFrame, metric: str, effect: float = 1.0) -> None:
    """Raises InputError where a ranking would not mean anything, saying how many seeds it would take."""
    if len(study.arms) < 2:
        raise InputError("a leaderboard compares arms", got=f"one arm, {study.arms[0]}", expected="two or more")
    if metric in study.trials.columns:
        check_units(metric, study.trials[metric].astype(float))
    lengths = sorted(set(study.trials["planned"]))
    if len(lengths) > 1:
        raise InputError(
            "the runs were asked for different numbers of steps", got=", ".join(map(str, lengths)),
            expected="one length", fix="compare runs of one length",
        )  # fmt: skip
    tests = len(study.arms) - 1
    for arm in study.arms:
        have = len(values_of(study.arm(arm), metric))
        if have < 2:
            need = seeds_needed(effect, tests)
            raise TooFewSeedsError(
                f"arm {arm} has {have} finished seed{'s' * (have != 1)}, which ranks nothing",
                expected=f"{need} seeds an arm to find a difference of {effect:g} standard deviations between paired "
                f"runs ({tests} comparison{'s' * (tests != 1)}, power 80 %)",
                fix=f"run {need - have} more",
            )  # fmt: skip


def _in_range(interval: Interval, metric: str, values: "pd.Series") -> Interval:
    """The interval without what the metric cannot be: below 0, and above 1 for a share."""
    quantity = _quantity(metric)
    low = 0.0 if quantity in (*SHARES, *NOT_NEGATIVE) else -math.inf
    high = 1.0 if quantity in SHARES and (values[np.isfinite(values)] <= 1).all() else math.inf
    return replace(interval, low=max(interval.low, low), high=min(interval.high, high))


def _quantity(metric: str) -> str:
    """``fd`` of ``val/fd_1nfe``."""
    return re.sub(r"_\d+nfe$", "", metric.split("/")[1]) if "/" in metric else metric


def _line(study: StudyFrame, arm: str, values: "pd.Series", base: "pd.Series", metric: str) -> ArmLine:
    higher = higher_is_better(metric)
    trials = study.arm(arm)
    better, difference, p = (None, None, math.nan) if arm == study.base else compare(values, base, higher)
    return ArmLine(
        arm, _in_range(iqm(values.to_numpy()), metric, values), len(values), better, difference, p, p,
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


def _with_holm(lines: Sequence[ArmLine]) -> list[ArmLine]:
    tested = [line for line in lines if not math.isnan(line.p)]
    corrected = holm([line.p for line in tested])
    p = {line.arm: float(value) for line, value in zip(tested, corrected, strict=True)}
    return [replace(line, p_holm=p.get(line.arm, math.nan)) for line in lines]


# --- prompts, cost ----------------------------------------------------------------------------------------


PROMPT_ACCURACY = re.compile(r"val/accuracy/(?P<prompt>.+)_(?P<nfe>\d+)nfe")


def accuracies(study: StudyFrame) -> "pd.DataFrame":
    """Judge accuracy by prompt (columns) of the study's trials (rows), at the fewest evaluations that were logged."""
    columns = _prompts(study)
    return study.trials[list(columns)].rename(columns=columns)


def _prompts(study: StudyFrame) -> dict[str, str]:
    """Column → prompt."""
    named = {name: found for name in study.metrics if (found := PROMPT_ACCURACY.fullmatch(str(name)))}
    fewest = min((int(found["nfe"]) for found in named.values()), default=1)
    return {name: found["prompt"] for name, found in named.items() if int(found["nfe"]) == fewest}


def judged(study: StudyFrame) -> "pd.Series":
    """Whether a trial did not diverge and has accuracies by prompt, be they NaN: its log tells that from none."""
    known = accuracies(study).notna().any(axis=1)
    columns = _prompts(study)
    for k, run in study.runs.items():
        known[k] = known[k] or bool(layout.read_columns(run.path, columns.__contains__).last(columns.__contains__))
    return known & ~study.trials["diverged"]


def per_prompt(study: StudyFrame) -> "pd.DataFrame":
    """Judge accuracy of each prompt (rows) in each arm (columns): the mean over runs that did not diverge.

    NaN where it is for one of them: samples of that prompt were not finite.

    *When to use*: a mean accuracy of 0.9 may be one prompt of ten that is gone. Empty where it was not logged.
    """
    mine = judged(study)
    by_arm = accuracies(study)[mine].groupby(study.trials["arm"][mine], sort=False)
    means = by_arm.agg(lambda prompt: prompt.mean(skipna=False)).T
    return means[[arm for arm in study.arms if arm in means.columns]]


def collapses(study: StudyFrame, floor: float = COLLAPSED) -> "pd.DataFrame":
    """By arm: runs in which a prompt collapsed though the run did not diverge, which prompts, and how many a run.

    In every run another prompt may be gone, which means over seeds do not show; so runs are counted.

    Returns:
        columns ``arm``, ``runs`` that did not diverge and were judged, ``collapsed`` of these with a prompt below
        ``floor`` or NaN, its ``share`` with an exact interval, ``prompts`` as ``name in 2`` of them or ``name in 2 (1
        nan)``, the most frequent first.
    """
    import pandas as pd

    lines, values, was_judged = [], accuracies(study), judged(study)
    for arm in study.arms:
        mine = values[was_judged & (study.trials["arm"] == arm)]
        below = ~(mine >= floor)
        counts = below.sum().sort_values(ascending=False, kind="stable")
        lost = mine.isna().sum()
        prompts = ", ".join(
            f"{prompt} in {count}{f' ({lost[prompt]} nan)' if lost[prompt] else ''}"
            for prompt, count in counts.items() if count
        )  # fmt: skip
        hit, n = int(below.any(axis=1).sum()), len(mine)
        share = clopper_pearson(hit, n) if n else None
        lines.append({"arm": arm, "runs": n, "collapsed": hit, "share": share, "prompts": prompts or "none"})
    return pd.DataFrame(lines)
