"""What watches a run: a detector on every gradient norm, and which term was first. Torch-free.

The trainer asks :class:`Watch` at every step; analysis feeds the rows of a finished log to :func:`scan`. It is
the same code, so a study finds in a log what the run itself found. What the single detectors do, with formulas,
thresholds and their sources, is in :mod:`twinrl.stability.series`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from twinrl.config import Settings, stored
from twinrl.config.errors import InputError
from twinrl.run import names, runlog
from twinrl.stability.events import DRIFT, NONFINITE, SPIKE, UNSCORED, Event, Suspects
from twinrl.stability.rolling import Episode
from twinrl.stability.series import Detector, Drift, Finding, Limit, NonFinite, Spike, Unscored, Values

__all__ = [
    "Detector",
    "Drift",
    "Finding",
    "Leading",
    "Limit",
    "NonFinite",
    "Spike",
    "Unscored",
    "Watch",
    "episodes",
    "leading_term",
    "scan",
    "term_of",
    "terms_in",
]

SuspectsOf = Callable[[str, str | None], Suspects]
"""Kind of trouble, and a term or None for the whole batch → the data rows behind it, the most conspicuous first."""
NORM, SHARE, TOTAL = "norm_raw", "share", "total"
REWARD_OWNER = "reward"
"""Whose an event is that names images without a score."""


class Watch:
    """All detectors of a run: spikes and drifts of every term's gradient norm and of the total's, non-finite values,
    images without a score.

    Series that a row lacks are not judged at that step, so a run without per-term gradients is watched by its
    total norm and its losses alone. The watch sees iterations in their order and keeps no steps: after a
    rollback it goes on with what it has seen, the spike that caused the rollback included, as the log does. A rollback
    ends the episodes alone (:meth:`end_episodes`).

    *When to use*: one for a run. At every step it is told the values that there are before the optimizer's step and
    those that there are after it (:meth:`observe`), and then asked for the :meth:`events`. For finished logs
    :func:`scan`.

    Arguments:
        config: thresholds.
        terms: names of the loss terms.
    """

    class Config(Settings):
        spike: Spike.Config = Field(Spike.Config(), description="a gradient norm far above its rolling median")
        drift: Drift.Config = Field(Drift.Config(), description="a gradient norm whose level has risen")
        rms_limit: float | None = Field(
            None, gt=0, description=f"{names.RMS_MAX} from here on is a spike, 2.3 in StableAdamW; null = not watched"
        )
        history: int = Field(8, ge=1, description="steps whose gradient shares an event keeps")

    def __init__(self, config: Config, terms: Sequence[str]):
        self.config, self.terms = config, tuple(terms)
        norms = [names.grad(term, NORM) for term in terms] + [names.GRAD_TOTAL_RAW]
        losses = [names.loss(term) for term in terms] + [names.LOSS_TOTAL]
        cooldown = config.spike.cooldown
        self._detectors: dict[str, Detector] = {NONFINITE: NonFinite(losses + norms, cooldown)}
        self._detectors |= {f"{SPIKE} {series}": Spike(config.spike, series) for series in norms}
        self._detectors |= {f"{DRIFT} {series}": Drift(config.drift, series) for series in norms}
        if config.rms_limit is not None:
            self._detectors[f"{SPIKE} {names.RMS_MAX}"] = Limit(names.RMS_MAX, config.rms_limit, cooldown)
        self._detectors[UNSCORED] = Unscored(cooldown)
        self._shares: deque[dict[str, float]] = deque(maxlen=config.history)
        self._episodes = {
            NONFINITE: Episode(cooldown),
            SPIKE: Episode(cooldown),
            DRIFT: Episode(config.drift.window),
            UNSCORED: Episode(cooldown),
        }

    def observe(self, step: int, values: Values) -> list[Finding]:
        """What is wrong with the values of one step, in any series.

        Arguments:
            step: step number of the findings. values: a log row, or a part of what will be one, each series in one
                part; other names are ignored.
        """
        return [finding for detector in self._detectors.values() for finding in detector.observe(step, values)]

    def begins(self, kind: str) -> bool:
        """Whether trouble of this kind, found before this step's :meth:`events`, begins an episode."""
        return self._episodes[kind].over

    def events(
        self,
        found: Sequence[Finding],
        iteration: int,
        values: Values,
        rows_of: SuspectsOf = lambda kind, term: Suspects(),
    ) -> list[Event]:
        """One event for each kind of trouble that begins at this step; to be asked at every step, healthy ones too.

        An episode spans all series, whatever the :attr:`Finding.onset` of each: a term that spikes and, two steps
        later, the total and the other terms that it upset are one event, which names the term that was first. It
        ends with the cooldown of the spikes; for drifts, with one window.

        Arguments:
            found: all findings at this step.
            iteration, values: of this step; the gradient shares are taken from the values.
            rows_of: data rows with their times and branches; called for an event only.
        """
        shares = {term: values.get(names.grad(term, SHARE)) for term in self.terms}
        self._shares.append({term: float(share) for term, share in shares.items() if share is not None})
        by_kind = {kind: [finding for finding in found if finding.kind == kind] for kind in self._episodes}
        begun = [kind for kind, episode in self._episodes.items() if episode.begins(bool(by_kind[kind]))]
        return [self._event(by_kind[kind], iteration, rows_of) for kind in begun]

    def _event(self, found: list[Finding], iteration: int, rows_of: SuspectsOf) -> Event:
        """One event of findings of one kind at one step: about the most conspicuous term, else about the total."""
        found = sorted(found, key=_conspicuous, reverse=True)
        terms = tuple(dict.fromkeys(term for finding in found if (term := term_of(finding.series))))
        worst = next((finding for finding in found if term_of(finding.series)), found[0])
        terms = (REWARD_OWNER,) if worst.kind == UNSCORED else terms
        suspects = rows_of(worst.kind, terms[0] if terms else None)
        return Event(
            worst.step,
            iteration,
            worst.kind,
            terms,
            suspects.rows,
            _message(worst, suspects.rows),
            shares=self.shares(),
            series=worst.series,
            value=worst.value,
            reference=worst.reference,
            t=suspects.t,
            branches=suspects.branches,
        )

    def shares(self) -> dict[str, tuple[float, ...]]:
        """Term → its signed gradient shares in the last steps for which they were measured, oldest first."""
        series = {term: tuple(s[term] for s in self._shares if term in s) for term in self.terms}
        return {term: shares for term, shares in series.items() if shares}

    def end_episodes(self) -> None:
        """After a rollback: trouble that comes back is an event again, upon which the policy acts again."""
        for episode in self._episodes.values():
            episode.healthy = episode.cooldown

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as plain JSON values."""
        return {
            "detectors": {name: detector.state() for name, detector in self._detectors.items()},
            "episodes": {kind: episode.healthy for kind, episode in self._episodes.items()},
            "shares": [{term: runlog.encode(share) for term, share in step.items()} for step in self._shares],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken.

        Raises:
            InputError: the state is of a watch over other series.
        """
        different = sorted((set(state["detectors"]) ^ set(self._detectors)) - {UNSCORED})  # older states lack it
        if different:
            raise InputError(
                "the saved detectors watch other series",
                got=f"a difference in {', '.join(different[:3])}",
                fix="resume with the terms and the rms_limit of the checkpoint",
            )
        for name, saved in state["detectors"].items():
            self._detectors[name].load(saved)
        for kind, healthy in state["episodes"].items():
            self._episodes[kind] = Episode(self._episodes[kind].cooldown, healthy)
        steps = [{term: stored.number(share) for term, share in step.items()} for step in state["shares"]]
        self._shares = deque(steps, maxlen=self.config.history)


