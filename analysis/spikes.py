"""Anatomy of one run's spikes: which term led, by how many steps, and what could be seen before.

Found with the detectors that the trainer uses (:mod:`twinrl.stability.detectors`), so analysis and events agree.
An episode joins spikes and non-finite values of all gradient norms that follow one another; the term that was
found first leads it. Clustering asks whether the same data rows, or the same leading term, come back.
"""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.frames import Run
from analysis.intervals import number
from twinrl.config.errors import InputError
from twinrl.run import names
from twinrl.run.runlog import LogRow
from twinrl.stability import detectors
from twinrl.stability.events import NONFINITE, SPIKE

if TYPE_CHECKING:
    import pandas as pd

LEAD = 20
"""Steps before a spike in which its causes are looked for."""
BEFORE = 50
"""Steps before that, which say what is usual."""
NEAR = 10
"""Steps between a spike and its event, at most: episodes join what is no further apart."""
FEW_ROWS = 4
"""Data rows of an event that a table names."""
FEWEST_QUIET = 5
"""Quiet places that a comparison takes."""
SHORT = {
    names.RMS_MAX: "RMS_t",
    names.UPDATE_RATIO: "update",
    names.CLAMP_RCGM: "RCGM clamp",
    names.CLAMP_DELTA_V: "Δv clamp",
    names.DELTA_V_RMS: "Δv",
}
"""Indicators, with what they are called on a page."""
INDICATORS = tuple(SHORT)


@dataclass(frozen=True)
class SpikeEpisode:
    """One episode.

    Attributes:
        step: where the total norm stood out first; where nothing but a term did, the term's first step.
        kind: nonfinite if anything was not finite, else spike.
        series: the norm that the next two are of: the total's, or the leader's if the total never stood out.
        value, reference: largest norm of the episode (non-finite ones above all), and the rolling median before it.
        leader: term that was found first; empty if no term stood out.
        lead: steps from that to the total, negative if it came after; NaN if one of them never stood out.
        share: the leader's signed share of the gradient where it was found first; NaN if not measured.
        carrier, carried: the term with the largest share of the gradient at ``step``, and that share.
        cosines: mean cosine of each pair of terms in the steps before.
        indicators: largest value of each leading indicator in the steps before, over its usual value.
    """

    step: int
    kind: str
    series: str
    value: float
    reference: float
    leader: str = ""
    lead: float = math.nan
    share: float = math.nan
    carrier: str = ""
    carried: float = math.nan
    cosines: Mapping[str, float] = field(default_factory=dict)
    indicators: Mapping[str, float] = field(default_factory=dict)


def find(rows: Sequence[LogRow]) -> list[SpikeEpisode]:
    """All spikes of a log, in order.

    Raises:
        InputError: the log has no total gradient norm.
    """
    if not any(names.GRAD_TOTAL_RAW in row for row in rows):
        raise InputError(
            f"the log has no {names.GRAD_TOTAL_RAW}", fix="map the column that holds the gradient norm before clipping"
        )
    numbered = [{**row, "step": k} for k, row in enumerate(rows)]  # a rollback repeats steps, not rows
    return [_dissect(episode, rows) for episode in detectors.episodes(detectors.scan(numbered))]


def _dissect(episode: Sequence[detectors.Finding], rows: Sequence[LogRow]) -> SpikeEpisode:
    """The spike that an episode is; its findings' steps are positions in ``rows``."""
    totals = [finding for finding in episode if finding.series == names.GRAD_TOTAL_RAW]
    shown = totals or [finding for finding in episode if finding.series == episode[0].series]
    at = shown[0].step
    leading = detectors.leading_term(episode)
    window, usual = _windows(rows, at)
    carrier, carried = _largest_share(rows[at])
    return SpikeEpisode(
        step=int(rows[at]["step"]),
        kind=NONFINITE if any(finding.kind == NONFINITE for finding in episode) else SPIKE,
        series=shown[0].series,
        value=max((finding.value for finding in shown), key=_height),
        reference=math.nan if shown[0].reference is None else shown[0].reference,
        leader=leading.term if leading else "",
        lead=math.nan if leading is None or leading.lead is None else leading.lead,
        share=float(rows[leading.step].get(names.grad(leading.term, "share"), math.nan)) if leading else math.nan,
        carrier=carrier,
        carried=carried,
        cosines=_means(window),
        indicators={name: _rise(window, usual, name) for name in INDICATORS if any(name in row for row in rows)},
    )


def _windows(rows: Sequence[LogRow], at: int) -> tuple[Sequence[LogRow], Sequence[LogRow]]:
    """The rows in which causes are looked for, and those that say what is usual."""
    return rows[max(0, at - LEAD) : at], rows[max(0, at - LEAD - BEFORE) : max(0, at - LEAD)]


def _largest_share(row: LogRow) -> tuple[str, float]:
    """The term that makes up most of the gradient, and its share; nothing where shares were not measured."""
    shares = {term: float(row.get(names.grad(term, "share"), math.nan)) for term in detectors.terms_in([row])}
    finite = {term: share for term, share in shares.items() if math.isfinite(share)}
    best = max(finite, key=lambda term: finite[term], default="")
    return best, finite.get(best, math.nan)


