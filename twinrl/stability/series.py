"""Streaming detectors over single series: spikes, drifts, limits, non-finite numbers, unscored images. Torch-free.

They work on the logarithm of a *pre-clip* gradient norm, because norms are positive and vary by factors::

    ℓ = log ‖g‖,   m = median(ℓ),   s = max(1.4826·median|ℓ − m|, floor)        over the last 200 steps before this
    spike:  ‖g‖ > 10·exp(m)   or   (ℓ − m)/s > 6
    drift:  m_recent − m_baseline > max(log 2, 3·s_baseline)

Where the thresholds come from: the factor 10 is this project's definition of a spike. ZClip (arXiv:2504.02507)
clips at a z-score of 2.5 after a warm-up of 25 steps, and skip-step rules skip at 6σ over 128 steps. A record of
events wants few false alarms, hence 6; a median and its deviation instead of mean and variance, because a mean
over the past is moved by the very spikes it is to find. PaLM (arXiv:2204.02311) saw loss spikes with clipping
switched on, which is why the norm *before* clipping is watched. StableAdamW (arXiv:2304.13013) calls an RMS of
Adam's g²/v of 2.3 or more an RMS spike, and loss spikes follow it by 1–8 steps: :class:`Limit`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from twinrl.config import Settings, stored
from twinrl.run import names, runlog
from twinrl.stability.events import DRIFT, NONFINITE, SPIKE, UNSCORED, nonfinite
from twinrl.stability.rolling import Episode, Rolling

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """One series at one step, as a detector saw it.

    Attributes:
        step: the step that the row names.
        kind: ``spike``, ``drift``, ``nonfinite`` or ``unscored``.
        series: metric name.
        value: its value; for a drift the recent median.
        reference: what it was compared with: the rolling median, the baseline, the limit; None if non-finite
            or unscored.
        score: how far off it is in robust standard deviations of the log; value/limit at a limit; None if
            non-finite or unscored.
        onset: whether an episode of this kind begins here, in this series.
    """

    step: int
    kind: str
    series: str
    value: float
    reference: float | None
    score: float | None
    onset: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON, non-finite numbers as strings."""
        return {name: runlog.encode(value) for name, value in vars(self).items()}


class Detector(Protocol):
    """Sees every value of a run once, in order, and says what is wrong with it."""

    def observe(self, step: int, values: Values) -> list[Finding]:
        """Findings at this step. A series that ``values`` lack, or hold as None, was not measured at the step."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold, as plain JSON values."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where :meth:`state` was taken."""
        ...


