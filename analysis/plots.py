"""Figures that a paper could print: vector graphics, colours that colour-blind readers tell apart, no titles to crop.

Each function returns a matplotlib ``Figure`` that pyplot does not know; :func:`save` writes SVG, PDF and PNG.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from analysis.clusters import Placed
from analysis.effects import Effect
from analysis.frames import Run, run_divergence
from analysis.intervals import Interval, number
from analysis.leaderboard import ArmLine
from analysis.spikes import SpikeEpisode
from analysis.survival import Times, kaplan_meier
from twinrl.machine import files
from twinrl.machine.text import harmless
from twinrl.run import names
from twinrl.stability.detectors import terms_in

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
INK, GREY = "#202124", "#5f6368"
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)))
MOST_ARMS = 8  # curves in one panel; further arms are left to the tables
MOST_LINES = 60  # of a figure with a line for each arm or effect
MOST_MARKS = 20  # triangles of a run's figure
FALL = "#A50026"
UNCHANGED = 1e-4
"""Relative change of a norm below which no rule has acted."""
MOST_POINTS = 2000  # of a curve: more than a figure has pixels
DOTS_PER_INCH = 150  # of a PNG, as MLflow shows it


def save(figure: "Figure", path: Path) -> Path:
    """Write ``path`` (``*.svg``) and, unless they are there of the same figure, a PDF and a PNG; returns ``path``."""
    import matplotlib

    page, picture = path.with_suffix(".pdf"), io.BytesIO()
    _take_literally(figure)
    with matplotlib.rc_context({"svg.hashsalt": "twinrl", "pdf.fonttype": 42}):
        figure.savefig(picture, format="svg", facecolor="white", metadata={"Date": None})
        drawn = harmless(picture.getvalue().decode()).encode()  # names are in comments: XML has no control characters
        if not (page.is_file() and path.is_file() and path.read_bytes() == drawn):
            figure.set_layout_engine("none")  # once found it stays
            with files.publishing(page) as new:
                figure.savefig(new, format="pdf", facecolor="white", metadata={"CreationDate": None})
            with files.publishing(path.with_suffix(".png")) as new:
                figure.savefig(new, format="png", facecolor="white", dpi=DOTS_PER_INCH)
            with files.publishing(path) as new:
                new.write_bytes(drawn)
    return path


def _take_literally(figure: "Figure") -> None:
    """Names are no formulas, whatever dollars are in them; the numbers of a logarithmic axis are."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    powers = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    formulas = {label for axis in powers for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if text not in formulas:
            text.set_parse_math(False)


def quiet_axes(
    rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.6), share: bool = False
) -> "tuple[Figure, np.ndarray]":
    """A figure with a (rows, columns) array of quiet axes, which may share both scales; inches, text 9 pt."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8, color="0.6")
    return figure, axes


def plain_log(axis: "Axes") -> None:
    """A logarithmic y axis with plain numbers: powers of ten over a wide range, else 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def colour(index: int) -> str:
    """The colour of the index-th arm or term, black last."""
    return COLOURS[index % len(COLOURS)]


def _legend_above(axis: "Axes") -> None:
    """A legend over the axes, one line an entry: names of arms are long and would take half of the width."""
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), handlelength=3.2)


def _label(axis: "Axes", x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=9, color=INK)
    axis.set_ylabel(y, fontsize=9, color=INK)


# --- studies ----------------------------------------------------------------------------------------------


def forest(
    rows: Mapping[str, Interval], label: str, reference: float | None = None, log_scale: bool = False
) -> "Figure":
    """Estimates with intervals, one line each; open intervals end in an arrow.

    Arguments:
        rows: name → interval, drawn from the top. label: of the axis. reference: drawn as a line.
    """
    label += _left_out(len(rows))
    rows = dict(islice(rows.items(), MOST_LINES))
    figure, axes = quiet_axes(size=(6.4, 0.9 + 0.34 * len(rows)))
    axis = axes[0, 0]
    low, high = _limits(list(rows.values()), reference, log_scale)
    for k, interval in enumerate(rows.values()):
        _whisker(axis, k, interval, low, high)
    if reference is not None:
        axis.axvline(reference, color=GREY, linewidth=1, linestyle=":")
    axis.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    if log_scale:
        axis.set_xscale("log")
    axis.set_xlim(low, high)
    axis.grid(axis="y", visible=False)
    _label(axis, label, "")
    return figure


