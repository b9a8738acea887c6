"""Reward hacking: the reward rises while pictures leave real ones, or a held-out judge falls. Torch-free.

    risen:    mean score since the last evaluation − of the reward's first steps  ≥ rise · their spread
    drifted:  |offset| − max(|offset before the reward|, band)                    ≥ drift   of a statistic
    fallen:   offset before the reward − offset                                   ≥ fall    of a held-out judge
    hacking:  risen, and drifted or fallen

Offsets are those of ``val/content/…``: means of a statistic over the evaluation's samples, in deviations of real
pictures. *Before the reward* is the last evaluation before its first step, of which the start's is the first.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from twinrl.config import Settings
from twinrl.config.stored import count, finite
from twinrl.run import names
from twinrl.stability.events import HACKING, Event
from twinrl.stability.rolling import Episode

FIRST = 3
"""Steps of the reward whose scores later ones are measured against."""
BAND = 0.25
"""Offsets within this of real pictures are as good as none: five standard errors of a mean of 400 samples."""
COOLDOWN = 1
"""Evaluations without a sign after which the next one is an event again."""
JUDGE = "held_out/"
"""What the name of a held-out judge's offset begins with."""


class Mean:
    """The mean of numbers as they come.

    Raises:
        ValueError: the state is none.
    """

    def __init__(self, total: float = 0.0, n: int = 0):
        self.total, self.n = finite(total), count(n)

    def add(self, value: float) -> None:
        self.total, self.n = self.total + value, self.n + 1

    @property
    def value(self) -> float:
        return self.total / max(1, self.n)


class Hacking:
    """Watches one run's log rows.

    Arguments:
        config: thresholds; None: watches nothing.
        nfe: network evaluations of the samples that are looked at.
    """

    class Config(Settings):
        rise: float = Field(0.5, gt=0, description="of the reward's mean, in deviations of its first scores")
        drift: float = Field(1.0, gt=0, description="of a statistic away from real pictures, in their deviations")
        fall: float = Field(1.0, gt=0, description="of a held-out judge, in deviations of real pictures")

    def __init__(self, config: "Hacking.Config | None", nfe: int):
        self.config = config
        self._nfe, self._offset = nfe, re.compile(names.content("(.+)", nfe))
        self._before: dict[str, float] = {}
        self._after = 0  # step of the evaluation before the reward
        self._first, self._spread, self._since = Mean(), Mean(), Mean()
        self._episode = Episode(COOLDOWN)

    def begin(self, start: Mapping[str, Any]) -> None:
        """Take the evaluation of the start weights for the one before the reward."""
        self._before = self._offsets(start)

    def observe(self, step: int, iteration: int, row: Mapping[str, Any]) -> Event | None:
        """The event that begins at a log row; to be told of every row."""
        if self.config is None:
            return None
        self._take_score(row)
        offsets = self._offsets(row)
        if not offsets:
            return None
        found = self._sign(step, iteration, offsets) if self._first.n else None
        if not self._first.n:
            self._before, self._after = offsets, step
        self._since = Mean()
        return found if self._episode.begins(found is not None) else None

    def _take_score(self, row: Mapping[str, Any]) -> None:
        mean, spread = (row.get(name) for name in (names.REWARD_MEAN, names.REWARD_STD))
        if mean is None or spread is None or not _finite(mean, spread) or not row.get(names.REWARD_WEIGHT):
            return
        if self._first.n < FIRST:
            self._first.add(mean)
            self._spread.add(spread)
        self._since.add(mean)

    def _offsets(self, row: Mapping[str, Any]) -> dict[str, float]:
        found = {m[1]: row[name] for name in row if (m := self._offset.fullmatch(name))}
        return {name: value for name, value in found.items() if _finite(value)}

    def _sign(self, step: int, iteration: int, offsets: Mapping[str, float]) -> Event | None:
        """The event that this evaluation is, whether or not it is new."""
        assert self.config is not None
        rise = (self._since.value - self._first.value) / max(self._spread.value, 1e-12) if self._since.n else 0.0
        known = [name for name in offsets if name in self._before]
        if not known or rise < self.config.rise:
            return None
        worst = max(known, key=lambda name: self._excess(name, offsets[name]))
        if self._excess(worst, offsets[worst]) < 1:
            return None
        was, now = self._before[worst], offsets[worst]
        judge = worst.startswith(JUDGE)
        what = f"the held-out judge {worst.removeprefix(JUDGE)} fell" if judge else f"{worst} left real pictures"
        return Event(
            step, iteration, HACKING, (), (),
            f"the reward rose by {rise:.1f} deviations of its scores while {what}: {was:+.1f} to {now:+.1f} of their "
            f"deviations; compare the samples of steps {self._after} and {step}",
            series=names.content(worst, self._nfe), value=now, reference=was,
        )  # fmt: skip

    def _excess(self, name: str, now: float) -> float:
        """How far an offset has gone, over what is allowed."""
        assert self.config is not None
        was = self._before[name]
        if name.startswith(JUDGE):
            return (was - now) / self.config.fall
        return (abs(now) - max(abs(was), BAND)) / self.config.drift

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        means = {name: [mean.total, mean.n] for name, mean in self._means().items()}
        return means | {"before": self._before, "after": self._after, "healthy": self._episode.healthy}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state` was taken; of an older version there is none. Raises ValueError: it is none."""
        if not state:
            return
        self._first, self._spread, self._since = (Mean(*state[name]) for name in self._means())
        self._before = {str(name): finite(value) for name, value in state["before"].items()}
        self._after = count(state["after"])
        self._episode = Episode(COOLDOWN, count(state["healthy"]))

    def _means(self) -> dict[str, Mean]:
        return {"first": self._first, "spread": self._spread, "since": self._since}


def _finite(*values: Any) -> bool:
    return all(isinstance(value, int | float) and abs(value) < float("inf") for value in values)