class Spike:
    """A value far above the recent ones, for a step or a few.

    *Every value enters the window, spikes included*, after it was judged. Median and deviation bear it: 20 spikes
    among 200 steps move the scale by 15 %, so one spike does not hide the next (clamping them as ZClip does would
    change nothing: order statistics see only that they are large). And a new level that stays is a spike for
    100 steps at most, in one episode, until it is the median; from there on it is a matter of :class:`Drift`.
    If spikes were kept out, it would be a spike for ever.

    Zeros and non-finite values neither enter the window nor are judged: a term that is switched off has no
    usual norm, and when it is switched on it gets a warm-up of its own. Small histories are judged more
    mildly: with n values the scale is multiplied by ``√(1 + 25/n)``, a margin chosen for the uncertainty of a
    median and a scale taken from n correlated values: 1.41 at the end of the warm-up, 1.06 in a full window.

    The factor knows nothing of noise: where the log varies by σ ≥ 0.8, ordinary values pass it about once in
    1000 steps. Raise ``ratio`` there.

    *When to use*: on each term's pre-clip norm and on the total's; upward only, since a small gradient does no harm.

    Arguments:
        config: thresholds.
        series: metric name.
    """

    class Config(Settings):
        ratio: float = Field(10.0, gt=1, description="a value above this many rolling medians is a spike")
        z: float = Field(6.0, gt=0, description="so is a log-value this many robust standard deviations above")
        window: int = Field(200, ge=2, description="steps in the rolling median")
        warmup: int = Field(25, ge=2, description="values seen before the first is judged")
        floor: float = Field(
            0.1, gt=0, description="smallest scale of the log-value: rises below exp(z·floor) = 1.8 times are noise"
        )
        cooldown: int = Field(10, ge=1, description="healthy steps that end an episode")

    def __init__(self, config: Config, series: str):
        self.config, self.series = config, series
        self._window, self._episode = Rolling(config.window), Episode(config.cooldown)

    def observe(self, step: int, values: Values) -> list[Finding]:
        level = _log(values.get(self.series))
        if level is None:
            return []
        center, score = self._judge(level)
        self._window.push(level)
        if score is None:
            self._episode.begins(False)
            return []
        onset = self._episode.begins(True)
        return [Finding(step, SPIKE, self.series, float(values[self.series]), math.exp(center), score, onset)]

    def _judge(self, level: float) -> tuple[float, float | None]:
        """Rolling median of the log, and the score of a spike; None for a healthy value."""
        config, n = self.config, len(self._window)
        if n < min(config.warmup, config.window):
            return level, None
        center = self._window.median
        excess, widening = level - center, math.sqrt(1 + 25 / n)
        if excess <= config.z * config.floor * widening and excess <= math.log(config.ratio):
            return center, None  # whatever the scale is: it need not be computed
        score = excess / (max(self._window.scale, config.floor) * widening)
        return center, score if score > config.z or excess > math.log(config.ratio) else None

    def state(self) -> dict[str, Any]:
        return {"window": self._window.state(), "healthy": self._episode.healthy}

    def load(self, state: Mapping[str, Any]) -> None:
        self._window = Rolling(self.config.window, state["window"])
        self._episode = Episode(self.config.cooldown, state["healthy"])


