"""Events: what went wrong in a step, as data. Torch-free.

A spike, a drift or a non-finite number recurs and is studied as a cause, as images are that no reward could score; a
divergence is absorbing and is the outcome. Each becomes one :class:`Event`, a line of ``events.jsonl``, from which
the step can be replayed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from twinrl.run import runlog

NONFINITE = "nonfinite"
SPIKE = "spike"
DRIFT = "drift"
UNSCORED = "unscored"
UNMOVED = "unmoved"
HACKING = "hacking"
DIVERGED = "diverged"
MAX_ROWS = 64


class Suspects(NamedTuple):
    """Data rows behind an event, the most conspicuous first, and where in training each of them was; parallel.

    Attributes:
        rows: indices into the training split.
        t: source times in [0, 1]; empty if not known. Branch ``adv`` is evaluated at −t.
        branches: names of the rows' branches; empty if not known.
    """

    rows: tuple[int, ...] = ()
    t: tuple[float, ...] = ()
    branches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Event:
    """Something worth studying later.

    Attributes:
        step, iteration: when.
        kind: ``nonfinite``, ``spike``, ``drift``, ``unscored``, ``unmoved``, ``hacking`` or ``diverged``.
        terms: the loss terms concerned, the most conspicuous first; empty where only the total is.
        rows: data rows concerned (indices into the training split); at most 64 are kept.
        message: one line for people.
        shares: term → its signed shares ``g_i·g/‖g‖²`` of the gradient in the steps up to this one, oldest
            first; empty where no per-term gradients are measured.
        series: the metric that gave it away, e.g. ``grad/rectify/norm_raw``; empty if it was none in particular.
        value: that metric's value at the step; None without a series.
        reference: what the value was compared with, e.g. the rolling median; None if with nothing.
        t, branches: source time in [0, 1] and branch of each of ``rows``; empty where not known.
    """

    step: int
    iteration: int
    kind: str
    terms: tuple[str, ...]
    rows: tuple[int, ...]
    message: str
    shares: Mapping[str, Sequence[float]] = field(default_factory=dict)
    series: str = ""
    value: float | None = None
    reference: float | None = None
    t: tuple[float, ...] = ()
    branches: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON, non-finite numbers as "nan", "inf", "-inf"; what is not known is left out."""
        known = {name: value for name, value in vars(self).items() if value is not None}
        plain = known | {"terms": list(self.terms)}
        plain |= {name: list(getattr(self, name)[:MAX_ROWS]) for name in ("rows", "t", "branches")}
        plain["shares"] = {term: [runlog.encode(share) for share in shares] for term, shares in self.shares.items()}
        plain |= {name: runlog.encode(plain[name]) for name in ("value", "reference") if name in plain}
        return {
            name: value for name, value in plain.items() if name not in ("shares", "series", "t", "branches") or value
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Event":
        """The inverse of :meth:`as_dict`: a line of ``events.jsonl`` as an event."""
        lists = ("terms", "rows", "t", "branches")
        known: dict[str, Any] = dict(plain) | {name: tuple(plain.get(name, ())) for name in lists}
        known |= {name: runlog.decode(plain[name]) for name in ("value", "reference") if name in plain}
        shares = plain.get("shares", {})
        known["shares"] = {term: tuple(runlog.decode(share) for share in shares[term]) for term in shares}
        return cls(**known)


def nonfinite(values: Mapping[str, float]) -> list[str]:
    """The names of the values that are nan or infinite."""
    return [name for name, value in values.items() if not math.isfinite(value)]
