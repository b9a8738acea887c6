"""Figures of a run: training curves, and where the sampled times lie.

Functions return a matplotlib ``Figure`` that is not registered with pyplot (nothing to close, no backend
chosen for the caller); those called ``save_…`` write it. matplotlib and pandas are imported on use.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor

from twinrl.machine import files
from twinrl.run import names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame, Series

TimeValues: TypeAlias = "Tensor | np.ndarray | Sequence[float]"
Frame: TypeAlias = "DataFrame | Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]"
"""Log rows: a pandas frame, columns by name, or the rows of log.jsonl, with a ``step`` column.

A value that was not finite is NaN in a row that has it, and the run log's string "nan" anywhere. What a row lacks is a
gap (nothing logged), as is NaN in a frame or in columns."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
WINDOWS = 100  # a curve's running median spans 1/WINDOWS of its points


def save(figure: "Figure", path: Path) -> Path:
    """Write ``figure`` as a PNG at 130 dpi and return its path. ``savefig`` would draw it twice, for its layout."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(130)
    figure.set_facecolor("white")
    with files.publishing(path) as new:
        FigureCanvasAgg(figure).print_png(new)
    return path


def save_times(times: tuple[Tensor, Tensor], path: Path) -> None:
    """Where the formulation evaluates the student: t against r, coloured by sign (experimental)."""
    save(time_scatter(*times), path)


def save_renoise(times: Mapping[float, Tensor], placement: Sequence[str], path: Path) -> None:
    """How the drawn renoise times move over the run."""
    save(renoise_histograms(times, placement), path)


def save_curves(rows: Frame, floor: Mapping[str, float], title: str, path: Path) -> None:
    """Losses and quality against steps, the real-against-real floor dotted."""
    save(training_curves(rows, floor=floor, title=title), path)


def save_norms(rows: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Per-term gradient norms and shares with the run's events; nothing where no per-term gradients were taken."""
    if rows and names.grad("total", "norm_raw") in rows[0]:
        save(gradient_norms(rows, events, title=title), path)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple["Figure", np.ndarray]:
    """A figure with a (rows, columns) array of quiet axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.92", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, axes


# --- times ----------------------------------------------------------------------------------------------


def time_scatter(t: TimeValues, r: TimeValues, *, title: str = "Sampled times") -> "Figure":
    """Scatter of source time t against target time r, coloured by the sign of t. Experimental.

    Arguments:
        t: (N,) source times in [−1, 1], negative on the fake ("twin") trajectory. r: (N,) target times.
    """
    source, target = np.asarray(t, dtype=float), np.asarray(r, dtype=float)
    figure, axes = _figure(1, 1, (5.6, 5.2))
    axis = axes[0, 0]
    lowest = -1.05 if (source < 0).any() else -0.05
    axis.plot([lowest, 1.05], [lowest, 1.05], color="0.75", linewidth=1, zorder=1)
    axis.annotate("r = t: instantaneous", (0.42, 0.42), (0, 6), textcoords="offset points", rotation=45,
                  rotation_mode="anchor", ha="center", color="0.45", fontsize=8)  # fmt: skip
    for keep, colour, what in (
        (source >= 0, COLOURS[0], "real, t ≥ 0"),
        (source < 0, COLOURS[1], "fake, t < 0"),
    ):
        label = f"{what} ({keep.sum():,} rows)"
        axis.scatter(source[keep], target[keep], s=9, color=colour, alpha=0.5, linewidths=0, label=label, zorder=2)
    if one_step := int(((source == 1) & (target == 0)).sum()):
        axis.annotate(f"{one_step:,} rows at (1, 0)", (1, 0), (-4, -14), textcoords="offset points", ha="right",
                      color="0.45", fontsize=8)  # fmt: skip
    axis.set(xlabel="source time t  (|t| = 1 is noise)", ylabel="target time r", aspect="equal",
             xlim=(lowest, 1.05), ylim=(lowest, 1.05), title=f"{title} (experimental)")  # fmt: skip
    axis.legend(loc="upper left", frameon=False, fontsize=9)
    return figure


def renoise_histograms(times: Mapping[float, TimeValues], placement: Sequence[str]) -> "Figure":
    """Histograms of drawn renoise times at several moments of the run, one above the other.

    Arguments:
        times: share of the run in [0, 1] → (N,) times drawn there.
        placement: which times of training these are.
    """
    figure, axes = _figure(len(times), 1, (5.6, 0.9 * len(times) + 1.0))
    for axis, (share, drawn) in zip(axes.flat, times.items(), strict=True):
        axis.hist(np.asarray(drawn, dtype=float), bins=25, range=(0, 1), color=COLOURS[0], density=True)
        axis.set_ylabel(f"{share:.0%}", rotation=0, ha="right", va="center")
        axis.set(yticks=[], xlim=(0, 1))
        if axis is not axes.flat[-1]:
            axis.set_xticklabels([])
    axes.flat[-1].set_xlabel("time (1 is noise)")
    figure.suptitle(f"Renoise of {', '.join(placement)} over the run", fontsize=11)
    return figure


# --- curves ---------------------------------------------------------------------------------------------


def _numeric(rows: Frame) -> "DataFrame":
    """Numeric columns indexed by ``step``; a logged nan becomes infinite, so that it differs from a gap."""
    import pandas as pd

    if not isinstance(rows, pd.DataFrame | Mapping):
        rows = [{name: "nan" if value != value else value for name, value in row.items()} for row in rows]
    frame = pd.DataFrame(rows)
    if "step" not in frame.columns:
        raise ValueError(f"no column 'step' among {', '.join(map(str, frame.columns))}")
    return frame.replace("nan", "inf").apply(pd.to_numeric, errors="coerce").set_index("step")


def training_curves(rows: Frame, *, floor: Mapping[str, float] | None = None, title: str | None = None) -> "Figure":
    """Losses, gradient norm, sample quality, accuracy and diversity against training steps.

    Panels without data are left out. Non-finite values are marked at the panel's lower edge.

    Arguments:
        rows: log rows; which columns are drawn follows :mod:`twinrl.run.names`.
        floor: real-against-real values by plain name (``LabelProtocol.floor``), drawn as dotted lines.
        title: above the panels.
    """
    import math

    frame, floor = _numeric(rows), floor or {}
    panels = [panel for panel in _panels(frame, floor) if panel[1]]
    if not panels:
        raise ValueError("no training metric to draw in these rows")
    columns = 2 if len(panels) > 1 else 1
    lines = math.ceil(len(panels) / columns)
    figure, axes = _figure(lines, columns, (6.4 * columns, 2.9 * lines + 0.3))
    for axis, (heading, curves, floors, log_scale) in zip(axes.flat, panels, strict=False):
        _panel(axis, heading, {label: frame[name] for label, name in curves.items()}, floors, log_scale)
    for axis in list(axes.flat)[len(panels) :]:
        axis.remove()
    if title:
        figure.suptitle(title)
    return figure


EVENT_COLOURS = {"spike": "#D55E00", "nonfinite": "#000000", "drift": "#E69F00", "diverged": "#CC79A7"}


def gradient_norms(rows: Frame, events: Sequence[Mapping[str, Any]] = (), *, title: str | None = None) -> "Figure":
    """Every term's gradient norm as rules leave it, and every term's share, with the events as vertical lines.

    The total is what enters the optimizer. Dotted: norms before rules, where these changed them.

    Arguments:
        rows: log rows, with an ``iteration`` column where a run was rolled back.
        events: lines of events.jsonl (``iteration``, ``kind``).
        title: above the panels.
    """
    frame = _numeric(rows)
    frame = frame.set_index("iteration") if "iteration" in frame.columns else frame
    raw, shares = _per_term(frame, "norm_raw"), _per_term(frame, "share")
    norms = raw | _per_term(frame, "norm_clipped")
    panels = [(h, c, log) for h, c, log in (("Gradient norm after rules (dotted: before)", norms, True),
                                            ("Signed share of the gradient", shares, False)) if c]  # fmt: skip
    if not panels:
        raise ValueError("no per-term gradient norm in these rows")
    figure, axes = _figure(len(panels), 1, (9.6, 2.9 * len(panels) + 0.3))
    for axis, (heading, curves, log_scale) in zip(axes.flat, panels, strict=True):
        _mark(axis, events)
        shown = {label: frame[name] for label, name in curves.items()}
        _panel(axis, heading, {k: s.where(s != 0) for k, s in shown.items()} if log_scale else shown, {}, log_scale)
        for colour, (label, after) in zip(COLOURS * len(shown), shown.items() if log_scale else (), strict=False):
            _before_rules(axis, frame[raw[label]] if label in raw else after, after, colour)
        axis.set_xlabel("iteration", fontsize=9)
    if title:
        figure.suptitle(title)
    return figure


def _before_rules(axis: "Axes", raw: "Series", after: "Series", colour: str) -> None:
    """The norm before rules, dotted, where these have changed it by a thousandth or more anywhere."""
    factor = (after / raw)[np.isfinite(after / raw)]
    if (np.abs(factor - 1) > 1e-3).any():
        finite = raw[np.isfinite(raw) & (raw > 0)]
        window = max(1, len(finite) // WINDOWS)
        median = finite.rolling(window, center=True, min_periods=1).median()
        axis.plot(median.index, median, color=colour, linewidth=1.2, linestyle=":")


def _per_term(frame: "DataFrame", quantity: str) -> dict[str, str]:
    """Term → column of a gradient quantity; the total last."""
    prefix, suffix = names.grad("\n", quantity).split("\n")
    found = {
        str(c)[len(prefix) : -len(suffix)]: str(c)
        for c in frame
        if str(c).startswith(prefix) and str(c).endswith(suffix)
    }
    return dict(sorted(found.items(), key=lambda item: item[0] == "total"))


def _mark(axis: "Axes", events: Sequence[Mapping[str, Any]]) -> None:
    """A thin vertical line for each event, one legend entry for each kind."""
    named: set[str] = set()
    for event in events:
        kind = str(event["kind"])
        label = None if kind in named else kind
        axis.axvline(event["iteration"], color=EVENT_COLOURS.get(kind, "0.5"), linewidth=0.7, alpha=0.6, label=label)
        named.add(kind)


def _panels(frame: "DataFrame", floor: Mapping[str, float]) -> list[tuple[str, dict[str, str], dict[str, float], bool]]:
    """(heading, label → column, label → floor, logarithmic) of every panel, absent columns dropped."""

    def curves(**labelled: str) -> dict[str, str]:
        return {label.replace("_", " "): name for label, name in labelled.items() if name in frame.columns}

    def by_nfe(quantity: str) -> dict[str, str]:
        found = {f"{nfe} NFE": names.val(quantity, nfe) for nfe in range(1, 65)}
        return {label: name for label, name in found.items() if name in frame.columns}

    def floors(quantity: str) -> dict[str, float]:
        return {"real images (floor)": floor[quantity]} if quantity in floor else {}

    losses = {name.removeprefix("loss/"): name for name in frame.columns if str(name).startswith("loss/")}
    norms = curves(before_clipping=names.GRAD_TOTAL_RAW, after_clipping=names.GRAD_TOTAL_CLIPPED)
    return [
        ("Loss", losses, {}, True),
        ("Gradient norm", norms, {}, True),
        ("Kernel distance to real images ↓", by_nfe("kid"), {}, False),
        ("Fréchet distance to real images ↓", by_nfe("fd"), floors("fd"), True),
        ("Judge accuracy ↑", by_nfe("accuracy"), {}, False),
        ("Precision (fidelity) ↑", by_nfe("precision"), floors("precision"), False),
        ("Recall (diversity) ↑", by_nfe("recall"), floors("recall"), False),
        ("Velocity error on held-out images ↓", curves(velocity_error=names.VAL_VELOCITY_MSE), {}, False),
    ]


def _panel(
    axis: "Axes", heading: str, curves: Mapping[str, "Series"], floors: Mapping[str, float], log_scale: bool
) -> None:
    """One panel: every curve in its colour, floors dotted, the legend beside it so that it hides nothing."""
    for colour, (label, series) in zip(COLOURS * len(curves), curves.items(), strict=False):
        _curve(axis, label, series, colour)
    for label, value in floors.items():
        axis.axhline(value, color="0.35", linestyle=":", linewidth=1.4, label=label)
    if any(np.isinf(series).any() for series in curves.values()):
        axis.plot([], [], "x", color="0.35", label="not finite")
    if log_scale and any((series > 0).any() for series in curves.values()):
        _logarithmic(axis)
    axis.set_title(heading, loc="left", fontsize=11)
    axis.set_xlabel("training step", fontsize=9)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.02))


def _curve(axis: "Axes", label: str, series: "Series", colour: str) -> None:
    """A logged series: dense ones as their running median over the faint raw line, which keeps every spike."""
    finite = series[np.isfinite(series)]
    window = max(1, len(finite) // WINDOWS)
    if window > 1:
        axis.plot(finite.index, finite, color=colour, alpha=0.3, linewidth=0.5)
        finite = finite.rolling(window, center=True, min_periods=1).median()
    marker = "o" if len(finite) <= 40 else None
    axis.plot(finite.index, finite, color=colour, linewidth=1.6, label=label, marker=marker, markersize=3.5)
    steps = series.index[np.isinf(series)]
    if len(steps):
        edge = axis.get_xaxis_transform()
        axis.plot(steps, np.zeros(len(steps)), "x", color=colour, transform=edge, clip_on=False)


def _logarithmic(axis: "Axes") -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5, or at powers of ten over a wide range."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high / low > 1000 else (1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