def _left_out(count: int) -> str:
    """What the label of a figure says where it has not all of ``count`` lines."""
    return f"; the first {MOST_LINES} of {count:,}" if count > MOST_LINES else ""


def _limits(intervals: Sequence[Interval], reference: float | None, log_scale: bool) -> tuple[float, float]:
    """Axis limits around everything finite; very long intervals are cut so that the others stay readable."""
    centers = [i.estimate for i in intervals if math.isfinite(i.estimate) and (i.estimate > 0 or not log_scale)]
    ends = [e for i in intervals for e in (i.low, i.high) if math.isfinite(e) and (e > 0 or not log_scale)]
    if reference is not None:
        centers.append(reference)
    values = np.array([*centers, *ends] or [1.0 if log_scale else 0.0])
    if log_scale:
        low, high = np.log10(values.min()), np.log10(values.max())
        middle = np.log10(np.array(centers or [1.0]))
        low, high = max(low, middle.min() - 2), min(high, middle.max() + 2)
        pad = 0.06 * max(high - low, 0.5)
        return float(10 ** (low - pad)), float(10 ** (high + pad))
    pad = 0.06 * max(float(np.ptp(values)), 1e-9 + 0.02 * abs(float(values.max())))
    return float(values.min() - pad), float(values.max() + pad)


def _whisker(axis: "Axes", at: int, interval: Interval, low: float, high: float) -> None:
    """One line of a forest; an end beyond the axis is an arrow head, a missing estimate the word for it."""
    tint = colour(0)
    start, end = max(interval.low, low), min(interval.high, high)
    axis.plot([start, end], [at, at], color=tint, linewidth=1.6, solid_capstyle="butt")
    for edge, cut, marker in ((start, interval.low < low, "<"), (end, interval.high > high, ">")):
        axis.plot([edge], [at], marker if cut else "|", color=tint, markersize=6, clip_on=False)
    if low <= interval.estimate <= high:
        axis.plot([interval.estimate], [at], "o", color=tint, markersize=5)
        return
    text = "no estimate" if math.isnan(interval.estimate) else f"estimate {number(interval.estimate)}"
    axis.annotate(text, (0.99, at), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7, color=GREY)


def arms(lines: Sequence[ArmLine], values: Mapping[str, "pd.Series"], metric: str, better: str) -> "Figure":
    """Every seed as a dot, the interquartile mean and its interval over it; diverged seeds at the edge."""
    cut, lines = _left_out(len(lines)), lines[:MOST_LINES]
    values = {line.arm: values[line.arm] for line in lines}
    figure, axes = quiet_axes(size=(6.4, 1.0 + 0.42 * len(lines)))
    axis = axes[0, 0]
    finite = np.concatenate([v[np.isfinite(v)].to_numpy(float) for v in values.values()] or [np.zeros(1)])
    low, high = _limits([line.interval for line in lines], None, False)
    low, high = min(low, finite.min(initial=low)), max(high, finite.max(initial=high))
    edge = high + 0.06 * (high - low) if better == "lower" else low - 0.06 * (high - low)
    for k, line in enumerate(lines):
        seeds = values[line.arm].to_numpy(float)
        kept = seeds[np.isfinite(seeds)]
        axis.plot(kept, k + _spread(len(kept)), ".", color=GREY, alpha=0.7, markersize=5)
        if lost := len(seeds) - len(kept):
            axis.plot(np.full(lost, edge), k + _spread(lost), "x", color=COLOURS[1], markersize=5, clip_on=False)
        _whisker(axis, k, line.interval, low, high)
    if any(not np.isfinite(v).all() for v in values.values()):
        axis.plot([], [], "x", color=COLOURS[1], label="diverged")
        axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axis.set_yticks(range(len(lines)), [f"{line.arm}  (n = {line.n})" for line in lines], fontsize=9)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    _label(axis, f"{metric} ({better} is better){cut}", "")
    return figure


