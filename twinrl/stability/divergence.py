"""Divergence: the absorbing outcome of a run, from its evaluations and log rows alone. Torch-free.

A run has diverged when numbers became non-finite, or when its samples got worse and a judge confirms it::

    worse:       q > q_best + absolute + relative·max(q_best, 0)             q = val/quality, lower is better
    confirmed:   accuracy < floor   or   recall < floor
    diverged:    worse and confirmed at m evaluations in a row;  the step of divergence is the first of them

The evaluation of pretrained start weights, at step 0, is the first best: a run that broke before its first evaluation
in training fell from there. A floor that the start is below (a student of guided samples has hardly any recall)
confirms nothing until an evaluation has met it. All that is known of a fall is that it began after the last evaluation
that was not bad and by the first one that was: in ``(after, step]``.

A run is *whole* at an evaluation where the judge's accuracy is not below its floor. One that is whole at none of its
evaluations has failed by its end, whatever its quality: it fell before the first of them if its start was whole, else
(from random weights, say) it was *never whole*, an outcome of its own. Either counts as failed from the first
evaluation on, as there is none at which it lived.

``val/quality`` is a kernel distance (KID, arXiv:1801.01401): unbiased, hence near 0 and at times slightly negative
for good samples. A factor on the best value alone would be meaningless there, so the margin is absolute *and*
relative; its unit depends on the judge's features. That is why a judge has to confirm: a good run whose distance
wavers by a few tenths keeps its accuracy, samples that fell apart lose it, and samples that all look alike
(a hacked reward, a collapsed mode) lose recall. Non-finite values count as worse and as below a floor.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import Field

from twinrl.config import Settings, stored
from twinrl.run import names, runlog
from twinrl.run.runlog import LogRow
from twinrl.stability.events import DIVERGED, Event

NONFINITE_PARAMETERS = names.event("nonfinite_parameters")
"""1 in the row of a step after which a parameter is not finite."""
NUMBERS, FALL, NEVER_WHOLE = "nonfinite", "quality", "never whole"
"""Kinds of failure: non-finite numbers; samples that fell apart; samples that never were whole."""


@dataclass(frozen=True)
class Diverged:
    """That a run has failed, how, and from when on.

    Attributes:
        step: where it began: the first row of the stretch.
        detected: where it was certain: the last row of the stretch.
        series: the metric that tells: ``val/quality``, the judge's accuracy, a loss, ``event/nonfinite_parameters``.
        value: its value at ``step``.
        reference: the best before; None for non-finite numbers, and where nothing was before.
        message: one line for people.
        kind: ``quality``, ``nonfinite`` or ``never whole``; else the kind of event at which a policy stopped the run.
        after: the last step known to be sound, 0 being the start; the failure began in ``(after, step]``.
        recovered: whether the last evaluation since was not bad any more, and all numbers since are finite.
    """

    step: int
    detected: int
    series: str
    value: float
    reference: float | None
    message: str
    kind: str = FALL
    after: int = 0
    recovered: bool = False

    @property
    def lost(self) -> bool:
        """Whether the run ended as a failure: it did not recover."""
        return not self.recovered

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
        """The inverse of :meth:`as_dict`. Raises ValueError where a value is of another type."""
        return stored.made(cls, {name: runlog.decode(value) for name, value in plain.items()})


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


@dataclass
class QualityHistory:
    """What the evaluations so far have shown of a run that has not failed.

    Attributes:
        start: the judge's accuracy of the start; None where it was not evaluated, or not judged.
        sound: the last step whose evaluation was not bad; 0 is the start.
        first: the first step at which the judge was asked; None before.
        accuracy: what it said there.
        whole: whether the run was whole at any evaluation.
        unmet: floors that the start is below, and every evaluation so far.
    """

    start: float | None = None
    sound: int = 0
    first: int | None = None
    accuracy: float = math.nan
    whole: bool = False
    unmet: tuple[str, ...] = ()


class Divergence:
    """Says whether and when a run has failed. Absorbing: a failure stays one, and may be told as one that recovered.

    *When to use*: one for a run: told of its start by :meth:`begin`, of every log row by :meth:`observe`, and of its
    end by :meth:`conclude`. For the files of a run: :mod:`twinrl.stability.verdict`.

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
        self._accuracy = names.val("accuracy", nfe)
        self._best, self._bad, self._nonfinite, self._judged = math.inf, Stretch(), Stretch(), QualityHistory()

    def begin(self, start: LogRow) -> None:
        """The metrics of the start weights: the reference at step 0."""
        quality = float(start[names.VAL_QUALITY])
        self._best = quality if math.isfinite(quality) else math.inf
        self._judged.start = start.get(self._accuracy)
        self._judged.unmet = tuple(name for name in self._floors if name in start and not self._met(name, start))

    def observe(self, step: int, row: LogRow) -> Diverged | None:
        """The failure, once, at the row that makes it certain; ``outcome`` keeps it, and whether it recovered."""
        if self.outcome is None:
            self.outcome = self._numbers(step, row) or self._quality(step, row)
            return self.outcome
        quality = row.get(names.VAL_QUALITY)
        if self._numbers(step, row) is not None:
            self.outcome = replace(self.outcome, recovered=False)
        elif quality is not None:
            well = math.isfinite(quality) and not self._is_bad(quality, row)
            self.outcome = replace(self.outcome, recovered=well)
        return None

    def conclude(self) -> Diverged | None:
        """The failure, if only the end of the run makes it certain: it was whole at none of its evaluations."""
        judged, floor = self._judged, self.config.accuracy_floor
        if self.outcome is not None or judged.first is None or judged.whole:
            return None
        fell = judged.start is not None and judged.start >= floor
        message = f"at no evaluation was the judge's accuracy {floor:g} or more; {judged.accuracy:.3g} at the first, "
        message += f"step {judged.first}" + (f", and {judged.start:.3g} at the start" if fell else "")
        what = f"samples fell apart by step {judged.first}" if fell else NEVER_WHOLE
        self.outcome = Diverged(
            judged.first, judged.first, self._accuracy, judged.accuracy, judged.start, f"{what}: {message}",
            FALL if fell else NEVER_WHOLE,
        )  # fmt: skip
        return self.outcome

    def _numbers(self, step: int, row: LogRow) -> Diverged | None:
        """Non-finite parameters at once; non-finite losses after ``nonfinite_steps`` in a row."""
        if row.get(NONFINITE_PARAMETERS):
            message = f"non-finite parameters after step {step}"
            return Diverged(step, step, NONFINITE_PARAMETERS, 1.0, None, message, NUMBERS, max(0, step - 1))
        losses = {name: row[name] for name in row if name.startswith(names.loss("")) and row[name] is not None}
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if losses and not bad:
            self._nonfinite = Stretch()
        if not bad or self._nonfinite.extend(step, float(losses[bad[0]])) < self.config.nonfinite_steps:
            return None
        start, message = self._nonfinite, f"non-finite {bad[0]} at step {self._nonfinite.step}"
        return Diverged(start.step, step, bad[0], start.value, None, message, NUMBERS, max(0, start.step - 1))

    def _quality(self, step: int, row: LogRow) -> Diverged | None:
        """Quality beyond the margin and the judge's confirmation, at enough evaluations in a row."""
        quality = row.get(names.VAL_QUALITY)
        if quality is None or step <= self.config.after:
            return None
        self._hear(step, row)
        if not self._is_bad(quality, row):
            self._bad, self._judged.sound = Stretch(), step
            self._best = min(self._best, quality) if math.isfinite(quality) else self._best
            return None
        if self._bad.extend(step, float(quality)) < self.config.evaluations:
            return None
        start, best = self._bad, self._best if math.isfinite(self._best) else None
        against = "" if best is None else f", best before {best:.3g}"
        since = "the start" if self._judged.sound == 0 else f"step {self._judged.sound}"
        message = f"samples fell apart by step {start.step}, after {since}: quality {start.value:.3g}{against}"
        return Diverged(start.step, step, names.VAL_QUALITY, start.value, best, message, FALL, self._judged.sound)

    def _hear(self, step: int, row: LogRow) -> None:
        """Note what the judge says at an evaluation."""
        accuracy, judged = row.get(self._accuracy), self._judged
        judged.unmet = tuple(name for name in judged.unmet if name not in row or not self._met(name, row))
        if accuracy is None or self._accuracy not in self._floors:
            return
        if judged.first is None:
            judged.first, judged.accuracy = step, float(accuracy)
        judged.whole |= accuracy >= self.config.accuracy_floor

    def _is_bad(self, quality: float, row: LogRow) -> bool:
        """Whether an evaluation is worse than the best by more than the margin, and a judge confirms it."""
        return not quality <= self.limit and self._confirmed(row)

    @property
    def limit(self) -> float:
        """The quality above which an evaluation is bad; infinite before the first finite one."""
        if self._best == math.inf:
            return math.inf
        return self._best + self.config.absolute + self.config.relative * max(self._best, 0.0)

    def _confirmed(self, row: LogRow) -> bool:
        """Whether the judge is below a floor, as nan is; or is not asked."""
        measured = [name for name in self._floors if row.get(name) is not None]
        return not measured or any(name not in self._judged.unmet and not self._met(name, row) for name in measured)

    def _met(self, name: str, row: LogRow) -> bool:
        return bool(row[name] >= self._floors[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as plain JSON values."""
        stretches = {"bad": self._bad, "nonfinite": self._nonfinite}
        plain = {key: {n: runlog.encode(v) for n, v in vars(stretch).items()} for key, stretch in stretches.items()}
        outcome = None if self.outcome is None else self.outcome.as_dict()
        judged = {name: runlog.encode(value) for name, value in vars(self._judged).items() if name != "unmet"}
        judged["unmet"] = list(self._judged.unmet)
        return {"best": runlog.encode(self._best), **plain, "judged": judged, "outcome": outcome}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken."""
        self._best = stored.number(state["best"])
        for name, stretch in (("_bad", state["bad"]), ("_nonfinite", state["nonfinite"])):
            found = stored.count(stretch["length"]), stored.count(stretch["step"]), stored.number(stretch["value"])
            setattr(self, name, Stretch(*found))
        judged = state.get("judged", {"whole": True})  # older checkpoints do not say: then the end decides nothing
        plain = {name: runlog.decode(value) for name, value in judged.items() if name != "unmet"}
        self._judged = stored.made(QualityHistory, plain | {"unmet": judged.get("unmet", [])})
        self.outcome = None if state["outcome"] is None else Diverged.from_dict(state["outcome"])


def first_divergence(
    rows: Iterable[LogRow],
    config: Divergence.Config | None = None,
    nfe: int = 1,
    start: LogRow | None = None,
    ended: bool = False,
) -> Diverged | None:
    """The failure of a log, e.g. of :func:`twinrl.run.runlog.rows`, and whether it recovered; None if it is whole.

    Arguments:
        rows: log rows with ``step``, in the order of the log; non-finite numbers as floats.
        config: margins and floors; None = the defaults. nfe: as for :class:`Divergence`.
        start: metrics of the start weights, where they were evaluated. ended: whether the run is over.
    """
    divergence = Divergence(config or Divergence.Config(), nfe)
    if start is not None:
        divergence.begin(start)
    for row in rows:
        divergence.observe(row["step"], row)
    if ended:
        divergence.conclude()
    return divergence.outcome
