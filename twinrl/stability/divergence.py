"""Divergence: the absorbing outcome of a run, from its log rows alone. Torch-free.

A run has diverged when numbers became non-finite, or when its samples got worse and a judge confirms it::

    worse:       q > q_best + absolute + relative·max(q_best, 0)             q = val/quality, lower is better
    confirmed:   accuracy < floor   or   recall < floor
    diverged:    worse and confirmed at m evaluations in a row;  the step of divergence is the first of them

``val/quality`` is a kernel distance (KID, arXiv:1801.01401): unbiased, hence near 0 and at times slightly negative
for good samples. A factor on the best value alone would be meaningless there, so the margin is absolute *and*
relative; its unit depends on the judge's features. That is why a judge has to confirm: a good run whose distance
wavers by a few tenths keeps its accuracy, samples that fell apart lose it, and samples that all look alike
(a hacked reward, a collapsed mode) lose recall. Non-finite values count as worse and as below a floor.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from twinrl.config import Settings
from twinrl.stability.events import DIVERGED, Event
from twinrl.tracking import names, runlog

Row = Mapping[str, Any]
NONFINITE_PARAMETERS = names.event("nonfinite_parameters")
"""1 in the row of a step after which a parameter is not finite."""


@dataclass(frozen=True)
class Diverged:
    """That a run has diverged, and from when on.

    Attributes:
        step: where it began: the first row of the stretch.
        detected: where it was certain: the last row of the stretch.
        series: the metric that tells: ``val/quality``, a loss, or ``event/nonfinite_parameters``.
        value: its value at ``step``.
        reference: the best quality before; None for non-finite numbers.
        message: one line for people.
    """

    step: int
    detected: int
    series: str
    value: float
    reference: float | None
    message: str

    def event(self, iteration: int, rows: tuple[int, ...] = ()) -> Event:
        """The divergence as an event, recorded at ``iteration`` (of the detection)."""
        return Event(
            self.step,
            iteration,
            DIVERGED,
            (),
            rows,
            self.message,
            series=self.series,
            value=self.value,
            reference=self.reference,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON, non-finite numbers as strings."""
        return {name: runlog.encode(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Diverged":
        """The inverse of :meth:`as_dict`."""
        return cls(**{name: runlog.decode(value) for name, value in plain.items()})  # type: ignore[arg-type]


@dataclass
class Stretch:
    """Bad rows in a row: how many, where the first was, and what it showed."""

    length: int = 0
    step: int = 0
    value: float = 0.0

    def extend(self, step: int, value: float) -> int:
        """Count a bad row; the length so far."""
        if self.length == 0:
            self.step, self.value = step, value
        self.length += 1
        return self.length


class Divergence:
    """Says whether and when a run has diverged. Absorbing: what comes after the first divergence is not looked at.

    A run that never got good is not found by its quality: nothing is worse than its best. Studies tell such runs
    from survivors by the final table.

    *When to use*: one for a run, told of every log row; :func:`first_divergence` for a finished log.

    Arguments:
        config: margins and floors.
        nfe: network evaluations of the samples behind ``val/quality`` (the first entry of ``evaluation.nfe``):
            the judge's accuracy and recall of the same samples confirm it. Quality alone decides at an
            evaluation that has neither, and where both floors are 0.
    """

    class Config(Settings):
        absolute: float = Field(0.05, ge=0, description="quality may be worse than its best by this …")
        relative: float = Field(0.5, ge=0, description="… plus this share of the best, where that is positive")
        evaluations: int = Field(2, ge=1, description="bad evaluations in a row (m) that make a divergence")
        accuracy_floor: float = Field(0.5, ge=0, le=1, description="judge accuracy below confirms; 0 = not asked")
        recall_floor: float = Field(0.1, ge=0, le=1, description="recall below confirms; 0 = not asked")
        after: int = Field(0, ge=0, description="evaluations up to this step do not count (start-up transients)")
        nonfinite_steps: int = Field(
            1, ge=1, description="steps in a row with a non-finite loss; more than 1 where a policy skips them"
        )

    def __init__(self, config: Config, nfe: int = 1):
        self.config = config
        self.outcome: Diverged | None = None
        floors = {"accuracy": config.accuracy_floor, "recall": config.recall_floor}
        self._floors = {names.val(quantity, nfe): floor for quantity, floor in floors.items() if floor > 0}
        self._best, self._bad, self._nonfinite = math.inf, Stretch(), Stretch()

    def observe(self, step: int, row: Row) -> Diverged | None:
        """The divergence, once, at the row that makes it certain; ``outcome`` keeps it."""
        if self.outcome is not None:
            return None
        self.outcome = self._numbers(step, row) or self._quality(step, row)
        return self.outcome

    def _numbers(self, step: int, row: Row) -> Diverged | None:
        """Non-finite parameters at once; non-finite losses after ``nonfinite_steps`` in a row."""
        if row.get(NONFINITE_PARAMETERS):
            return Diverged(step, step, NONFINITE_PARAMETERS, 1.0, None, f"non-finite parameters after step {step}")
        losses = {name: row[name] for name in row if name.startswith(names.loss("")) and row[name] is not None}
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if losses and not bad:
            self._nonfinite = Stretch()
        if not bad or self._nonfinite.extend(step, float(losses[bad[0]])) < self.config.nonfinite_steps:
            return None
        start = self._nonfinite
        return Diverged(start.step, step, bad[0], start.value, None, f"non-finite {bad[0]} at step {start.step}")

    def _quality(self, step: int, row: Row) -> Diverged | None:
        """Quality beyond the margin and the judge's confirmation, at enough evaluations in a row."""
        quality = row.get(names.VAL_QUALITY)
        if quality is None or step <= self.config.after:
            return None
        if quality <= self.limit or not self._confirmed(row):
            self._bad = Stretch()
            self._best = min(self._best, quality) if math.isfinite(quality) else self._best
            return None
        if self._bad.extend(step, float(quality)) < self.config.evaluations:
            return None
        start, best = self._bad, self._best if math.isfinite(self._best) else None
        against = "" if best is None else f", best before {best:.3g}"
        message = f"samples fell apart at step {start.step}: quality {start.value:.3g}{against}"
        return Diverged(start.step, step, names.VAL_QUALITY, start.value, best, message)

    @property
    def limit(self) -> float:
        """The quality above which an evaluation is bad; infinite before the first finite one."""
        if self._best == math.inf:
            return math.inf
        return self._best + self.config.absolute + self.config.relative * max(self._best, 0.0)

    def _confirmed(self, row: Row) -> bool:
        """Whether the judge is below a floor, as nan is; or is not asked."""
        measured = {name: row[name] for name in self._floors if row.get(name) is not None}
        return not measured or any(not value >= self._floors[name] for name, value in measured.items())

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as plain JSON values."""
        stretches = {"bad": self._bad, "nonfinite": self._nonfinite}
        plain = {key: {n: runlog.encode(v) for n, v in vars(stretch).items()} for key, stretch in stretches.items()}
        outcome = None if self.outcome is None else self.outcome.as_dict()
        return {"best": runlog.encode(self._best), **plain, "outcome": outcome}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken."""
        self._best = float(state["best"])
        for name, stretch in (("_bad", state["bad"]), ("_nonfinite", state["nonfinite"])):
            setattr(self, name, Stretch(stretch["length"], stretch["step"], float(stretch["value"])))
        self.outcome = None if state["outcome"] is None else Diverged.from_dict(state["outcome"])


def first_divergence(rows: Iterable[Row], config: Divergence.Config | None = None, nfe: int = 1) -> Diverged | None:
    """The divergence of a finished log, e.g. of :func:`twinrl.tracking.runlog.rows`; None if it survived.

    Arguments:
        rows: log rows with ``step``, in the order of the log; non-finite numbers as floats.
        config: margins and floors; None = the defaults. nfe: as for :class:`Divergence`.
    """
    divergence = Divergence(config or Divergence.Config(), nfe)
    return next((found for row in rows if (found := divergence.observe(row["step"], row))), None)
