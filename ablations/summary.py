"""An arm's curves over its seeds: median and band of every series at few steps, and how many seeds are alive.

The steps are cut into buckets. A bucket gives the steps at which the median is smallest and largest and those at
which any seed is lowest and highest, so that neither a spike of the arm nor one of a single seed is lost. Of long logs
a few series are read at a time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial
from twinrl.run import layout
from twinrl.run.columns import ITERATION, STEP, Columns

BAND = (0.1, 0.9)
MOST_POINTS = 80
"""Of a curve; a quarter of what MLflow's charts ask for: an arm has three curves a series, a study several arms."""
STEPS_PER_BUCKET = 4
NUMBERS_AT_ONCE = 8_000_000
"""Values over seeds, steps and series that are held together, 8 bytes each."""


@dataclass(frozen=True)
class SeedLog:
    """A seed's log.

    Attributes:
        path: the run directory. record: its line in the ledger.
        series: names of what was logged. last: the last step.
    """

    path: Path
    record: TrialRecord
    series: tuple[str, ...]
    last: int

    @property
    def end(self) -> int:
        """The last step at which the seed was alive."""
        failed = self.failed
        return self.last if failed is None else failed - 1

    @property
    def failed(self) -> int | None:
        """The step of the run's failure; None for a run that is whole."""
        return None if self.record.diverged is None else int(self.record.diverged["step"])


@dataclass(frozen=True)
class Curve:
    """A series of an arm; arrays over the same steps, at each of which a seed has a finite value.

    Attributes:
        step: the steps.
        median, low, high: median and band over seeds, of each seed's last value at a step.
        lowest, highest: of all values logged there.
    """

    step: np.ndarray
    median: np.ndarray
    low: np.ndarray
    high: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray

    def thinned(self, most: int = MOST_POINTS) -> "Curve":
        """At most ``most`` of the points, with every bucket's extremes and the last point."""
        if len(self.step) <= most:
            return self
        width = math.ceil(len(self.step) / ((most - 1) // STEPS_PER_BUCKET))
        kept = {len(self.step) - 1}
        for start in range(0, len(self.step), width):
            bucket = slice(start, start + width)
            kept |= {start + int(np.argmin(series[bucket])) for series in (self.median, self.lowest)}
            kept |= {start + int(np.argmax(series[bucket])) for series in (self.median, self.highest)}
        chosen = sorted(kept)
        return Curve(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def ending(self, broken: bool, step: int) -> "Curve":
        """The curve with a last point at ``step`` that is nan where it ends ``broken``: no earlier value ranks it."""
        if not broken:
            return self
        nowhere = [np.append(getattr(self, field.name), np.nan) for field in fields(self)[1:]]
        return Curve(np.append(self.step, step), *nowhere)


def logs_of(plan: Plan, trials: Sequence[Trial]) -> list[SeedLog]:
    """The logs of an arm's trials, as far as they have ended, have rows and are on this machine."""
    records = [(trial.run, record) for trial in trials if (record := plan.record(trial)) is not None]
    return [_log(run.path, record) for run, record in records if run.log.exists() and run.log.stat().st_size]


def _log(path: Path, record: TrialRecord) -> SeedLog:
    series: list[str] = []

    def noted(name: str) -> bool:
        series.append(name)
        return False

    steps = layout.read_columns(path, noted).values[STEP]
    return SeedLog(path, record, tuple(name for name in series if name not in (STEP, ITERATION)), int(steps.max()))


def alive(logs: Sequence[SeedLog]) -> list[tuple[int, int]]:
    """(step, seeds that have neither failed nor ended before): where that changes, both sides, and at the ends."""
    ends = sorted(log.end for log in logs)
    last = max((log.last for log in logs), default=0)
    steps = {0, last} | {step for end in ends for step in (end, end + 1) if 0 <= step <= last}
    return [(step, sum(step <= end for end in ends)) for step in sorted(steps)]


def curves(logs: Sequence[SeedLog]) -> Iterator[tuple[str, Curve]]:
    """Every numeric series of an arm with its thinned curve, in the order in which they begin."""
    series = list(dict.fromkeys(name for log in logs for name in log.series))
    length = 1 + max((log.last for log in logs), default=0)
    together = max(1, NUMBERS_AT_ONCE // (max(1, len(logs)) * length))
    for start in range(0, len(series), together):
        chosen = series[start : start + together]
        read = [layout.read_columns(log.path, chosen.__contains__) for log in logs]
        for name in chosen:
            whole = curve([columns.values[STEP] for columns in read], [_finite(columns, name) for columns in read])
            if len(whole.step):
                yield name, whole.thinned().ending(_ends_broken(logs, read, name), length)


def _finite(columns: Columns, name: str) -> np.ndarray:
    """A series over the rows of a log; nan where nothing was logged and where the value is not finite."""
    if name not in columns.values:
        return np.full(len(columns.lasting), np.nan)
    values = columns.values[name].astype(float)
    return np.where(columns.logged[name] & np.isfinite(values), values, np.nan)


def curve(steps: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> Curve:
    """The curve of a series over seeds.

    A step that a roll-back repeated counts with its last value, and with all of them among the extremes.

    Arguments:
        steps: of each seed's rows. values: there, nan where there is none.
    """
    length = 1 + max((int(step.max()) for step in steps if len(step)), default=-1)
    last, lowest, highest = np.full((len(steps), length), np.nan), np.full(length, np.inf), np.full(length, -np.inf)
    for seed, (step, value) in enumerate(zip(steps, values, strict=True)):
        kept = ~np.isnan(value)
        last[seed, step[kept]] = value[kept]
        np.minimum.at(lowest, step[kept], value[kept])
        np.maximum.at(highest, step[kept], value[kept])
    (at,) = (~np.isnan(last)).any(axis=0).nonzero()
    seeds = np.sort(last[:, at], axis=0)  # nan last
    low, median, high = (_quantiles(seeds, share) for share in (BAND[0], 0.5, BAND[1]))
    return Curve(at, median, low, high, lowest[at], highest[at])


def _quantiles(seeds: np.ndarray, share: float) -> np.ndarray:
    """The quantile of each column of (seeds, steps), whose nans come last; linear between values, as numpy's."""
    place = share * (np.sum(~np.isnan(seeds), axis=0) - 1)
    below = np.floor(place).astype(int)
    column = np.arange(seeds.shape[1])
    lower, upper = seeds[below, column], seeds[np.ceil(place).astype(int), column]
    return lower * (1 - (place - below)) + upper * (place - below)


def _ends_broken(logs: Sequence[SeedLog], read: Sequence[Columns], name: str) -> bool:
    """Whether half of the seeds, or more, end without a finite value of a series from after their failure."""
    ends = []
    for log, columns in zip(logs, read, strict=True):
        step, value = columns.last(name.__eq__).get(name, (-1, math.nan))
        if step >= 0 or log.record.lost:
            ends.append(math.isfinite(value) and (log.failed is None or step >= log.failed))
    return 2 * ends.count(False) >= max(1, len(ends))
