"""From a run's numbers to its events: detectors and divergence together, as the trainer uses them. Torch-free."""

from collections.abc import Mapping, Sequence
from typing import Any

from twinrl.stability.detectors import Watch
from twinrl.stability.divergence import Divergence
from twinrl.stability.events import NONFINITE, Event
from twinrl.stability.policy import StabilityConfig
from twinrl.stability.precision import Precision


class Monitor:
    """Watches one run: by the watch step by step, and by :meth:`judge` row by row.

    Arguments:
        config: thresholds.
        terms: names of the gradients that are taken apart.
        nfe: network evaluations of the samples behind ``val/quality``.

    Attributes:
        watch: told of every step; goes on after a rollback.
        divergence: told of every log row; absorbing, so a rollback takes it back to the checkpoint.
        precision: told of every step's row; no policy acts on what it finds.
    """

    def __init__(self, config: StabilityConfig, terms: Sequence[str], nfe: int = 1):
        self.watch = Watch(config.watch, terms)
        self.divergence = Divergence(config.divergence, nfe)
        self.precision = Precision(config.unmoved_limit)

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
        watch = dict(state["watch"])
        if not strict:
            fresh, saved = self.watch.state()["detectors"], watch["detectors"]
            watch["detectors"] = {name: saved.get(name, own) for name, own in fresh.items()}
            healthy = fresh[NONFINITE]["healthy"] | saved[NONFINITE]["healthy"]
            watch["detectors"][NONFINITE] = {"healthy": healthy}
        self.watch.load(watch)