def quiet_rises(rows: Sequence[LogRow], spikes: Sequence[SpikeEpisode]) -> dict[str, float]:
    """The median rise of each indicator where no spike follows or went before: what :func:`find`'s are to beat.

    Empty where fewer than :data:`FEWEST_QUIET` places are quiet.
    """
    steps, at = {spike.step for spike in spikes}, range(LEAD + BEFORE, len(rows) - LEAD, LEAD // 2)
    quiet = [k for k in at if not any(int(row["step"]) in steps for row in rows[k - LEAD : k + LEAD])]
    if len(quiet) < FEWEST_QUIET:
        return {}
    rises = {name: [_rise(*_windows(rows, k), name) for k in quiet] for name in INDICATORS}
    return {name: median for name, found in rises.items() if not math.isnan(median := _median(found))}


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def median_rises(spikes: Sequence[SpikeEpisode]) -> dict[str, float]:
    """The median rise of each indicator over spikes; those that were not measured are left out."""
    rises = {name: _median([spike.indicators.get(name, math.nan) for spike in spikes]) for name in INDICATORS}
    return {name: median for name, median in rises.items() if not math.isnan(median)}


def _height(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _means(window: Sequence[LogRow]) -> dict[str, float]:
    """Mean of each logged cosine, ``a·b`` → value; non-finite ones make the mean NaN."""
    columns: dict[str, list[float]] = {}
    for row in window:
        for name, value in row.items():
            if name.startswith("grad/cos/"):
                columns.setdefault(name.removeprefix("grad/cos/").replace("__", "·"), []).append(float(value))
    return {pair: sum(values) / len(values) for pair, values in columns.items()}


def _rise(window: Sequence[LogRow], usual: Sequence[LogRow], name: str) -> float:
    """Largest value before the spike over the median of what was usual; NaN where either was not measured."""
    import numpy as np

    before = [float(row[name]) for row in window if name in row]
    normal = [float(row[name]) for row in usual if name in row]
    if not before or not normal:
        return math.nan
    middle = float(np.median(normal))
    return max(before) / middle if middle else math.nan


def table(spikes: Sequence[SpikeEpisode], run: Run) -> "pd.DataFrame":
    """One row a spike of a run, for the report; what was never measured is left out."""
    import pandas as pd

    columns = ["step", "norm of", "value", "times usual", "leader", "lead (steps)", "leader's share", "carried by"]
    shown = {name: SHORT[name] for name in INDICATORS if any(not math.isnan(s.indicators.get(name, math.nan))
                                                           for s in spikes)}  # fmt: skip
    lines = []
    for s in spikes:
        carried = f"{s.carrier} {number(s.carried, 2)}" if s.carrier else None
        value = s.value if math.isfinite(s.value) else "not finite"
        line = [s.step, s.series.split("/")[1], value, s.value / s.reference, s.leader or "none", s.lead, s.share]
        rises = {f"rise of {short}": s.indicators.get(name, math.nan) for name, short in shown.items()}
        rows = list(map(str, rows_of(run, s)))
        named = f"{', '.join(rows[:FEW_ROWS])}{f' and {len(rows) - FEW_ROWS} more' if len(rows) > FEW_ROWS else ''}"
        lines.append(dict(zip(columns, [*line, carried], strict=True)) | rises | {"data rows": named or None})
    return pd.DataFrame(lines).dropna(axis="columns", how="all") if lines else pd.DataFrame(columns=columns)


def rows_of(run: Run, spike: SpikeEpisode) -> list[int]:
    """The data rows of the event that a spike made, as the event has them; none where it made none."""
    near = [event for event in run.events if event.get("rows") and abs(event["step"] - spike.step) <= NEAR]
    return list(min(near, key=lambda event: abs(event["step"] - spike.step))["rows"]) if near else []


# --- clusters ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recurrence:
    """A data row that was in the batch of several events.

    Attributes:
        row: index into the training split. count: events it was in, of ``events``.
        expected: events it would be in by chance. p: P(count or more), corrected for the number of rows.
    """

    row: int
    count: int
    events: int
    expected: float
    p: float


def recurring_rows(run: Run, kinds: Sequence[str] = (SPIKE, NONFINITE)) -> list[Recurrence]:
    """Data rows that events share more often than batches drawn at random would (5 %, Bonferroni), worst first.

    The number of rows in the training split is taken to be the largest row seen + 1; a batch's rows are those
    that the event kept (at most 64).
    """
    from scipy import stats

    batches = [set(event["rows"]) for event in run.events if event["kind"] in kinds and event.get("rows")]
    if len(batches) < 2:
        return []
    rows = 1 + max(max(batch) for batch in batches)
    chance = sum(map(len, batches)) / len(batches) / rows
    counts = Counter(row for batch in batches for row in batch)
    n = len(batches)
    found = [
        Recurrence(row, count, n, n * chance, min(1.0, rows * float(stats.binom.sf(count - 1, n, chance))))
        for row, count in counts.items()
        if count > 1
    ]
    return sorted((r for r in found if r.p < 0.05), key=lambda r: (r.p, r.row))


def leaders(spikes: Sequence[SpikeEpisode], config: Mapping[str, Any]) -> "pd.DataFrame":
    """How often each term led, its median lead in steps, and the branches whose rows it sees."""
    import pandas as pd

    terms = config.get("terms") or {}
    lines = []
    for leader, count in Counter(spike.leader or "none" for spike in spikes).most_common():
        leads = [s.lead for s in spikes if s.leader == leader and not math.isnan(s.lead)]
        branches = (terms.get(leader) or {}).get("branches") or []
        lead = statistics.median(leads) if leads else math.nan
        lines.append({"leader": leader, "spikes": count, "median lead (steps)": lead, "branches": ", ".join(branches)})
    columns = ["leader", "spikes", "median lead (steps)", "branches"]
    return pd.DataFrame(lines, columns=columns if any(line["branches"] for line in lines) else columns[:-1])


def gaps(spikes: Sequence[SpikeEpisode]) -> float:
    """Coefficient of variation of the steps between spikes: 1 if they come at random, above if in bursts.

    NaN with fewer than three spikes.
    """
    import numpy as np

    steps = np.diff([spike.step for spike in spikes])
    return float(steps.std() / steps.mean()) if len(steps) > 1 and steps.mean() > 0 else math.nan
