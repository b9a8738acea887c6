"""The sampler that suits a finished student: settings searched at a number of evaluations, at no cost in training.

Many settings are judged on one draw of noise, the better ones on more. The last one is compared with the usual
settings, paired, on fresh noise and other images. A search always finds a least number; only the comparison says
whether it is better.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, TypeAdapter

from twinrl.config import stored
from twinrl.config.errors import InputError
from twinrl.evaluation.table import IntervalEstimate, mean_interval
from twinrl.machine import files
from twinrl.sampling import SamplerConfig, any_step, few_step, multi_step

ROUNDS = ((67, 1), (12, 2), (4, 6))
"""(settings, fresh draws of noise of each) of one round after the other."""
COMPARED, AFRESH = 10, 100
"""Draws of noise of the comparison, and the number of the first, which no search has seen."""
SEED = 35

Score = Callable[[SamplerConfig, int], float]
"""Sampler and number of a draw of noise → quality of its samples; smaller is better."""


@dataclass(frozen=True)
class Best:
    """What a search has found at a number of evaluations.

    Attributes:
        nfe: network evaluations of a sample.
        sampler: the settings found.
        usual: quality under :func:`twinrl.sampling.few_step`. found: under ``sampler``; of the same noise and images.
        difference: found − usual, with its 95 % interval over draws of noise.
    """

    nfe: int
    sampler: Annotated[SamplerConfig, BeforeValidator(SamplerConfig.model_validate)]
    usual: float
    found: float
    difference: IntervalEstimate

    @property
    def better(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.difference.high < 0


@dataclass(frozen=True)
class Searched:
    """The searches of a checkpoint.

    Attributes:
        step: of the checkpoint. found: one for each number of evaluations.
    """

    step: int
    found: Sequence[Best]


def write(path: Path, searched: Searched) -> None:
    """Keep what was found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, TypeAdapter(Searched).dump_json(searched, indent=1).decode() + "\n")


def read(path: Path, again: str) -> Searched | None:
    """What was kept; None where nothing was. Raises InputError where the file is damaged: ``again`` searches."""
    try:
        found: Searched = stored.read(path, Searched, f"search again: {again}")
    except FileNotFoundError:
        return None
    return found


def candidates(nfe: int) -> list[SamplerConfig]:
    """The usual settings first, then such as fill the space evenly (a scrambled Sobol sequence)."""
    from scipy.stats import qmc

    usual = [few_step(nfe), any_step(nfe), multi_step(nfe)]
    points = qmc.Sobol(7, seed=SEED).random(ROUNDS[0][0] - len(usual)).tolist()
    return usual + [_settings(nfe, point) for point in points]


def _settings(nfe: int, u: Sequence[float]) -> SamplerConfig:
    """Settings at the point u (7,) of the unit cube; extremes of ρ and κ have a share of their own."""
    style, ratio, extrapolation, a, b, c, gap = u
    return SamplerConfig(
        steps=nfe,
        style=("few", "any", "mul")[min(2, int(3 * style))],
        stochastic_ratio=min(1.0, max(0.0, 1.5 * ratio - 0.25)),
        extrapolation=max(0.0, extrapolation - 0.5),
        kumaraswamy=(4 ** (a - 0.5), 4 ** (b - 0.5), 4 ** (c - 0.5)),
        gap_end=0.8 * gap,
    )


def judged_in(searches: int) -> int:
    """Draws of noise that are judged in so many searches and comparisons; for a progress bar."""
    return searches * (sum(kept * draws for kept, draws in ROUNDS) + 2 * COMPARED)


def search(score: Score, nfe: int) -> SamplerConfig:
    """The settings of least mean quality; such as give numbers that are not finite are never chosen."""
    pool = candidates(nfe)
    judged: list[list[float]] = [[] for _ in pool]
    places, first = list(range(len(pool))), 0
    for kept, draws in ROUNDS:
        places = _least(places, judged)[:kept]
        for place in places:
            judged[place] += [score(pool[place], draw) for draw in range(first, first + draws)]
        first += draws
    return pool[_least(places, judged)[0]]


def _least(places: Iterable[int], judged: Sequence[Sequence[float]]) -> list[int]:
    """Places by their mean quality, the usual first among equals."""

    def mean(place: int) -> float:
        found = sum(judged[place]) / max(1, len(judged[place]))
        return found if math.isfinite(found) else math.inf

    return sorted(places, key=mean)


def compared(score: Score, nfe: int, sampler: SamplerConfig) -> Best:
    """A sampler beside the usual one, on the same :data:`COMPARED` draws. Raises InputError: that is not finite."""
    draws = range(AFRESH, AFRESH + COMPARED)
    usual, found = ([score(each, draw) for draw in draws] for each in (few_step(nfe), sampler))
    if not all(map(math.isfinite, usual)):
        raise InputError(f"samples of {nfe} evaluations are not finite under the usual settings")
    difference = mean_interval([b - a for a, b in zip(usual, found, strict=True)])
    return Best(nfe, sampler, sum(usual) / COMPARED, sum(found) / COMPARED, difference)
