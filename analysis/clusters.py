"""Where in training the rows behind a run's events lie: ranges of the time t, and branches.

An event lists the rows of the term that spiked, the largest loss first, each with its source time and its branch
(docs/stability.md). The *worst* rows of an event are the first eighth of them, or all where only non-finite rows are
listed. Do they gather somewhere? For every window of t and every branch the number K of worst rows inside is compared
with what drawing as many rows at random from the same events gives,

    z = (K − E K) / sd K,   E K = Σ k·m/n   (k worst of n rows of an event, m of the n inside),

and the largest z over all windows and branches with its own law under such draws: the max-T permutation test of
Westfall and Young (1993), which keeps 5 % over all of them together. Events that list nothing but non-finite rows are
compared with the rows that other events list of the same term.

*When to trust it*: losses have a profile in t on quiet steps, too, and an event does not know it. What is found is
where the largest losses of the events lie; a run without that branch, or with other times, says whether it matters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.intervals import LEVEL
from twinrl.stability.events import NONFINITE, SPIKE

BINS = 20  # of t, and windows are up to half of [0, 1]
WORST_SHARE = 8
DRAWS = 2000
FEWEST_EVENTS = 2


@dataclass(frozen=True)
class Cluster:
    """A range of t or a branch in which the worst rows of events gather.

    Attributes:
        where: in words, e.g. ``t 0.80–0.90`` or ``branch mul``.
        count: worst rows inside, of ``worst``. expected: how many there would be by chance.
        events: events with a worst row inside, of ``judged``.
        p: corrected for all windows and branches.
    """

    where: str
    count: int
    worst: int
    expected: float
    events: int
    judged: int
    p: float


@dataclass(frozen=True)
class Placed:
    """The rows of one event.

    Attributes:
        step: of the event. t: (n,) source times. branch: (n,) names. worst: how many of them, from the first, are.
        pool_t, pool_branch: (m,) of the rows that could have been worst, to draw from at random.
    """

    step: int
    t: np.ndarray
    branch: np.ndarray
    worst: int
    pool_t: np.ndarray
    pool_branch: np.ndarray


def placed(events: Sequence[Mapping[str, Any]], kinds: Sequence[str] = (SPIKE, NONFINITE)) -> list[Placed]:
    """The events that can be judged: they name a term, and there are other rows of it to compare with."""
    known = [e for e in events if e["kind"] in kinds and e.get("terms") and e.get("t") and e.get("branches")]
    pools: dict[str, list[Mapping[str, Any]]] = {}
    for event in known:
        if event["kind"] != NONFINITE:
            pools.setdefault(event["terms"][0], []).append(event)
    found = []
    for event in known:
        pool = pools.get(event["terms"][0], []) if event["kind"] == NONFINITE else [event]
        t, branch = np.array(event["t"], float), np.array(event["branches"])
        worst = len(t) if event["kind"] == NONFINITE else max(1, len(t) // WORST_SHARE)
        pool_t = np.concatenate([np.array(e["t"], float) for e in pool] or [np.zeros(0)])
        if worst < len(pool_t):
            names = np.concatenate([np.array(e["branches"]) for e in pool])
            found.append(Placed(int(event["step"]), t, branch, worst, pool_t, names))
    return found


def clusters(events: Sequence[Mapping[str, Any]], draws: int = DRAWS, seed: int = 0) -> list[Cluster]:
    """Ranges of t and branches that the worst rows of the events share more than chance has it, the surest first.

    Windows that overlap a surer one are left out; none where fewer than two events can be judged.

    Arguments:
        events: lines of ``events.jsonl``; those without times and branches are passed over.
        draws: at random, for the p-values (the smallest is 1/(draws + 1)). seed: of these draws.
    """
    cases = placed(events)
    if len(cases) < FEWEST_EVENTS:
        return []
    regions = _regions(cases)
    counts, expected, spread, events_in = _counts(cases, regions)
    varied = np.flatnonzero(spread > 0)
    if not len(varied):
        return []
    z = (counts - expected)[varied] / spread[varied]
    null = _largest(cases, [regions[k] for k in varied], expected[varied], spread[varied], draws, seed)
    found: list[tuple[Region, Cluster]] = []
    for k in np.argsort(-z, kind="stable"):
        region, p = regions[varied[k]], float((1 + (null >= z[k] - 1e-9).sum()) / (1 + draws))
        inside = int(events_in[varied[k]])
        if p >= 1 - LEVEL or inside < FEWEST_EVENTS or any(region.overlaps(other) for other, _ in found):
            continue
        worst = sum(case.worst for case in cases)
        row = int(counts[varied[k]]), worst, float(expected[varied[k]]), inside, len(cases), p
        found.append((region, Cluster(region.words, *row)))
    return [cluster for _, cluster in found]


@dataclass(frozen=True)
class Region:
    """A window of t, [low, high) or up to 1 with its end, or a branch."""

    low: float = 0.0
    high: float = 0.0
    branch: str = ""

    @property
    def words(self) -> str:
        """For people."""
        return f"branch {self.branch}" if self.branch else f"t {self.low:.2f}–{self.high:.2f}"

    def overlaps(self, other: "Region") -> bool:
        """Whether both are windows that share some t."""
        return not (self.branch or other.branch) and self.low < other.high and other.low < self.high


def _regions(cases: Sequence[Placed]) -> list[Region]:
    edges = np.linspace(0, 1, BINS + 1).round(10)
    windows = [Region(low, high) for k, low in enumerate(edges) for high in edges[k + 1 : k + 1 + BINS // 2]]
    present = sorted({str(name) for case in cases for name in case.pool_branch})
    return windows + [Region(branch=name) for name in present if len(present) > 1]


def _inside(regions: Sequence[Region], t: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """(n, regions) whether each row lies in each region, as numbers."""
    low, high = np.array([region.low for region in regions]), np.array([region.high for region in regions])
    named = np.array([region.branch for region in regions])
    in_window = (named == "") & (t[:, None] >= low) & ((t[:, None] < high) | (high >= 1))
    return (in_window | (branch[:, None] == named)).astype(np.float32)


def _counts(
    cases: Sequence[Placed], regions: Sequence[Region]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """By region: worst rows inside, their expectation and deviation under random draws, events with one inside."""
    counts, expected, variance, events_in = np.zeros((4, len(regions)))
    for case in cases:
        inside = _inside(regions, case.t[: case.worst], case.branch[: case.worst]).sum(0)
        share = _inside(regions, case.pool_t, case.pool_branch).mean(0, dtype=float)
        n, k = len(case.pool_t), case.worst
        counts += inside
        events_in += inside > 0
        expected += k * share
        variance += k * share * (1 - share) * (n - k) / (n - 1)  # hypergeometric
    return counts, expected, np.sqrt(variance), events_in


def _largest(
    cases: Sequence[Placed], regions: Sequence[Region], expected: np.ndarray, spread: np.ndarray, draws: int, seed: int
) -> np.ndarray:
    """(draws,) largest z over the regions where each event's worst rows are drawn at random from its pool."""
    rng, counts = np.random.default_rng(seed), np.zeros((draws, len(regions)), np.float32)
    for case in cases:
        order = rng.random((draws, len(case.pool_t)), np.float32)
        chosen = np.zeros_like(order)
        np.put_along_axis(chosen, order.argpartition(case.worst - 1, axis=1)[:, : case.worst], 1, axis=1)
        counts += chosen @ _inside(regions, case.pool_t, case.pool_branch)
    return ((counts - expected) / spread).max(1)
