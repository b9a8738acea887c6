"""Thins a run's curves to few points while it is still running, and never loses an extreme.

The iterations are cut into buckets of fixed width, known from the run's planned length. A completed bucket
gives each series its smallest and its largest value, at the iterations where they occurred, so a spike one
step wide is seen at full height. What is published never has to be taken back: the points depend on the
rows alone, which also makes publishing repeatable after a crash.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from twinrl.run.names import STEP_SECONDS

MOST_POINTS = 320  # what MLflow's charts ask for; of a longer series they drop points blindly, spikes included
REGULAR_BUCKETS = 140
EXTRA_BUCKETS = 18
EXTRA_GROWTH = 1.5
UNTIMED_SECONDS = 1e-3
COUNTERS = ("iteration", "step")


class MetricPoint(NamedTuple):
    """One point of a thinned series: a value, finite or nan, its iteration, and training seconds until then."""

    name: str
    iteration: int
    value: float
    seconds: float


class Thinner:
    """Turns the rows of a log, fed in order, into at most 320 numbers a series.

    Arguments:
        total: planned number of iterations; positive. Runs that go on for longer (a roll-back repeats steps
            under new iterations) continue in buckets that widen by half each, which lasts for some twenty
            times ``total``.

    A value that is not finite is not a point, but where a bucket's last one is: it is there as nan, so that the
    latest point of a series is never a number from before. ``nonfinite/<name>`` carries, once a bucket, how many
    there have been so far. Columns that are no numbers are left out.
    """

    def __init__(self, total: int):
        self.width = max(1, math.ceil(total / REGULAR_BUCKETS))
        self.seconds = 0.0
        self._bucket = -1
        self._lowest: dict[str, MetricPoint] = {}
        self._highest: dict[str, MetricPoint] = {}
        self._counts: dict[str, MetricPoint] = {}
        self._gaps: dict[str, MetricPoint] = {}  # where a series is not finite at the end of the bucket
        self._totals: dict[str, int] = {}
        self._last: dict[str, MetricPoint] = {}  # where it is not among the points given out

    def bucket(self, iteration: int) -> int:
        """The bucket an iteration falls in: regular ones up to the planned length, widening ones after it."""
        regular = iteration // self.width
        if regular < REGULAR_BUCKETS:
            return regular
        beyond = iteration / self.width - REGULAR_BUCKETS
        extra = int(math.log(1 + beyond * (EXTRA_GROWTH - 1), EXTRA_GROWTH))
        return REGULAR_BUCKETS + min(extra, EXTRA_BUCKETS - 1)

    def feed(self, row: Mapping[str, object]) -> list[MetricPoint]:
        """Take in the next row; returns the points of the bucket that it completed, usually none."""
        iteration = int(_number(row["iteration"]))
        seconds = _number(row.get(STEP_SECONDS))
        self.seconds += seconds if math.isfinite(seconds) else UNTIMED_SECONDS
        completed = self._drain() if self.bucket(iteration) != self._bucket else []
        self._bucket = self.bucket(iteration)
        for name, value in row.items():
            if name not in COUNTERS and isinstance(value, int | float):
                self._take(MetricPoint(name, iteration, float(value), self.seconds))
        return completed

    def _take(self, point: MetricPoint) -> None:
        name = point.name
        if not math.isfinite(point.value):
            self._totals[name] = self._totals.get(name, 0) + 1
            counter = f"nonfinite/{name}"
            self._counts[counter] = point._replace(name=counter, value=float(self._totals[name]))
            self._gaps[name] = point._replace(value=math.nan)
            return
        self._gaps.pop(name, None)
        if name not in self._lowest or point.value < self._lowest[name].value:
            self._lowest[name] = point
        if name not in self._highest or point.value > self._highest[name].value:
            self._highest[name] = point
        self._last[name] = point

    def _drain(self) -> list[MetricPoint]:
        """The open bucket's points, which is empty afterwards."""
        series = (self._lowest, self._highest, self._counts, self._gaps)
        points = {point for kind in series for point in kind.values()}
        for kind in series:
            kind.clear()
        self._last = {name: point for name, point in self._last.items() if point not in points}
        return sorted(points, key=lambda point: (point.iteration, point.name))

    def flush(self) -> list[MetricPoint]:
        """Close the open bucket: its points and every series' very last value, for the end of a run."""
        points = set(self._drain()) | set(self._last.values())
        return sorted(points, key=lambda point: (point.iteration, point.name))


def _number(value: object) -> float:
    """``value`` as a float; NaN where it is absent or no number."""
    return float(value) if isinstance(value, int | float) else math.nan
