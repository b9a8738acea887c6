"""The first picture of a study: gradient norms over steps, a small panel an arm."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.frames import StudyFrame
from analysis.intervals import number
from analysis.page import share_text
from analysis.plots import FALL, GREY, INK, MOST_ARMS, colour, plain_log, quiet_axes
from analysis.traces import RunTrace, StudyTraces, leaders, rules_table
from twinrl.stability.detectors import TOTAL

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = (0.1, 0.9)
IN_A_ROW = 4
RISE = "v"
"""Marker where a term rose first."""
CHANGED = 1.02
"""Ratio of a median norm before and after rules from which both are drawn."""


def study_norms(study: StudyFrame, traces: StudyTraces) -> "Figure":
    """Per-term norms as they enter the sum: median and 10–90 % over seeds, a panel an arm, one logarithmic axis.

    Dotted: before rules, where these changed them. Vertical: falls, and dashed the start of a reward.
    Triangle: where the term that rose first did.
    """
    shown = study.arms[:MOST_ARMS]
    rows = -(-len(shown) // IN_A_ROW)
    columns = -(-len(shown) // rows)
    figure, axes = quiet_axes(rows, columns, (11.4, 0.55 + 2.35 * rows), share=True)
    tints = {term: colour(k) for k, term in enumerate(traces.terms)} | {TOTAL: INK}
    acted = _acted(study, traces)
    for axis, arm in zip(axes.flat, shown, strict=False):
        _panel(axis, study.arm(arm), traces, tints)
        rules = acted.get(arm, " ") if acted else ""
        _title(axis, arm, study.arm(arm)["diverged"], traces.of_arm(study, arm), rules)
    for axis in list(axes.flat)[len(shown) :]:
        axis.set_visible(False)
    plain_log(axes[0, 0])
    for axis in axes[:, 0]:
        axis.set_ylabel("gradient norm", fontsize=8, color=INK)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=8, color=INK)
    _legend(figure, axes, tints)
    return figure


def _title(axis: "Axes", arm: str, fell: "pd.Series", mine: Sequence[RunTrace], rules: str) -> None:
    """Name, falls and the term that rose first; what rules did, where any arm has rules (a space where not this)."""
    lost = f"{int(fell.sum())} of {len(fell)} fell"
    if first := leaders(mine):
        lost += f"; {first[0][0]} rose first" + (f" in {len(first[0][1])}" if len(first[0][1]) < fell.sum() else "")
    axis.set_title(f"{shortened(arm)}\n" + "\n" * bool(rules), fontsize=9, loc="left", color=INK, fontweight="bold")
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": 8}
    tint, weight = (FALL, "bold") if fell.any() else (GREY, "normal")
    axis.annotate(lost, (0, 1), (0, 14 if rules else 3), color=tint, fontweight=weight, **place)  # type: ignore[arg-type]
    axis.annotate(shortened(rules), (0, 1), (0, 3), color=GREY, **place)  # type: ignore[arg-type]


def _acted(study: StudyFrame, traces: StudyTraces) -> dict[str, str]:
    """Arm → the rules that acted in it: ``rectify scaled by 0.3 in 12 % of steps``."""
    texts: dict[str, list[str]] = {}
    for row in rules_table(study, traces).dropna().to_dict("records"):
        factor, share = number(row["median factor"], 2), share_text(row["share of steps"])
        text = f"{row['gradient']} scaled by {factor} in {share} of steps"
        texts.setdefault(str(row["arm"]), []).append(text)
    return {arm: ", ".join(own) for arm, own in texts.items()}


def shortened(arm: str, most: int = 42) -> str:
    """A name that fits above a panel."""
    return arm if len(arm) <= most else f"{arm[: most - 1]}…"


def _panel(axis: "Axes", trials: "pd.DataFrame", traces: StudyTraces, tints: Mapping[str, str]) -> None:
    mine = [traces.runs[k] for k in trials.index if k in traces.runs]
    steps = traces.edges[:-1]
    for term, tint in tints.items():
        raw, entering = (over_seeds([part(trace).get(term) for trace in mine]) for part in (_raw, _entering))
        if entering is None:
            raw, entering = None, raw  # a log of norms before rules alone
        if entering is None:
            continue
        width, order = (0.8, 4) if term == TOTAL else (1.3, 3)
        axis.plot(steps, entering[1], color=tint, linewidth=width, zorder=order)
        if term != TOTAL:
            axis.fill_between(steps, entering[0], entering[2], color=tint, alpha=0.18, linewidth=0, rasterized=True)
        if raw is not None and np.nanmax(np.abs(np.log(raw[1] / entering[1])), initial=0.0) > np.log(CHANGED):
            axis.plot(steps, raw[1], color=tint, linewidth=0.9, linestyle=":", zorder=2)
    _mark_rise(axis, mine, traces, tints)
    for step in trials["time"][trials["diverged"]]:
        axis.axvline(step, color=FALL, linewidth=1.0, alpha=0.6, zorder=1)
    for step in {trace.reward_start for trace in mine if trace.reward_start is not None}:
        axis.axvline(step, color=GREY, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1)
    axis.set_xlim(0, traces.edges[-1])


def _mark_rise(axis: "Axes", mine: Sequence[RunTrace], traces: StudyTraces, tints: Mapping[str, str]) -> None:
    """A triangle where the term that rose first in most runs did so (median), on top of its curve."""
    if not (found := leaders(mine)):
        return
    term, rises = found[0]
    step = float(np.median([rise.step for rise in rises]))
    place = int(np.clip(np.searchsorted(traces.edges, step, side="right") - 1, 0, len(traces.edges) - 2))
    band = over_seeds([_entering(trace).get(term, _raw(trace).get(term)) for trace in mine])
    if band is not None and np.isfinite(band[2, place]):
        axis.plot(
            [step], [1.6 * band[2, place]], RISE, color=tints[term], markersize=8, markeredgecolor="white", zorder=5
        )


def _raw(trace: RunTrace) -> Mapping[str, np.ndarray]:
    return trace.raw


def _entering(trace: RunTrace) -> Mapping[str, np.ndarray]:
    return trace.entering


def over_seeds(curves: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """(3, stretches) low, median and high over the seeds that have a value there; None where no seed has a curve."""
    known = [curve for curve in curves if curve is not None]
    if not known or np.isnan(known).all():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # stretches in which no seed has a value
        return np.asarray(np.nanquantile(known, (BAND[0], 0.5, BAND[1]), axis=0))


def _legend(figure: "Figure", axes: np.ndarray, tints: Mapping[str, str]) -> None:
    """One legend of all panels, of what is drawn in one of them."""
    from matplotlib.lines import Line2D

    drawn = {(line.get_color(), line.get_linestyle()) for axis in axes.flat for line in axis.lines}
    entries = [Line2D([], [], color=tint, label=term) for term, tint in tints.items() if (tint, "-") in drawn]
    if any(style == ":" for _, style in drawn):
        entries.append(Line2D([], [], color=GREY, linestyle=":", label="before rules"))
    if (FALL, "-") in drawn and any(axis.lines and _upright(axis, FALL) for axis in axes.flat):
        entries.append(
            Line2D([], [], color=FALL, alpha=0.6, marker="|", linestyle="none", markersize=9, label="a fall")
        )
    if any(line.get_marker() == RISE for axis in axes.flat for line in axis.lines):
        entries.append(Line2D([], [], color=GREY, marker=RISE, linestyle="none", label="rose first"))
    if any(_upright(axis, GREY) for axis in axes.flat):
        entries.append(Line2D([], [], color=GREY, linestyle=(0, (4, 3)), label="the reward starts"))
    figure.legend(handles=entries, loc="outside upper left", ncols=len(entries), frameon=False, fontsize=8)


def _upright(axis: "Axes", tint: str) -> bool:
    """Whether a vertical line of a colour is in a panel."""
    return any(line.get_color() == tint and len(set(np.asarray(line.get_xdata()).tolist())) == 1 for line in axis.lines)


def caption(study: StudyFrame, traces: StudyTraces) -> str:
    """What the picture shows."""
    width = number(float(np.diff(traces.edges).max()), 6)
    arms = f" The first {MOST_ARMS} of {len(study.arms)} arms." if len(study.arms) > MOST_ARMS else ""
    return (
        "Gradient norm of each term as it enters the sum, over training steps: median and 10–90 % over seeds of the "
        f"largest in every {width} step{'s' * (width != '1')}. "
        f"{'Triangle: the term that rose first.' if leaders(list(traces.runs.values())) else ''}{arms}"
    )
