"""The page about one run: its spikes, what led them, what came back, and how it compares with its arm."""

import math
from collections.abc import Sequence
from pathlib import Path

from analysis import clusters, plots, spikes
from analysis.frames import Run, run_divergence
from analysis.intervals import number
from analysis.mlflow_store import mlflow_links
from analysis.page import Block, Gallery, Heading, Links, Page, Picture, Table, Text
from analysis.spikes import Spike
from twinrl.tracking import names

CLOSE_UPS = 3
MOST_ROWS = 30


def build(run: Run, others: Sequence[Run], figures: Path) -> Page:
    """The page; figures are written into ``figures``.

    Arguments:
        others: other seeds of the run's arm; may be empty.

    Raises:
        InputError: the log has no gradient norm.
    """
    found = spikes.find(run.rows)
    page = Page(f"Run {run.name}")
    page.add(*_summary(run, found))
    page.add(Picture(plots.save(plots.norms(run, found), figures / "norms.svg")))
    if found:
        page.add(*_anatomy(run, found, figures))
    page.add(*_clusters(run, found, figures), *_arm(run, others, figures), *_samples(run))
    if links := mlflow_links([run]):
        page.add(Heading("MLflow"), Links(links))
    return page


def _summary(run: Run, found: Sequence[Spike]) -> list[Block]:
    divergence = run_divergence(run)
    status = f"It {run.status} after" if run.result else "It is unfinished, at"
    text = f"{status} {run.rows[-1]['step']:,} steps. "
    text += f"Diverged at step {divergence[0]:,} ({divergence[1]}). " if divergence else "It has not diverged. "
    text += f"{len(found)} spike{'s' * (len(found) != 1)}"
    spread = spikes.gaps(found)
    if not math.isnan(spread):
        text += f"; their spacing varies by {number(spread, 2)} of its mean (1: at random, more: in bursts)"
    return [Text(f"{text}.")]


def _anatomy(run: Run, found: Sequence[Spike], figures: Path) -> list[Block]:
    worst = sorted(found, key=lambda s: -s.value if math.isfinite(s.value) else -math.inf)
    blocks: list[Block] = [Heading("Spikes"), Table(spikes.table(found[:MOST_ROWS]))]
    if len(found) > MOST_ROWS:
        blocks.append(Text(f"The first {MOST_ROWS} of {len(found)}.", note=True))
    note = (
        "Lead: steps between the first stand-out of the leading term's norm and that of the total, – where the total "
        "never stood out. Rise: largest value "
        f"of an indicator in the {spikes.LEAD} steps before, over its median in the {spikes.BEFORE} before those."
    )
    blocks.append(Text(note, note=True))
    pictures = []
    for spike in worst[:CLOSE_UPS]:
        path = plots.save(plots.close_up(run, spike), figures / f"spike-{spike.step}.svg")
        pictures.append(Picture(path, _caption(spike)))
    return [*blocks, Heading("The largest, step by step", 3), *pictures]


def _caption(spike: Spike) -> str:
    text = f"Step {spike.step:,}. "
    if spike.leader:
        lead = "" if math.isnan(spike.lead) else f", {spike.lead:.0f} steps before the total"
        text += f"{spike.leader} led{lead}. "
    cosines = ", ".join(f"{pair} {number(value, 2)}" for pair, value in spike.cosines.items())
    return text + (f"Mean cosines before: {cosines}." if cosines else "")


def _clusters(run: Run, found: Sequence[Spike], figures: Path) -> list[Block]:
    if not found and not run.events:
        return []
    blocks: list[Block] = [Heading("What comes back")]
    if found:
        blocks.append(Table(spikes.leaders(found, run.config)))
    return [*blocks, *_recurring(run), *_places(run, figures)]


def _recurring(run: Run) -> list[Block]:
    import pandas as pd

    if recurring := spikes.recurring_rows(run):
        rows = [{"data row": r.row, "events": f"{r.count} of {r.events}", "by chance": r.expected, "p": r.p}
                for r in recurring[:MOST_ROWS]]  # fmt: skip
        return [Text("Data rows that events share more often than chance:"), Table(pd.DataFrame(rows))]
    batches = sum(bool(event.get("rows")) for event in run.events)
    return [Text(f"No data row is in the batches of {batches} events more often than chance would have it.")]


def _places(run: Run, figures: Path) -> list[Block]:
    """Where in t and in which branches the worst rows lie."""
    import pandas as pd

    cases = clusters.placed(run.events)
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


def _arm(run: Run, others: Sequence[Run], figures: Path) -> list[Block]:
    if not others:
        return []
    import pandas as pd

    rows = [{"run": r.name, "seed": r.config.get("seed", 0), "status": r.status, "spikes": len(spikes.find(r.rows)),
             "largest norm": max(_finite(r), default=math.nan), "diverged at": (run_divergence(r) or (None,))[0]}
            for r in (run, *others)]  # fmt: skip
    figure = plots.save(plots.against_arm(run, others), figures / "arm.svg")
    return [Heading("Beside the other seeds of its arm"), Table(pd.DataFrame(rows)), Picture(figure)]


def _finite(run: Run) -> list[float]:
    values = [float(row[names.GRAD_TOTAL_RAW]) for row in run.rows if names.GRAD_TOTAL_RAW in row]
    return [value for value in values if math.isfinite(value)]


def _samples(run: Run) -> list[Block]:
    """The first, a middle and the last grid of the run."""
    grids = sorted((run.path / "samples").glob("step-*.png"))
    chosen = [grids[k] for k in sorted({0, len(grids) // 2, len(grids) - 1})] if grids else []
    if not chosen:
        return []
    return [Heading("Samples"), Gallery([Picture(path, path.stem.replace("step-", "step ")) for path in chosen])]
