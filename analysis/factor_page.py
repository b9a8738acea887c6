"""The part of a study's page about factors: their effects on the metric, on divergence and on the time of a step."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import plots
from analysis.effects import Effect, arms_effect, main_effects, study_effects
from analysis.falls import FallEffects, fall_effects
from analysis.frames import StudyFrame
from analysis.intervals import Interval
from analysis.leaderboard import values_of
from analysis.ledger import ENDED
from analysis.page import Heading, PageBlock, Picture, Table, Text
from twinrl.config.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

STEP_TIME = "log step time"
LARGEST_EXPONENT = 700.0
PAIR = " × "
"""Between the factors of an interaction."""


@dataclass(frozen=True)
class FactorSection:
    """What makes a study's arms differ, each list sorted by p; empty where there is nothing to estimate.

    Attributes:
        arms: whether the arms differ in the metric at all; None where one factor or too few runs say no more.
        metric: effects on the metric, of pairs of factors too. falls: what decides whether runs fall.
        time: on the logarithm of the seconds a step takes.
        recall: on the first recall column, where every run has one.
        medians: factor and level → median of the metric over its runs.
        problem: why there are no effects; empty if there are.
    """

    arms: Effect | None = None
    metric: Sequence[Effect] = ()
    falls: FallEffects = field(default_factory=FallEffects)
    time: Sequence[Effect] = ()
    recall: Sequence[Effect] = ()
    medians: Mapping[tuple[str, str], float] = field(default_factory=dict)
    problem: str = ""

    @property
    def names(self) -> list[str]:
        """Factors and interactions, in the order of the metric's p-values."""
        return list(dict.fromkeys(effect.factor for effect in (*self.metric, *self.falls.odds)))

    @property
    def odds(self) -> Sequence[Effect]:
        """Log odds of falling."""
        return self.falls.odds

    @property
    def pairs(self) -> list[Effect]:
        """Contrasts of the pairs of factors whose interaction in the metric is found."""
        return [effect for effect in self.metric if effect.named and PAIR in effect.factor]

    @property
    def alone(self) -> list[Effect]:
        """Contrasts of the factors that are found, and that no pair found says more about."""
        met = {name for effect in self.pairs for name in effect.factor.split(PAIR)}
        return [e for e in self.metric if e.named and PAIR not in e.factor and e.factor not in met]

    def starred(self, effect: Effect) -> bool:
        """Whether a contrast is a finding of its own: one that is found, and that no pair found says more about."""
        return effect in self.alone or effect in self.pairs


def estimate(study: StudyFrame, metric: str, interactions: Sequence[tuple[str, str]]) -> FactorSection:
    """Everything that is tested of a study."""
    ended = study.trials[study.trials["status"].isin(ENDED)].copy()
    if not study.factors or len(study.arms) < 2:
        return _of_arms(study, ended, metric)
    reference = study.arm(study.base).iloc[0][list(study.factors)].to_dict()
    try:
        ended[metric] = values_of(ended, metric).to_numpy()
        ranks = bool(ended["diverged"].any())
        whole, found = study_effects(ended, metric, study.factors, interactions, reference, ranks)
        falls = fall_effects(study.trials, study.factors, interactions, reference)
    except InputError as error:
        return replace(_of_arms(study, ended, metric), problem=str(error))
    recall = next((name for name in study.metrics if name.startswith("val/recall")), None)
    recalled = ended[ended[recall].notna()] if recall else ended[:0]
    return FactorSection(
        whole, found, falls, _further(_timed(ended), STEP_TIME, study, interactions, reference),
        _further(recalled, recall or "", study, interactions, reference),
        {(factor, str(level)): float(median) for factor in study.factors
         for level, median in ended.groupby(factor)[metric].median().items()},
    )  # fmt: skip


def _of_arms(study: StudyFrame, ended: "pd.DataFrame", metric: str) -> FactorSection:
    """What can be said without factors."""
    try:
        ended = ended.assign(**{metric: values_of(ended, metric).to_numpy()})
    except InputError:
        return FactorSection(falls=fall_effects(study.trials, ()))
    whole = arms_effect(ended, metric, bool(ended["diverged"].any()))
    return FactorSection(whole, falls=fall_effects(study.trials, ()))


