"""From a run's numbers to its events: detectors and divergence together, as the trainer uses them. Torch-free."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twinrl.stability.detectors import SuspectsOf, Watch
from twinrl.stability.divergence import Divergence
from twinrl.stability.events import NONFINITE, SPIKE, Event
from twinrl.stability.hacking import Hacking
from twinrl.stability.policy import Decision, StabilityConfig
from twinrl.stability.precision import Precision


@dataclass(frozen=True)
class Judgement:
    """What is found at a step, and what to do about it.

    Attributes:
        now: about the step itself and its learning rate.
        afterwards: about what comes too late for the step, not for the rate, a rollback or the end.
        spikes: whether a spike begins an episode, in time and too late.
        events: that begin at this step.
        cause: the event that ends the run or takes it back, if there is one.
        kinds: of everything that was found.
    """

    now: Decision
    afterwards: Decision
    spikes: tuple[bool, bool]
    events: list[Event]
    cause: Event | None
    kinds: frozenset[str]


class Monitor:
    """Watches one run: by the watch step by step, and by :meth:`judge` row by row.

    Arguments:
        config: thresholds.
        terms: names of the gradients that are taken apart.
        nfe: network evaluations of the samples behind ``val/quality``.

    Attributes:
        watch: told of every step; goes on after a rollback.
        divergence: told of every log row; absorbing, so a rollback takes it back to the checkpoint.
        precision, hacking: told of every log row; no policy acts on what they find.
    """

    def __init__(self, config: StabilityConfig, terms: Sequence[str], nfe: int = 1):
        self.config = config
        self.watch = Watch(config.watch, terms)
        self.divergence = Divergence(config.divergence, nfe)
        self.precision = Precision(config.unmoved_limit)
        self.hacking = Hacking(config.hacking, nfe)

    def begin(self, start: Mapping[str, Any]) -> None:
        """Take the metrics of the start weights as what a fall, and a change of pictures, are measured against."""
        self.divergence.begin(start)
        self.hacking.begin(start)

    def step(
        self, step: int, iteration: int, values: Mapping[str, Any], late: Mapping[str, float], rows_of: SuspectsOf
    ) -> Judgement:
        """Judge a step before the optimizer makes it; to be asked at every step, healthy ones too.

        Arguments:
            step, iteration: of the step.
            values: what was measured.
            late: what was measured of the optimizer, which never drops the step.
            rows_of: see :meth:`Watch.events`.
        """
        found = self.watch.observe(step, values)
        kinds = {finding.kind for finding in found}
        now = self.config.decide(kinds)
        later = [] if now.skip else self.watch.observe(step, dict.fromkeys(late, 0.0) if now.zero else late)
        new = {finding.kind for finding in later} - kinds
        afterwards = now if now.skip else self.config.decide(new)  # a step that is made had no end from before
        begins = self.watch.begins(SPIKE)
        events = self.watch.events([*found, *later], iteration, values, rows_of)
        return Judgement(
            now, afterwards, (begins and SPIKE in kinds, begins and SPIKE in new),
            events, self.config.cause(events), frozenset(kinds | new),
        )  # fmt: skip

    def judge(self, step: int, iteration: int, row: Mapping[str, Any]) -> Event | None:
        """The divergence, at the row that makes it certain."""
        found = self.divergence.observe(step, row)
        return None if found is None else found.event(iteration)

    def conclude(self, iteration: int) -> Event | None:
        """The failure that only the end of the run makes certain."""
        found = self.divergence.conclude()
        return None if found is None else found.event(iteration)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return {
            "watch": self.watch.state(),
            "divergence": self.divergence.state(),
            "precision": self.precision.state(),
            "hacking": self.hacking.state(),
        }

    def load(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Continue from a checkpoint's state.

        Arguments:
            state: of :meth:`state`.
            strict: refuse the state of a run with other terms; else only what both have goes on.

        Raises:
            InputError: the terms differ.
        """
        self.divergence.load(state["divergence"])
        self.precision.load(state.get("precision", {}))
        self.hacking.load(state.get("hacking", {}))
        watch = dict(state["watch"])
        if not strict:
            fresh, saved = self.watch.state()["detectors"], watch["detectors"]
            watch["detectors"] = {name: saved.get(name, own) for name, own in fresh.items()}
            healthy = fresh[NONFINITE]["healthy"] | saved[NONFINITE]["healthy"]
            watch["detectors"][NONFINITE] = {"healthy": healthy}
        self.watch.load(watch)
