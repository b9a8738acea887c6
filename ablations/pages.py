"""The pages that a study opens in MLflow: norms by term and arm, quality by arm, who diverged."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ablations.summary import Curve
from twinrl.run import names
from twinrl.tracking.views import Chart, Section, View

NORMS, QUALITY, DIVERGED = "norms", "quality", "diverged"
TITLES = {NORMS: "Norms by term and arm", QUALITY: "Quality by arm", DIVERGED: "Who diverged"}
ALIVE = "alive"
"""Seeds that have neither failed nor ended; a short name leaves the legend room for the arms'."""
BAND_NOTE = "solid: median over seeds; dashed, dotted: 10 % and 90 %"
LOG_FROM = 20.0
"""Ratio of the largest median to the smallest from which an axis is logarithmic."""
TOTAL = "total"
OTHERS = "Other series"
FOLDED = {"grad": "Clips and shares", "loss": "Losses", "": OTHERS}
"""Sections that are folded up at first, by the first part of their series' names."""


@dataclass(frozen=True)
class Extent:
    """Between which medians a series lies, over all arms."""

    low: float = math.inf
    high: float = -math.inf

    def with_curve(self, curve: Curve) -> "Extent":
        """The extent that also holds a curve."""
        finite = curve.median[np.isfinite(curve.median)]
        return Extent(min(self.low, finite.min(initial=math.inf)), max(self.high, finite.max(initial=-math.inf)))

    @property
    def log(self) -> bool:
        """Whether a logarithmic axis shows more."""
        return 0 < self.low < self.high / LOG_FROM


def bands(name: str) -> tuple[str, str, str]:
    """The metrics that hold a series of an arm: median, low, high."""
    return name, f"{name}/low", f"{name}/high"


def views(study: str, metric: str, series: Mapping[str, Extent]) -> dict[str, View]:
    """The study's pages by their keys.

    Arguments:
        study: its name. metric: that it ranks by. series: what the arms' summaries hold.
    """
    arms = f"tags.study = '{study}' AND tags.level = 'summary'"
    fate = Section("Seeds alive", [Chart("seeds alive", (ALIVE,))], columns=1, height=260)
    ranked = _charts([metric], series, str)
    outcomes = [name for name in series if name.startswith("val/") and name != metric]
    before, after = (_norms(series, quantity) for quantity in ("norm_raw", "norm_clipped"))
    norms = (
        fate,
        Section(f"{metric}, and gradient norms by term before rules ({BAND_NOTE})", [*ranked, *before]),
        Section(f"Gradient norms by term after rules ({BAND_NOTE})", after),
    )
    quality = (
        fate,
        Section(f"Quality by arm ({BAND_NOTE})", ranked, columns=1),
        Section("Other validation", _charts(outcomes, series, lambda name: name.removeprefix("val/"))),
    )
    return {
        NORMS: _of_arms(arms, [*norms, *_rest(norms, series)], series),
        QUALITY: _of_arms(arms, [*quality, *_rest(quality, series)], series),
        DIVERGED: _seeds(study, metric),
    }


def _of_arms(runs: str, sections: Sequence[Section], series: Iterable[str]) -> View:
    filled = [section for section in sections if section.charts]
    return View(runs, filled, [band for name in series for band in bands(name)])


def _charts(chosen: Iterable[str], series: Mapping[str, Extent], title: Callable[[str], str]) -> list[Chart]:
    return [Chart(title(name), bands(name), series[name].log) for name in chosen if name in series]


def _norms(series: Mapping[str, Extent], quantity: str) -> list[Chart]:
    """A chart for each term's norm before or after rules, the total first."""
    owners = [name.split("/")[1] for name in series if name.startswith("grad/") and name.endswith(f"/{quantity}")]
    found = {owner: names.grad(owner, quantity) for owner in sorted(owners, key=lambda owner: owner != TOTAL)}
    return [Chart(owner, bands(name), log=series[name].high > 0) for owner, name in found.items()]


def _rest(shown: Iterable[Section], series: Mapping[str, Extent]) -> list[Section]:
    """What other sections do not show, folded up: clips and shares, losses, and the others."""
    drawn = {chart.metrics[0] for section in shown for chart in section.charts}
    groups: dict[str, list[str]] = {title: [] for title in FOLDED.values()}
    for name in (name for name in series if name not in drawn):
        groups[FOLDED.get(name.split("/")[0], OTHERS)].append(name)
    return [Section(title, _charts(found, series, str), opened=False) for title, found in groups.items()]


def _seeds(study: str, metric: str) -> View:
    """The table of the seeds' runs, those that diverged first and by their step."""
    columns = ("metrics.`diverged/step`", "tags.`diverged.kind`", "tags.`diverged.recovered`", f"metrics.`{metric}`",
               "tags.`status`")  # fmt: skip
    return View(f"tags.`study.{study}` LIKE '%'", columns=columns, order="metrics.`diverged/step`")
