"""Weights of low precision that steps cannot move: an event that names the remedy. Torch-free."""

from collections.abc import Mapping
from typing import Any

from twinrl.run import names
from twinrl.stability.events import UNMOVED, Event
from twinrl.stability.rolling import Episode

REMEDIES = {
    names.UNMOVED: ("weights", "model.dtype=float32, or adapters (model.lora), which are float32"),
    names.UNMOVED_MOMENTS: ("second moments", "model.dtype=float32, or a smaller second value of optim.betas"),
}
"""Series → what stays as it is, and what helps."""
COOLDOWN = 10
"""Measured steps below the limit after which the next one above it is an event again."""


class Precision:
    """Finds steps that leave too large a share of low-precision entries as they are.

    Arguments:
        limit: share from which on it is an event; None: never.
    """

    def __init__(self, limit: float | None):
        self.limit = limit
        self._episodes = {series: Episode(COOLDOWN) for series in REMEDIES}

    def observe(self, step: int, iteration: int, row: Mapping[str, Any]) -> Event | None:
        """The event that begins at a step, whose row may lack the series."""
        begun = [s for s, e in self._episodes.items() if s in row and e.begins(self._above(row[s]))]
        return _event(step, iteration, begun[0], row[begun[0]], self.limit) if begun else None

    def _above(self, share: float) -> bool:
        return self.limit is not None and share >= self.limit

    def state(self) -> dict[str, int]:
        """What a checkpoint must hold."""
        return {series: episode.healthy for series, episode in self._episodes.items()}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on where :meth:`state` was taken; of an older version there is none."""
        self._episodes = {series: Episode(COOLDOWN, state.get(series)) for series in REMEDIES}


def _event(step: int, iteration: int, series: str, share: float, limit: float | None) -> Event:
    what, remedy = REMEDIES[series]
    message = (
        f"{share:.0%} of the {what} with a gradient stay as they are at step {step}: "
        f"the updates are below half a unit of their format; fix: {remedy}"
    )
    return Event(step, iteration, UNMOVED, (), (), message, series=series, value=share, reference=limit)