def _spread(n: int) -> np.ndarray:
    """Small vertical offsets, so that equal values do not hide each other."""
    return 0.22 * np.sin(2.4 * np.arange(n)) if n > 1 else np.zeros(n)


def survival_curves(arms: Mapping[str, Times], horizon: float) -> "Figure":
    """Kaplan–Meier curves; steps, with the number of runs and of divergences in the legend."""
    shown = list(arms.items())[:MOST_ARMS]
    figure, axes = quiet_axes(size=(6.4, 3.3 + 0.18 * len(shown)))
    axis = axes[0, 0]
    widths = np.linspace(2.6, 1.4, max(2, len(shown)))  # and dashes: equal curves show below each other
    for k, (name, times) in enumerate(shown):
        curve = kaplan_meier(times).survival_function_.iloc[:, 0]
        x, y = np.append(curve.index, max(horizon, curve.index[-1])), np.append(curve, curve.iloc[-1])
        label = f"{name}: {times.events} of {times.n} diverged"
        axis.step(x, y, where="post", color=colour(k), linewidth=widths[k], label=label,
                  linestyle=DASHES[k % len(DASHES)])  # fmt: skip
        cut = times.time[~times.event & (times.time < horizon)]
        axis.plot(cut, np.interp(cut, x, y), "+", color=colour(k), markersize=7)
    axis.set_ylim(-0.03, 1.05)
    axis.set_xlim(0, horizon * 1.02)
    _legend_above(axis)
    _label(axis, "training step", "share of runs not diverged")
    return figure


def effects(
    found: Sequence[Effect], label: str, starred: Callable[[Effect], bool] = lambda effect: effect.named
) -> "Figure":
    """Main effects and interactions with their intervals; ``starred``: which are findings (5 % family-wise)."""
    rows = {f"{'★ ' if starred(e) else ''}{e.factor}: {e.contrast}": e.interval for e in found}
    return forest(rows, label, reference=0.0)


def trade_off(trials: "pd.DataFrame", x: str, y: str, order: Sequence[str]) -> "Figure":
    """Two metrics against each other, a dot a seed: whether reward was bought with recall."""
    shown = list(order)[:MOST_ARMS]
    figure, axes = quiet_axes(size=(6.4, 3.3 + 0.18 * len(shown)))
    axis = axes[0, 0]
    for k, arm in enumerate(shown):
        rows = trials[trials["arm"] == arm]
        marker = "osD^vP*X"[k % 8]
        axis.plot(rows[x], rows[y], marker, color=colour(k), alpha=0.75, markersize=5, label=arm, linestyle="none")
    _legend_above(axis)
    _label(axis, x, y)
    return figure