def _timed(trials: "pd.DataFrame") -> "pd.DataFrame":
    """The trials whose time is known, with the logarithm of the seconds a step."""
    import numpy as np

    known = trials[(trials["seconds"] > 0) & (trials["step"] > 0)]
    return known.assign(**{STEP_TIME: np.log(known["seconds"] / known["step"])})


def _further(
    trials: "pd.DataFrame", outcome: str, study: StudyFrame, interactions: Sequence[tuple[str, str]],
    reference: dict[str, object],
) -> list[Effect]:  # fmt: skip
    """Effects on a by-product; none where the runs that have it cannot tell the factors apart."""
    try:
        return main_effects(trials, outcome, study.factors, interactions, reference) if len(trials) else []
    except InputError:
        return []


def ratio(interval: Interval) -> Interval:
    """The interval of a difference of logarithms as that of a ratio."""
    estimate, low, high = (_exp(value) for value in (interval.estimate, interval.low, interval.high))
    return Interval(estimate, low, high, interval.n, interval.method, interval.level)


def _exp(value: float) -> float:
    return math.inf if value > LARGEST_EXPONENT else math.exp(value)


def match(effects: Sequence[Effect], factor: str, contrast: str) -> Effect | None:
    """The effect of one contrast of a factor."""
    return next((e for e in effects if (e.factor, e.contrast) == (factor, contrast)), None)


def section(factors: FactorSection, metric: str, figures: Path) -> list[PageBlock]:
    """The section of the page."""
    if factors.problem:
        return [Heading("Factors"), Text(f"No effects: {factors.problem}.")]
    if not factors.metric:
        return []
    blocks = [Heading("Factors"), *_effects(factors.metric, f"change of {metric}", "effects", figures, factors.starred)]
    if factors.falls.single:
        odds = factors.falls.single
        blocks += _effects(odds, "log odds ratio of falling", "odds", figures, lambda effect: effect.named)
    blocks += _together(factors.falls)
    return [*blocks, Text(EFFECTS_NOTE, note=True)]


def _together(falls: FallEffects) -> list[PageBlock]:
    """Of each pair of factors the two levels that stand out most where they meet."""
    import pandas as pd

    if not falls.together:
        return []
    table = pd.DataFrame(
        {
            "levels that meet": " ".join(f"{factor}={level}" for factor, level in pair.levels.items()),
            "fell there": f"{pair.fell} of {pair.runs}",
            "fell elsewhere": f"{pair.other_fell} of {pair.other_runs}",
            "p": pair.p,
            "p (Holm)": pair.p_holm,
            "": "★" if pair.named else "",
        }
        for pair in falls.together
    )
    return [Heading("Falls where two levels meet", 3), Table(table, "together")]


EFFECTS_NOTE = (
    "Each factor's effect averaged over the others; least squares with the seed as a block (on the runs' ranks where "
    "some fell, so that one broken run does not hide the others), Firth's logistic regression for yes or no, Fisher's "
    "exact test against the rest of both levels where two meet. Holm's correction over arms, factors and pairs; ★ "
    "below 5 %."
)


def _effects(
    found: Sequence[Effect], label: str, name: str, figures: Path, starred: Callable[[Effect], bool]
) -> list[PageBlock]:
    import pandas as pd

    label += " (ranks)" if found[0].scale == "ranks" else ""
    table = pd.DataFrame(
        {
            "factor": effect.factor,
            "level − reference": effect.contrast,
            f"{label} [95 %]": effect.interval,
            "p": effect.p,
            "p (Holm)": effect.p_holm,
            "": "★" if starred(effect) else "",
        }
        for effect in found
    )
    figure = plots.save(plots.effects(found, label, starred), figures / f"{name}.svg")
    return [Heading(label[0].upper() + label[1:], 3), Table(table, name), Picture(figure)]
