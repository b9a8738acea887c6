"""The verdict on a run, from its files: whether it failed, how, when, and what may rank it. Torch-free.

Studies, reports, halving, margins and the MLflow view all ask here, so no two of them disagree; the trainer uses the
same :class:`~twinrl.stability.divergence.Divergence` on its way.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from twinrl.config import validate
from twinrl.run import layout, names, runlog
from twinrl.run.columns import Columns
from twinrl.run.runlog import LogRow
from twinrl.stability.divergence import NONFINITE_PARAMETERS, Diverged, Divergence, first_divergence

if TYPE_CHECKING:
    import numpy as np

COMPLETE = ("finished", "stopped")
"""How a run ends that no failure has ended."""


def verdict(
    config: Mapping[str, Any],
    rows: Iterable[dict[str, Any]],
    start: LogRow | None = None,
    result: Mapping[str, Any] | None = None,
    events: Sequence[Mapping[str, Any]] = (),
) -> Diverged | None:
    """The failure of a run by its own margins (``stability.divergence``); None if there is none, or none yet.

    What a rollback has taken back is not judged: a run that it rescued has not failed.

    Arguments:
        config: the resolved configuration, nested; margins and floors that it lacks are the defaults.
        rows: the whole log. start: metrics of the start weights. result: of ``result.json``; None while it goes on.
        events: lines of ``events.jsonl``: the last one says at what a policy has stopped the run.
    """
    log = list(rows)
    return _of_lasting(config, runlog.surviving(log, log), start, result, events)


def of_columns(
    config: Mapping[str, Any],
    log: Columns,
    start: LogRow | None,
    result: Mapping[str, Any] | None,
    events: Sequence[Mapping[str, Any]],
) -> Diverged | None:
    """:func:`verdict` by the columns of a log that are :func:`telling`."""
    return _of_lasting(config, log.rows(_telling_rows(log)), start, result, events)


def telling(name: str) -> bool:
    """Whether a series of the log can decide a verdict."""
    return name.startswith((names.loss(""), "val/")) or name == NONFINITE_PARAMETERS


def _telling_rows(log: Columns) -> "np.ndarray":
    """Evaluations, rows with numbers that are not finite, and the next finite losses after those."""
    import numpy as np

    nothing = np.zeros(len(log.lasting), bool)
    losses = [name for name in log.values if name.startswith(names.loss(""))]
    measured = np.logical_or.reduce([nothing, *(log.logged[name] for name in losses)])
    bad = np.logical_or.reduce([nothing, *(log.logged[name] & ~np.isfinite(log.values[name]) for name in losses)])
    broken = log.logged.get(NONFINITE_PARAMETERS, nothing) & (log.values.get(NONFINITE_PARAMETERS, nothing) != 0)
    at = np.flatnonzero(measured & log.lasting)
    after = nothing.copy()
    after[at[1:]] = (bad | broken)[at[:-1]]
    evaluated = log.logged.get(names.VAL_QUALITY, nothing)
    return log.lasting & (evaluated | bad | after | broken)


def _of_lasting(
    config: Mapping[str, Any],
    rows: Iterable[LogRow],
    start: LogRow | None,
    result: Mapping[str, Any] | None,
    events: Sequence[Mapping[str, Any]],
) -> Diverged | None:
    own = (config.get("stability") or {}).get("divergence")
    nfe = (config.get("evaluation") or {}).get("nfe") or [1]
    status = (result or {}).get("status")
    margins = validate(Divergence.Config, own) if own else None
    found = first_divergence(rows, margins, int(nfe[0]), start, status in COMPLETE)
    if found is not None or status != "diverged":
        return found
    assert result is not None
    step, kind = int(result["step"]), str(events[-1]["kind"]) if events else "stopped by its policy"
    return Diverged(step, step, "", math.nan, None, str(result.get("message", "")), kind, max(0, step - 1))


def of_run(folder: Path, rows: Sequence[dict[str, Any]]) -> Diverged | None:
    """:func:`verdict` on a run directory, given its log."""
    return verdict(
        layout.read_config(folder),
        rows,
        layout.read_start(folder),
        layout.read_result(folder),
        runlog.surviving(layout.read_events(folder), rows),
    )


def encoded(start: LogRow) -> dict[str, object]:
    """Metrics as strict JSON."""
    return {name: runlog.encode(value) for name, value in start.items()}


def decoded(plain: Mapping[str, object]) -> LogRow:
    """The inverse of :func:`encoded`."""
    return {name: runlog.decode(value) for name, value in plain.items()}


def final_values(
    rows: Iterable[LogRow], wanted: Callable[[str], bool], failure: Diverged | None = None
) -> dict[str, float]:
    """The last value of each series that is ``wanted``; nan where that is from before the run failed.

    Arguments:
        rows: of the log that no rollback has taken back.

    *When to use*: for every number that ranks a run. A healthy value from before says nothing of what came of it.
    """
    found: dict[str, tuple[int, float]] = {}
    for row in rows:
        numbers = {name: value for name, value in row.items() if wanted(name) and _is_number(value)}
        found |= {name: (int(row["step"]), float(value)) for name, value in numbers.items()}
    return since(failure, found)


def since(failure: Diverged | None, found: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """The last (step, value) of each series as its value; nan where that is from before the run failed."""
    failed = -1 if failure is None else failure.step
    return {name: math.nan if step < failed else value for name, (step, value) in found.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