def prompts(accuracy: "pd.DataFrame") -> "Figure":
    """Judge accuracy by prompt (rows) and arm (columns), as numbers on shades; NaN as such, on none."""
    cut, accuracy = _left_out(accuracy.shape[1]), accuracy.iloc[:, :MOST_LINES]
    height, width = accuracy.shape
    figure, axes = quiet_axes(size=(1.6 + 0.9 * min(width, 12), 0.9 + 0.28 * height))
    axis = axes[0, 0]
    axis.grid(visible=False)
    axis.imshow(accuracy.to_numpy(float), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(accuracy.to_numpy(float)):
        lost = math.isnan(value)
        ink = COLOURS[1] if lost else "black" if value > 0.6 else "white"
        shown = "nan" if lost else number(value, 2)
        axis.text(column, row, shown, ha="center", va="center", fontsize=8, color=ink)
    axis.set_xticks(range(width), list(accuracy.columns), fontsize=8, rotation=30, ha="right")
    axis.set_yticks(range(height), list(accuracy.index), fontsize=8)
    _label(axis, cut.removeprefix("; "), "")
    return figure


# --- runs -------------------------------------------------------------------------------------------------


def norms(run: Run, spikes: Sequence[SpikeEpisode]) -> "Figure":
    """Gradient norms of every term and of the total as they enter sum and optimizer; dotted before rules.

    Spikes are thin vertical lines, the largest with a triangle in their leader's colour; the fall is a thick line.
    """
    frame = run.frame()
    terms = [term for term in terms_in(run.rows) if names.grad(term, "norm_raw") in frame]
    figure, axes = quiet_axes(size=(11.4, 3.9))
    axis = axes[0, 0]
    tints = {"total": INK} | {term: colour(k) for k, term in enumerate(terms)}
    for k, (term, tint) in enumerate(tints.items()):
        _before_and_after(axis, frame, term, tint, 3 - 0.1 * k)
    for spike in spikes:
        axis.axvline(spike.step, color=GREY, linewidth=0.8, alpha=0.35, zorder=0)
    plain_log(axis)
    for spike in sorted(spikes, key=lambda s: -s.value if math.isfinite(s.value) else -math.inf)[:MOST_MARKS]:
        if spike.leader:
            axis.plot([spike.step], [0.98], "v", color=tints[spike.leader], markersize=7, markeredgecolor="white",
                      transform=axis.get_xaxis_transform(), zorder=5)  # fmt: skip
    if (failure := run_divergence(run)) is not None:
        axis.axvline(failure.step, color=FALL, linewidth=1.6, alpha=0.7, label="the fall, as it was seen", zorder=1)
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=8)
    _label(axis, "training step (vertical: spikes; triangle: the term that led)", "gradient norm after rules")
    return figure


def _before_and_after(axis: "Axes", frame: "pd.DataFrame", term: str, tint: str, order: float) -> None:
    """One term's norm after its rules, and dotted before them where they changed it; a norm of 0 is a gap."""
    raw, entering = (frame.get(names.grad(term, quantity)) for quantity in ("norm_raw", "norm_clipped"))
    entering = raw if entering is None else entering
    assert entering is not None
    axis.plot(*drawn(frame["step"], positive(entering)), color=tint, label=term, linewidth=0.9, alpha=0.9, zorder=order)
    if raw is not None and changed(raw, entering):
        label = f"{term} before rules"
        axis.plot(*drawn(frame["step"], positive(raw)), color=tint, label=label, linewidth=1.1, linestyle=":",
                  alpha=0.9, zorder=2)  # fmt: skip


def positive(values: "pd.Series") -> "pd.Series":
    """The values that a logarithmic axis has a place for; the others are gaps."""
    numbers = values.astype(float)
    return numbers.where(numbers > 0)


def changed(raw: "pd.Series", entering: "pd.Series") -> bool:
    """Whether rules have changed a norm anywhere."""
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = (entering.astype(float) / raw.astype(float)).to_numpy()
    return bool((np.abs(factor[np.isfinite(factor)] - 1) > UNCHANGED).any())