def _conspicuous(finding: Finding) -> float:
    """Sort key within a step: how far off a value is."""
    return 0.0 if finding.score is None else finding.score


def _message(finding: Finding, rows: Sequence[int]) -> str:
    """One line for people."""
    if finding.kind == UNSCORED:
        shown = ", ".join(map(str, rows[:3]))
        return f"the reward is not finite for data row {shown} at step {finding.step}; it did not pull there"
    if finding.reference is None:
        return f"non-finite {finding.series} at step {finding.step}"
    times = f"{finding.value / finding.reference:.3g} times {finding.reference:.3g}"
    return f"{finding.kind} of {finding.series} at step {finding.step}: {finding.value:.3g}, {times}"


# --- names ------------------------------------------------------------------------------------------------


def term_of(series: str) -> str | None:
    """The loss term of a ``loss/<term>`` or ``grad/<term>/norm_raw`` series; None for totals and other series."""
    for template in (names.loss("\n"), names.grad("\n", NORM)):
        prefix, suffix = template.split("\n")
        term = series.removeprefix(prefix).removesuffix(suffix)
        if series == f"{prefix}{term}{suffix}" and term != TOTAL:
            return term
    return None


def terms_in(rows: Iterable[Values]) -> list[str]:
    """The loss terms whose losses or gradient norms the rows have, sorted."""
    series = {name for row in rows for name in row}
    return sorted({term for name in series if (term := term_of(name))})


# --- logs -------------------------------------------------------------------------------------------------


def scan(rows: Iterable[Values], config: Watch.Config | None = None) -> list[Finding]:
    """All findings in the rows of a log, e.g. of :func:`twinrl.run.runlog.read`.

    Arguments:
        rows: log rows with ``step``, in the order of the log; non-finite numbers as floats.
        config: thresholds; None = the defaults. The terms are those whose losses or norms the rows have.
    """
    rows = list(rows)
    watch = Watch(config or Watch.Config(), terms_in(rows))
    return [finding for row in rows for finding in watch.observe(row["step"], row)]


def episodes(findings: Iterable[Finding], cooldown: int = 10) -> list[list[Finding]]:
    """The spikes and non-finite values among ``findings``, as one list for each episode over all series.

    Arguments:
        findings: in the order of :func:`scan`. cooldown: as in :class:`Spike`.
    """
    grouped: list[list[Finding]] = []
    for finding in findings:
        if finding.kind not in (SPIKE, NONFINITE):
            continue
        if not grouped or not 0 <= finding.step - grouped[-1][-1].step <= cooldown:
            grouped.append([])
        grouped[-1].append(finding)
    return grouped


@dataclass(frozen=True)
class Leading:
    """The term that was first in an episode.

    Attributes:
        term: its name.
        step: where it was found first.
        lead: steps before the total norm or loss was found, negative = after it; None if the total never was.
    """

    term: str
    step: int
    lead: int | None


def leading_term(episode: Sequence[Finding]) -> Leading | None:
    """The term whose norm (or loss) was first in an episode, and by how many steps before the total.

    Of several at the same step it is the one with the highest score. None where no term was found.

    *When to use*: ``[leading_term(e) for e in episodes(scan(rows))]``.
    """
    of_terms = [finding for finding in episode if term_of(finding.series)]
    if not of_terms:
        return None
    first = min(of_terms, key=lambda finding: (finding.step, -_conspicuous(finding)))
    totals = [f.step for f in episode if f.series in (names.GRAD_TOTAL_RAW, names.LOSS_TOTAL)]
    term = term_of(first.series)
    assert term is not None
    return Leading(term, first.step, min(totals) - first.step if totals else None)
