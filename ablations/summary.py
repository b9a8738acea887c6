"""An arm's curves over its seeds: median, band, extremes and the number of seeds still alive, at few steps.

The steps are cut into buckets. A bucket gives the steps at which the median is smallest and largest and those at
which any seed is lowest and highest, so that neither a spike of the arm nor one of a single seed is lost.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial
from twinrl.run import layout, names
from twinrl.run.runlog import LogRow
from twinrl.tracking.thinning import MOST_POINTS

BAND = (0.1, 0.9)
STEPS_PER_BUCKET = 4


@dataclass(frozen=True)
class BandPoint:
    """One step of an arm's curve, over the seeds that have a finite value there.

    Attributes:
        step: the step.
        median, low, high: median and band, of each seed's last value at this step.
        lowest, highest: of all values logged there.
        alive: seeds that have neither diverged nor ended before.
    """

    step: int
    median: float
    low: float
    high: float
    lowest: float
    highest: float
    alive: int


def curves(plan: Plan, trials: Sequence[Trial]) -> dict[str, list[BandPoint]]:
    """The study's metric and the total loss over the seeds of an arm, as far as their logs are on this machine."""
    wanted = dict.fromkeys([plan.study.config.metric, names.LOSS_TOTAL])
    logs = [(layout.read_rows(t.run.path), plan.record(t)) for t in trials if t.run.log.exists()]
    return {metric: [*thinned(list(curve(logs, metric))), *_broken_end(logs, metric)] for metric in wanted}


def _broken_end(logs: Sequence[tuple[Sequence[LogRow], TrialRecord | None]], metric: str) -> list[BandPoint]:
    """The nan at the end of a curve whose median has none."""
    records = [record for _, record in logs if record is not None and (record.lost or metric in record.metrics)]
    ends = [record.metrics.get(metric, math.nan) for record in records]
    if 2 * sum(not math.isfinite(end) for end in ends) < max(1, len(ends)):
        return []
    last = max((int(rows[-1]["step"]) for rows, _ in logs if rows), default=0)
    nowhere, alive = math.nan, sum(last <= _end(rows, record) for rows, record in logs)
    return [BandPoint(last + 1, nowhere, nowhere, nowhere, nowhere, nowhere, alive)]


def curve(logs: Sequence[tuple[Sequence[LogRow], TrialRecord | None]], metric: str) -> Iterator[BandPoint]:
    """A metric at each step at which a seed has a finite value of it.

    A seed is alive up to its divergence, or to its last step. How many seeds stand behind a point is what ``alive``
    is for. A step that a roll-back repeated counts with its last value, and with all of them among the extremes.
    """
    ends = [_end(rows, record) for rows, record in logs]
    found: dict[int, list[list[float]]] = {}
    for rows, _ in logs:
        for step, values in _by_step(rows, metric).items():
            found.setdefault(step, []).append(values)
    for step in sorted(found):
        everything = [value for values in found[step] for value in values]
        low, median, high = np.quantile([values[-1] for values in found[step]], (BAND[0], 0.5, BAND[1])).tolist()
        alive = sum(step <= end for end in ends)
        yield BandPoint(step, median, low, high, min(everything), max(everything), alive)


def _by_step(rows: Sequence[LogRow], metric: str) -> dict[int, list[float]]:
    """Step → one seed's finite values there."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if metric in row and math.isfinite(value := float(row[metric])):
            found.setdefault(int(row["step"]), []).append(value)
    return found


def _end(rows: Sequence[LogRow], record: TrialRecord | None) -> int:
    """The last step at which a seed was alive."""
    if record is not None and record.diverged is not None:
        return int(record.diverged["step"]) - 1
    return int(rows[-1]["step"]) if rows else -1


def thinned(points: Sequence[BandPoint], most: int = MOST_POINTS) -> list[BandPoint]:
    """At most ``most`` of the points, with every bucket's extremes and the last point."""
    if len(points) <= most:
        return list(points)
    width = math.ceil(len(points) / ((most - 1) // STEPS_PER_BUCKET))
    kept = {points[-1].step: points[-1]}
    for start in range(0, len(points), width):
        bucket = points[start : start + width]
        chosen = (
            min(bucket, key=lambda p: p.median), max(bucket, key=lambda p: p.median),
            min(bucket, key=lambda p: p.lowest), max(bucket, key=lambda p: p.highest),
        )  # fmt: skip
        kept |= {point.step: point for point in chosen}
    return [kept[step] for step in sorted(kept)]