class Drift:
    """A level that has risen and stays: the median of the last window against the lowest one so far.

    The baseline is the lowest median of all completed windows after the warm-up, so it follows norms down:
    training that makes its gradients smaller, however slowly, is never a drift, while growth is measured from
    where it began. The rise has to exceed a factor *and* a multiple of the scale within the baseline window.
    One finding is given for a rise; then a new baseline is taken from the next window, so a level that goes
    on rising is found again. Non-finite values and zeros are left out, as by :class:`Spike`; spikes do not
    move a median.

    *When to use*: beside :class:`Spike`, for the climb that has no single bad step. False alarms, measured over
    2000 steps of log-normal noise with σ of 0.1–0.5, even with a correlation of 0.9 from step to step: below
    1 % of series.

    Arguments:
        config: thresholds.
        series: metric name.
    """

    class Config(Settings):
        factor: float = Field(2.0, gt=1, description="a rise of the median by less is no drift")
        z: float = Field(3.0, gt=0, description="nor is one by fewer robust standard deviations of the log")
        window: int = Field(200, ge=2, description="steps in a median")
        warmup: int = Field(100, ge=0, description="first values, which are left out")

    def __init__(self, config: Config, series: str):
        self.config, self.series = config, series
        self._skip = config.warmup
        self._restart()

    def _restart(self) -> None:
        self._window = Rolling(self.config.window)
        self._block, self._baseline, self._scale = 0, math.inf, 0.0

    def observe(self, step: int, values: Values) -> list[Finding]:
        level = _log(values.get(self.series))
        if level is None:
            return []
        if self._skip > 0:
            self._skip -= 1
            return []
        self._window.push(level)
        finding = self._compare(step)
        if finding is not None:
            self._restart()
            return [finding]
        self._update_baseline()
        return []

    def _compare(self, step: int) -> Finding | None:
        """The finding if the last full window lies too far above the baseline."""
        if not self._window.full or self._baseline == math.inf:
            return None
        recent = self._window.median
        rise = recent - self._baseline
        if rise <= math.log(self.config.factor) or rise <= self.config.z * self._scale:
            return None
        score = rise / self._scale if self._scale > 0 else math.inf
        return Finding(step, DRIFT, self.series, math.exp(recent), math.exp(self._baseline), score, True)

    def _update_baseline(self) -> None:
        """After every ``window`` values: the lowest median so far, with the scale within its window."""
        self._block = (self._block + 1) % self.config.window
        if self._block == 0 and self._window.median < self._baseline:
            self._baseline, self._scale = self._window.median, self._window.scale

    def state(self) -> dict[str, Any]:
        return {
            "window": self._window.state(),
            "block": self._block,
            "baseline": runlog.encode(self._baseline),
            "scale": self._scale,
            "skip": self._skip,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self._window = Rolling(self.config.window, state["window"])
        self._block, self._skip = stored.count(state["block"]), stored.count(state["skip"])
        self._baseline, self._scale = stored.number(state["baseline"]), stored.finite(state["scale"])


class Limit:
    """A value at or above a fixed limit; found as ``spike``, the series tells which.

    *When to use*: on ``opt/rms_max`` with the limit 2.3 of StableAdamW (arXiv:2304.13013), as an early sign.

    Arguments:
        series: metric name. limit: smallest value found. cooldown: healthy steps that end an episode.
    """

    def __init__(self, series: str, limit: float, cooldown: int = 10):
        self.series, self.limit = series, limit
        self._episode = Episode(cooldown)

    def observe(self, step: int, values: Values) -> list[Finding]:
        value = values.get(self.series)
        if value is None or not math.isfinite(value):
            return []
        onset = self._episode.begins(value >= self.limit)
        if value < self.limit:
            return []
        return [Finding(step, SPIKE, self.series, float(value), self.limit, value / self.limit, onset)]

    def state(self) -> dict[str, Any]:
        return {"healthy": self._episode.healthy}

    def load(self, state: Mapping[str, Any]) -> None:
        self._episode = Episode(self._episode.cooldown, state["healthy"])


class NonFinite:
    """Any nan or infinity among the watched series.

    *When to use*: always; the other detectors leave non-finite values to this one.

    Arguments:
        series: metric names. cooldown: finite steps that end an episode, for each series.
    """

    def __init__(self, series: Sequence[str], cooldown: int = 10):
        self.series, self.cooldown = tuple(series), cooldown
        self._episodes = {name: Episode(cooldown) for name in self.series}

    def observe(self, step: int, values: Values) -> list[Finding]:
        measured = {name: values[name] for name in self.series if values.get(name) is not None}
        bad = dict.fromkeys(nonfinite(measured))
        onsets = {name: self._episodes[name].begins(name in bad) for name in measured}
        return [Finding(step, NONFINITE, name, float(measured[name]), None, None, onsets[name]) for name in bad]

    def state(self) -> dict[str, Any]:
        return {"healthy": {name: episode.healthy for name, episode in self._episodes.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        self._episodes = {name: Episode(self.cooldown, state["healthy"][name]) for name in self.series}


class Unscored:
    """Images for which the reward gave no finite number: their share in a step, above 0.

    *When to use*: always. It is no trouble of training, where such an image gets no pull and the step is healthy.

    Arguments:
        cooldown: steps in a row without such images that end an episode.
    """

    def __init__(self, cooldown: int = 10):
        self._episode = Episode(cooldown)

    def observe(self, step: int, values: Values) -> list[Finding]:
        share = values.get(names.REWARD_NONFINITE)
        if share is None:
            return []
        onset = self._episode.begins(share > 0)
        return [Finding(step, UNSCORED, names.REWARD_NONFINITE, float(share), None, None, onset)] if share > 0 else []

    def state(self) -> dict[str, Any]:
        return {"healthy": self._episode.healthy}

    def load(self, state: Mapping[str, Any]) -> None:
        self._episode = Episode(self._episode.cooldown, state["healthy"])


def _log(value: Any) -> float | None:
    """log of a positive finite number; None for everything else: not measured, switched off, or non-finite."""
    return math.log(value) if value is not None and 0 < value < math.inf else None