def drawn(x: "pd.Series | pd.Index", y: "pd.Series", most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The points of a curve, of many the lowest and the highest of every stretch; what is not finite is a gap."""
    at, values = x.to_numpy(), y.to_numpy(float)
    values = np.where(np.isfinite(values), values, np.nan)
    if len(values) <= most:
        return at, values
    width = math.ceil(2 * len(values) / most)
    starts = np.arange(0, len(values), width)
    padded = np.pad(values, (0, len(starts) * width - len(values)), constant_values=np.nan).reshape(-1, width)
    lowest = starts + np.where(np.isnan(padded), np.inf, padded).argmin(axis=1)
    highest = starts + np.where(np.isnan(padded), -np.inf, padded).argmax(axis=1)
    kept = np.unique([lowest, highest])
    return at[kept], values[kept]


def close_up(run: Run, spike: SpikeEpisode, before: int = 30, after: int = 15) -> "Figure":
    """The steps around one spike: each term's norm over its median there, and the shares."""
    frame = run.frame()
    near = frame[(frame["step"] >= spike.step - before) & (frame["step"] <= spike.step + after)]
    terms = [term for term in terms_in(run.rows) if names.grad(term, "norm_raw") in frame]
    figure, axes = quiet_axes(2, 1, (6.4, 4.4))
    for k, term in enumerate(["total", *terms]):
        norm = near[names.grad(term, "norm_raw")].astype(float)
        usual = float(norm[near["step"] < spike.step - 10].median())
        tint = INK if k == 0 else colour(k - 1)
        if not usual > 0:  # a term that is switched off has no usual norm
            continue
        axes[0, 0].plot(near["step"], norm / usual, ".-", color=tint, linewidth=1.2, markersize=3, label=term)
        if (share := names.grad(term, "share")) in near:
            axes[1, 0].plot(near["step"], near[share], ".-", color=tint, linewidth=1.2, markersize=3)
    axes[0, 0].set_yscale("log")
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for axis in axes.flat:
        axis.axvline(spike.step, color=COLOURS[1], linewidth=0.8, alpha=0.5)
    _label(axes[0, 0], "", "norm / usual")
    _label(axes[1, 0], "training step", "share of the gradient")
    return figure


def places(cases: Sequence[Placed]) -> "Figure":
    """Source times of the rows behind each event: the worst ones in their branch's colour, the others grey."""
    figure, axes = quiet_axes(size=(6.4, 3.4))
    axis = axes[0, 0]
    names = sorted({str(name) for case in cases for name in case.branch})
    others = [(k, t) for k, case in enumerate(cases) for t in case.t[case.worst :]]
    if others:
        axis.plot(*zip(*others, strict=True), "_", color="0.75", markersize=9, label="other rows")
    for k, name in enumerate(names):
        worst = [(event, t) for event, case in enumerate(cases)
                 for t, branch in zip(case.t[: case.worst], case.branch, strict=False) if branch == name]  # fmt: skip
        if worst:
            axis.plot(*zip(*worst, strict=True), "osD^vP*X"[k % 8], color=colour(k), markersize=5,
                      label=f"worst, {name}")  # fmt: skip
    shown = range(0, len(cases), max(1, math.ceil(len(cases) / 10)))
    axis.set_xticks(list(shown), [f"{cases[k].step:,}" for k in shown])
    axis.set_ylim(-0.03, 1.03)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _label(axis, "event, by its training step", "source time t of the rows")
    return figure


def against_arm(run: Run, others: Sequence[Run], metric: str = names.GRAD_TOTAL_RAW) -> "Figure":
    """One run's series over the median and 10–90 % band of the other seeds of its arm."""
    import pandas as pd

    figure, axes = quiet_axes(size=(6.4, 3.4))
    axis = axes[0, 0]
    columns = [other.frame().drop_duplicates("step", keep="last").set_index("step")[metric] for other in others]
    band = pd.concat(columns, axis=1).astype(float).quantile([0.1, 0.5, 0.9], axis=1).T
    shown = band.iloc[:: math.ceil(len(band) / MOST_POINTS)]
    axis.fill_between(shown.index, shown[0.1], shown[0.9], color=colour(0), alpha=0.2, linewidth=0)
    label = f"median and 10–90 % of {len(others)} others"
    axis.plot(*drawn(band.index, band[0.5]), color=colour(0), linewidth=1.2, label=label)
    frame = run.frame()
    axis.plot(*drawn(frame["step"], frame[metric]), color=COLOURS[1], linewidth=0.9, label="this run")
    axis.set_yscale("log")
    axis.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)
    _label(axis, "training step", metric)
    return figure
