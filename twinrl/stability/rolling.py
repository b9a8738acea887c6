"""Building blocks of the streaming detectors: a rolling median, and episodes of trouble. Torch-free.

Both keep their state as plain JSON values. Python floats survive JSON bit for bit, so a detector that was saved
and loaded goes on exactly as if it had never stopped.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence

from twinrl.config.stored import count, finite

GAUSSIAN = 1.4826
"""Standard deviation of a normal law in units of its median absolute deviation."""


class Rolling:
    """The last ``size`` numbers, with their median at O(1) and their scale on demand.

    A sorted copy is kept beside the queue, so that a push costs two binary searches instead of a sort.

    Arguments:
        size: how many numbers are remembered.
        values: initial content, oldest first; finite.

    Raises:
        ValueError: a value is no finite number.
    """

    def __init__(self, size: int, values: Iterable[float] = ()):
        self.size = size
        self._queue = deque(map(finite, values), maxlen=size)
        self._sorted = sorted(self._queue)

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether ``size`` numbers have come."""
        return len(self._queue) == self.size

    def push(self, value: float) -> None:
        """Add a finite number; the oldest leaves a full window."""
        if self.full:
            del self._sorted[bisect_left(self._sorted, self._queue[0])]
        self._queue.append(value)
        insort(self._sorted, value)

    @property
    def median(self) -> float:
        """Median of a non-empty window."""
        return _middle(self._sorted)

    @property
    def scale(self) -> float:
        """Median absolute deviation × 1.4826: the standard deviation, if the numbers are normal but for outliers."""
        center = self.median
        return GAUSSIAN * _middle(sorted(abs(value - center) for value in self._sorted))

    def state(self) -> list[float]:
        """The content, oldest first: ``Rolling(size, state)`` is an equal window."""
        return list(self._queue)


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


class Episode:
    """Joins troubled steps to episodes; one ends after ``cooldown`` healthy steps in a row.

    Arguments:
        cooldown: healthy steps after which the next trouble is a new one, ≥ 1.
        healthy: healthy steps so far, at most ``cooldown``; None = no trouble yet.

    Raises:
        ValueError: ``healthy`` is no count.
    """

    def __init__(self, cooldown: int, healthy: int | None = None):
        self.cooldown = cooldown
        self.healthy = cooldown if healthy is None else count(healthy)

    @property
    def over(self) -> bool:
        """Whether the next trouble begins an episode."""
        return self.healthy >= self.cooldown

    def begins(self, troubled: bool) -> bool:
        """Whether this step begins a new episode; to be told of every step, healthy ones too."""
        onset = troubled and self.over
        self.healthy = 0 if troubled else min(self.healthy + 1, self.cooldown)
        return onset
