"""Where the host waits for the device.

item      a number is asked for: ``.item()``, ``float()``, ``bool()``, ``if tensor``
to host   a tensor is copied to the host
to device a tensor is copied to the device from memory that is not pinned
index     a CPU tensor indexes one on the device: torch copies it
shape     a size depends on values: ``nonzero``, a boolean mask as index
stream    the program waits for a stream or an event
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from twinrl.machine.simulated.places import Places

QUEUED = 100
"""Operations since the last wait, from which on the device is taken to have work queued, and runs dry."""


class Wait(NamedTuple):
    """Waits of one kind at one line.

    Attributes:
        kind: see the module. line: of the program.
        times: how often. queued: of these, with work queued. bytes: that are copied.
    """

    kind: str
    line: str
    times: int
    queued: int
    bytes: int


@dataclass
class Waits:
    """Counts them."""

    places: Places
    operations: int = 0
    _last: int = 0
    _count: Counter[tuple[str, str]] = field(default_factory=Counter)
    _queued: Counter[tuple[str, str]] = field(default_factory=Counter)
    _bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, kind: str, size: int = 0) -> None:
        """The host waits now."""
        key = kind, self.places.here().line
        self._count[key] += 1
        self._queued[key] += self.operations - self._last >= QUEUED
        self._bytes[key] += size
        self._last = self.operations

    def forget(self) -> None:
        """Start to count again."""
        for counter in (self._count, self._queued, self._bytes):
            counter.clear()
        self._last = self.operations

    def found(self) -> list[Wait]:
        """All, the most frequent first."""
        return [Wait(*key, n, self._queued[key], self._bytes[key]) for key, n in self._count.most_common()]
