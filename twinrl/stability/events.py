"""Events: what went wrong in a step, as data. Torch-free."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

NONFINITE = "nonfinite"


@dataclass(frozen=True)
class Event:
    """Something worth studying later.

    Attributes:
        step, iteration: when.
        kind: e.g. ``nonfinite``.
        terms: the loss terms concerned; empty where only the total is.
        rows: data rows concerned (indices into the training split); at most 64 are kept.
        message: one line for people.
    """

    step: int
    iteration: int
    kind: str
    terms: tuple[str, ...]
    rows: tuple[int, ...]
    message: str

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"terms": list(self.terms), "rows": list(self.rows[:64])}


def nonfinite(values: Mapping[str, float]) -> list[str]:
    """The names of the values that are nan or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]
