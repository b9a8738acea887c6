"""The page about one run: its spikes, what led them, what came back, and how it compares with its arm."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import clusters, plots, spikes, telling, traces
from analysis.frames import Run, run_divergence
from analysis.intervals import number
from analysis.mlflow_store import mlflow_links
from analysis.page import Answered, Facts, Gallery, Heading, Links, Page, PageBlock, Picture, Table, Text, percent
from analysis.spikes import SpikeEpisode
from twinrl.run import layout, names, runlog
from twinrl.stability.detectors import TOTAL, terms_in
from twinrl.stability.divergence import NEVER_WHOLE, Diverged
from twinrl.stability.events import HACKING

CLOSE_UPS = 3
MOST_ROWS = 30
TELLING_COSINE = 0.15
"""Cosines that a caption names; gradients of different terms are hardly ever exactly orthogonal."""


def build(run: Run, others: Sequence[Run], figures: Path) -> Page:
    """The page; figures are written into ``figures``.

    Arguments:
        others: other seeds of the run's arm; may be empty.

    Raises:
        InputError: the log has no gradient norm.
    """
    found = spikes.find(run.rows)
    page = Page(f"Run {run.name}")
    page.add(Answered(sentence(run, found)))
    page.add(Picture(plots.save(plots.norms(run, found), figures / "norms.svg")))
    page.add(*hacked(run), Facts(answers(run, found)), *_rules(run))
    if found:
        page.add(*_anatomy(run, found, figures))
    page.add(*_clusters(run, found, figures), *_arm(run, others, figures), *_samples(run))
    if links := mlflow_links([run]):
        page.add(Heading("MLflow"), Links(links))
    return page


def sentence(run: Run, found: Sequence[SpikeEpisode]) -> str:
    """Whether the run fell, which term led and by how many steps, and the largest spike, in one sentence."""
    failure = run_divergence(run)
    text = f"It fell, seen at step {failure.step:,}" if failure else "It has not fallen"
    rise = traces.rise_of(run, failure) if failure else None
    if rise is not None:
        total = "" if math.isnan(rise.lead) else f", {telling.lead_text(rise.lead)}"
        text += f"; the gradient of {rise.term} rose first, at step {rise.step:,}{total}"
    if cost := [event["step"] for event in run.events if event.get("kind") == HACKING]:
        text += f"; the reward rose at the pictures' cost, seen at step {cost[0]:,}"
    leading = Counter(spike.leader for spike in found if spike.leader).most_common(1)
    if not found:
        return f"{text}; no gradient norm spiked."
    one = f"its one spike, at step {found[0].step:,}" if len(found) == 1 else ""
    if not leading:
        return f"{text}; {one or f'{len(found)} spikes'}, in which no term's norm stood out."
    for term, count in leading:
        leads = [spike.lead for spike in found if spike.leader == term and not math.isnan(spike.lead)]
        by = f", {telling.lead_text(statistics.median(leads))}" if leads else ""
        text += f"; {term} led {one or f'{count} of {len(found)} spikes'}{by}{' (median)' * (len(leads) > 1)}"
    return f"{text}{'' if one else _largest_told(_largest(found)[0])}."


def _largest_told(spike: SpikeEpisode) -> str:
    times = spike.value / spike.reference
    size = f"{number(times, 2)} times its usual norm" if math.isfinite(times) else "not finite"
    return f"; the largest, {size}, at step {spike.step:,}{f', was led by {spike.leader}' if spike.leader else ''}"


def _rules(run: Run) -> list[PageBlock]:
    """Norms before and after rules; nothing where no rule has acted."""
    import pandas as pd

    rows = run.lasting
    lines: list[dict[str, Any]] = []
    for term in (*terms_in(rows), TOTAL):
        both = [names.grad(term, quantity) for quantity in ("norm_raw", "norm_clipped")]
        known = [(float(row[both[0]]), float(row[both[1]])) for row in rows if both[0] in row and both[1] in row]
        raw, entering = np.array(known).T if known else (np.zeros(0), np.zeros(0))
        did, measured = traces.action(raw, entering), np.isfinite(raw) & (raw > 0)
        if measured.any():
            lines.append({
                "gradient": "sum" if term == TOTAL else term,
                "median norm before rules": float(np.median(raw[measured])),
                "after": float(np.median(entering[measured])),
                "rules acted in": f"{percent(did.share)} of the steps",
                "median factor there": did.factor,
            })  # fmt: skip
    if all(math.isnan(line["median factor there"]) for line in lines):
        return []
    return [Heading("Norms before and after rules"), Table(pd.DataFrame(lines))]


def answers(run: Run, found: Sequence[SpikeEpisode]) -> list[tuple[str, str]]:
    """What a reader in a hurry asks, and the answers."""
    told = [("What happened?", _what(run, found))]
    if found:
        told += [("Which term?", _who(found)), ("What came before?", _before(run, found))]
    return told


def _who(found: Sequence[SpikeEpisode]) -> str:
    """Which terms led, and which carried the gradient when it stood out."""
    texts = []
    for term, count in Counter(spike.leader for spike in found if spike.leader).most_common():
        leads = [spike.lead for spike in found if spike.leader == term and not math.isnan(spike.lead)]
        lead = f", {telling.lead_text(statistics.median(leads))}{' (median)' * (len(leads) > 1)}" if leads else ""
        texts.append(f"{telling.counted(term, count, len(found))}{lead}")
    if not texts:
        return "No term's norm was logged, or none stood out."
    carriers = Counter(spike.carrier for spike in found if spike.carrier).most_common()
    most = ", ".join(telling.counted(name, count, len(found)) for name, count in carriers)
    carried = f" At the spike itself most of the gradient was {most}." if most else ""
    return f"First to stand out: {'; '.join(texts)}.{carried}"


def _before(run: Run, found: Sequence[SpikeEpisode]) -> str:
    """How far the indicators rose before spikes, against quiet steps."""
    rises, quiet = spikes.median_rises(found), spikes.quiet_rises(run.rows, found)
    if not rises:
        return "No indicator was logged."
    texts = [f"{spikes.SHORT[name]} {number(rise, 2)} times its usual value"
             + (f" (quiet steps: {number(quiet[name], 2)})" if name in quiet else "")
             for name, rise in sorted(rises.items(), key=lambda item: -item[1] / quiet.get(item[0], 1.0))]  # fmt: skip
    few = "" if quiet else " There are too few quiet steps to compare with."
    return f"In the {spikes.LEAD} steps before (median of all spikes): {'; '.join(texts)}.{few}"


def _what(run: Run, found: Sequence[SpikeEpisode]) -> str:
    status = f"It {run.status} after" if run.result else "It is unfinished, at" if run.config else "Its log ends at"
    text = f"{status} {run.rows[-1]['step']:,} steps. "
    text += f"{_failed(failure)} " if (failure := run_divergence(run)) else "It has not diverged. "
    if rescues := runlog.rollbacks(run.rows):
        text += f"It was rolled back to a checkpoint {rescues} time{'s' * (rescues != 1)}. "
    text += f"{len(found)} spike{'s' * (len(found) != 1)}"
    spread = spikes.gaps(found)
    if not math.isnan(spread):
        text += f"; their spacing varies by {number(spread, 2)} of its mean (1: at random, more: in bursts)"
    return f"{text}."


def _failed(failure: Diverged) -> str:
    """When and how a run failed, and whether that was its end."""
    when = f"It {'was' if failure.kind == NEVER_WHOLE else 'diverged'} "
    when += NEVER_WHOLE if failure.kind == NEVER_WHOLE else f"between steps {failure.after:,} and {failure.step:,}"
    return f"{when} ({failure.message or failure.kind}){', and recovered' if failure.recovered else ''}."


def _anatomy(run: Run, found: Sequence[SpikeEpisode], figures: Path) -> list[PageBlock]:
    worst = _largest(found)
    blocks: list[PageBlock] = [Heading("Spikes"), Table(spikes.table(_chosen(found), run))]
    if len(found) > MOST_ROWS:
        half = MOST_ROWS // 2
        blocks.append(Text(f"The first {half} of {len(found)}, and the {half} largest of the others.", note=True))
    note = (
        "Leader: the term whose norm stood out first. Lead: steps from that to the total's, – where the total never "
        "stood out. Carried by: the largest share of the gradient at the spike's own step. Rise: largest value of an "
        f"indicator in the {spikes.LEAD} steps before, over its median in the {spikes.BEFORE} before those. "
        "Data rows: of the event there, the largest loss first where rows have losses of their own; "
        "events.jsonl has them all."
    )
    blocks.append(Text(note, note=True))
    pictures = []
    for spike in worst[:CLOSE_UPS]:
        path = plots.save(plots.close_up(run, spike), figures / f"spike-{spike.step}.svg")
        pictures.append(Picture(path, _caption(spike)))
    return [*blocks, Heading("The largest, step by step", 3), *pictures]


def _chosen(found: Sequence[SpikeEpisode]) -> list[SpikeEpisode]:
    """The first spikes, which may be causes, and the largest of the others, in order."""
    half = MOST_ROWS // 2
    if len(found) <= MOST_ROWS:
        return list(found)
    return sorted([*found[:half], *_largest(found[half:])[:half]], key=lambda s: s.step)


def _largest(found: Sequence[SpikeEpisode]) -> list[SpikeEpisode]:
    return sorted(found, key=lambda s: -s.value if math.isfinite(s.value) else -math.inf)


def _caption(spike: SpikeEpisode) -> str:
    text = f"Step {spike.step:,}. "
    if spike.leader:
        text += f"{spike.leader} led{_lead(spike.lead)}. "
    if spike.carrier:
        text += f"At the spike {spike.carrier} is {number(spike.carried, 2)} of the gradient. "
    told = {pair: value for pair, value in spike.cosines.items() if abs(value) >= TELLING_COSINE}
    cosines = ", ".join(f"{pair} {number(value, 2)}" for pair, value in told.items())
    return (text + (f"Mean cosines before, where they are telling: {cosines}." if cosines else "")).strip()


def _lead(steps: float) -> str:
    if math.isnan(steps):
        return ""
    return f", {steps:.0f} steps before the total" if steps else ", in one step with the total"


def _clusters(run: Run, found: Sequence[SpikeEpisode], figures: Path) -> list[PageBlock]:
    if len(found) < 2 and len(run.events) < 2:
        return []
    blocks: list[PageBlock] = [Heading("What comes back")]
    if found:
        blocks.append(Table(spikes.leaders(found, run.config)))
    return [*blocks, *_recurring(run), *_places(run, figures)]


def _recurring(run: Run) -> list[PageBlock]:
    import pandas as pd

    if recurring := spikes.recurring_rows(run):
        rows = [{"data row": r.row, "events": f"{r.count} of {r.events}", "by chance": r.expected, "p": r.p}
                for r in recurring[:MOST_ROWS]]  # fmt: skip
        return [Text("Data rows that events share more often than chance:"), Table(pd.DataFrame(rows))]
    batches = sum(bool(event.get("rows")) for event in run.events)
    if batches < 2:
        return []
    return [Text(f"No data row is in the batches of {batches} events more often than chance would have it.")]


def _places(run: Run, figures: Path) -> list[PageBlock]:
    """Where in t and in which branches the worst rows lie."""
    import pandas as pd

    cases = clusters.placed(run.events)
    if "watched" in run.config:  # a training loop of somebody else's, which may know neither
        return []
    if run.events and not any(event.get("t") for event in run.events):
        return [Text("Times and branches: this run's events hold none; a newer twinrl would have recorded them.")]
    if len(cases) < clusters.FEWEST_EVENTS:
        return [Text(f"Times and branches: {len(cases)} events with rows to compare, which shows no pattern.")]
    found = clusters.clusters(run.events)
    picture = Picture(plots.save(plots.places(cases[:MOST_ROWS]), figures / "places.svg"), "Times of the events' rows.")
    if not found:
        return [Text(f"The worst rows of {len(cases)} events gather in no range of t and no branch."), picture]
    rows = [{"where": c.where, "worst rows there": f"{c.count} of {c.worst}", "by chance": c.expected,
             "events": f"{c.events} of {c.judged}", "p": c.p} for c in found]  # fmt: skip
    text = "Where the events' worst rows gather (the eighth with the largest losses, or those that were not finite):"
    return [Text(text), Table(pd.DataFrame(rows)), picture, Text(PLACES_NOTE, note=True)]


PLACES_NOTE = (
    "By chance: as many rows drawn from the same events. p: permutation test over all ranges of t and all branches "
    "together. Losses have a profile in t on quiet steps, too; a run without that branch says whether it matters."
)


def _arm(run: Run, others: Sequence[Run], figures: Path) -> list[PageBlock]:
    if not others:
        return []
    import pandas as pd

    rows = [{"run": r.name, "seed": r.config.get("seed", 0), "status": r.status, "spikes": len(spikes.find(r.rows)),
             "largest norm": max(_finite(r), default=math.nan), "diverged at": failure and failure.step}
            for r in (run, *others) for failure in [run_divergence(r)]]  # fmt: skip
    figure = plots.save(plots.against_arm(run, others), figures / "arm.svg")
    return [Heading("Beside the other seeds of its arm"), Table(pd.DataFrame(rows)), Picture(figure)]


def _finite(run: Run) -> list[float]:
    values = [float(row[names.GRAD_TOTAL_RAW]) for row in run.rows if names.GRAD_TOTAL_RAW in row]
    return [value for value in values if math.isfinite(value)]


def hacked(run: Run) -> list[PageBlock]:
    """Samples before the reward and where it first rose at their cost; nothing where it never did."""
    found = [event for event in run.events if event.get("kind") == HACKING]
    if not found:
        return []
    first, grids = found[0], {layout.step_of(path): path for path in layout.grids(run.path)}
    same = [row["step"] for row in run.rows if row.get(first.get("series", "")) == first.get("reference")]
    before = max((step for step in same if step < first["step"]), default=0)
    shown = [Picture(grids[step], f"step {step:,}") for step in (before, first["step"]) if step in grids]
    text = f"Step {first['step']:,}: {first['message']}. Such events in this run: {len(found)}."
    return [Heading("The reward rose at the pictures' cost"), Text(text), *([Gallery(shown)] if shown else [])]


def _samples(run: Run) -> list[PageBlock]:
    """The first, a middle and the last grid of the run."""
    grids = layout.grids(run.path)
    chosen = [grids[k] for k in sorted({0, len(grids) // 2, len(grids) - 1})] if grids else []
    if not chosen:
        return []
    return [Heading("Samples"), Gallery([Picture(path, f"step {layout.step_of(path):,}") for path in chosen])]
