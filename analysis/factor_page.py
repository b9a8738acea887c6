"""The part of a study's page about factors: their effects on the metric, on divergence and on the time of a step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import plots
from analysis.effects import Effect, main_effects, odds_effects
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


@dataclass(frozen=True)
class FactorSection:
    """Effects of a study's factors, each list sorted by p; empty where there is nothing to estimate.

    Attributes:
        metric: on the metric. odds: log odds of diverging. time: on the logarithm of the seconds a step takes.
        recall: on the first recall column, where every run has one.
        medians: factor and level → median of the metric over its runs.
        problem: why there are no effects; empty if there are.
    """

    metric: Sequence[Effect] = ()
    odds: Sequence[Effect] = ()
    time: Sequence[Effect] = ()
    recall: Sequence[Effect] = ()
    medians: Mapping[tuple[str, str], float] = field(default_factory=dict)
    problem: str = ""

    @property
    def names(self) -> list[str]:
        """Factors and interactions, in the order of the metric's p-values."""
        return list(dict.fromkeys(effect.factor for effect in (*self.metric, *self.odds)))


def estimate(study: StudyFrame, metric: str, interactions: Sequence[tuple[str, str]]) -> FactorSection:
    """All effects of a study."""
    if not study.factors:
        return FactorSection()
    reference = study.arm(study.base).iloc[0][list(study.factors)].to_dict()
    ended = study.trials[study.trials["status"].isin(ENDED)].copy()
    try:
        ended[metric] = values_of(ended, metric).to_numpy()
        found = main_effects(ended, metric, study.factors, interactions, reference, bool(ended["diverged"].any()))
        odds = odds_effects(study.trials, study.factors, "diverged", interactions, reference)
    except InputError as error:
        return FactorSection(problem=str(error))
    recall = next((name for name in study.metrics if name.startswith("val/recall")), None)
    recalled = ended[ended[recall].notna()] if recall else ended[:0]
    return FactorSection(
        found, odds, _further(_timed(ended), STEP_TIME, study, interactions, reference),
        _further(recalled, recall or "", study, interactions, reference),
        {(factor, str(level)): float(median) for factor in study.factors
         for level, median in ended.groupby(factor)[metric].median().items()},
    )  # fmt: skip


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
    blocks = [Heading("Factors"), *_effects(factors.metric, f"change of {metric}", "effects", figures)]
    blocks += _effects(factors.odds, "log odds ratio of diverging", "odds", figures) if factors.odds else []
    return [*blocks, Text(EFFECTS_NOTE, note=True)]


EFFECTS_NOTE = (
    "Each factor's effect averaged over the others; least squares with the seed as a block (on the runs' ranks where "
    "some diverged, so that one broken run does not hide the others), Firth's logistic regression for yes or no. "
    "Holm's correction over the factors; ★ below 5 %."
)


def _effects(found: Sequence[Effect], label: str, name: str, figures: Path) -> list[PageBlock]:
    import pandas as pd

    label += " (ranks)" if found[0].scale == "ranks" else ""
    table = pd.DataFrame(
        {
            "factor": effect.factor,
            "level − reference": effect.contrast,
            f"{label} [95 %]": effect.interval,
            "p": effect.p,
            "p (Holm)": effect.p_holm,
            "": "★" if effect.named else "",
        }
        for effect in found
    )
    figure = plots.save(plots.effects(found, label), figures / f"{name}.svg")
    return [Heading(label[0].upper() + label[1:], 3), Table(table, name), Picture(figure)]
