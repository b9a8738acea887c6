"""``twinrl replay``: an event's steps again, with a change, side by side."""

import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.table import Table

from twinrl.commands.progress import METRICS_SHOWN
from twinrl.flow.source import Data
from twinrl.machine.consoles import Description
from twinrl.run import layout, names, runlog
from twinrl.training import assembly
from twinrl.training.capsules import Capsules
from twinrl.training.replay import Replay, ReplayValidation, Trace
from twinrl.training.replay import replay as run_again
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig

SHOWN_BEFORE, SHOWN_AFTER = 8, 12


def replay(path: Path, event: int | None, overrides: list[str], after: int, judge: int | None, console: Console) -> int:
    """Replay an event, or list the run's events where none is named; the exit code."""
    run = RunDirectory(path)
    settings = run.settings()
    if event is None:
        console.print(listing(run, Capsules(path, settings.stability.capsules)))
        return 0

    columns = Description(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def tell(label: str, step: int, steps: int) -> None:
            if label not in tasks:
                tasks[label] = progress.add_task(label, total=steps)
            progress.update(tasks[label], completed=step)

        judging = None if judge is None else judge_of(settings, judge)
        result = run_again(run, event, overrides, loaded, after, judging, tell)
    console.print(side_by_side(result))
    if result.judged:
        console.print(validations(result))
    for line in verdict(result):
        console.print(line)
    return 0


def judge_of(settings: RunConfig, every: int) -> ReplayValidation:
    """The run's own validation, every so many steps."""
    provider = assembly.provider_of(settings, *loaded(settings))
    protocol = provider.protocol("validation")
    return ReplayValidation(every, lambda network, step: protocol.evaluate(provider.judged(network)))


def loaded(settings: RunConfig) -> tuple[Data, torch.device]:
    """Data and device of a configuration; the number of threads is set on the way."""
    device = assembly.machine_of(settings)
    return assembly.load_source(settings, device), device


def listing(run: RunDirectory, capsules: Capsules) -> Table:
    """The run's events and which of them can be replayed."""
    table = Table(title=f"events of {run.path}")
    for column in ("event", "step", "kind", "terms", "replay", "message"):
        table.add_column(column)
    kept = set(capsules.numbers())
    for number, event in enumerate(layout.read_events(run.path), 1):
        can = "yes" if number in kept else "no capsule"
        table.add_row(str(number), str(event["step"]), event["kind"], ", ".join(event["terms"]), can, event["message"])
    return table


def side_by_side(result: Replay) -> Table:
    """Norms and losses around the event: as logged, replayed, and with the change."""
    leading = result.event.terms[:1]
    series = {"loss": names.LOSS_TOTAL, "‖g‖": names.GRAD_TOTAL_RAW}
    series |= {f"‖g {name}‖": names.grad(name, "norm_raw") for name in leading}
    letters = dict(zip("AB", (trace.label for trace in result.traces), strict=False))
    caption = ", ".join(f"{letter}: {label}" for letter, label in letters.items())
    table = Table(title=f"event: {result.event.message}", caption=caption)
    table.add_column("step", justify="right", no_wrap=True)
    for letter in letters:
        for label in series:
            table.add_column(f"{letter} {label}", justify="right", no_wrap=True)
    at = result.event.iteration
    for rows in zip(*(trace.rows for trace in result.traces), strict=True):
        if -SHOWN_BEFORE <= rows[0]["iteration"] - at <= SHOWN_AFTER:
            cells = [_number(row.get(name)) for row in rows for name in series.values()]
            style = "bold" if rows[0]["iteration"] == at else ""
            table.add_row(str(rows[0]["step"]), *cells, style=style)
    return table


def validations(result: Replay) -> Table:
    """What the samples of every trace were judged to be, step by step."""
    table = Table(title="samples on the way: " + ", ".join(METRICS_SHOWN.values()))
    table.add_column("step", justify="right", no_wrap=True)
    traces = [*result.traces, *result.placebos]
    for trace in traces:
        table.add_column(trace.label, justify="right")
    for rows in zip(*(trace.rows for trace in traces), strict=True):
        if names.VAL_QUALITY in rows[0]:
            cells = [" ".join(_number(row[name]) for name in METRICS_SHOWN if name in row) for row in rows]
            table.add_row(str(rows[0]["step"]), *cells)
    return table


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else str(runlog.encode(value))


def verdict(result: Replay) -> list[str]:
    """What the traces say, in words."""
    unchanged, *others = result.traces
    differs = "differs from the log in some digits (another machine or thread count?)"
    lines = [f"the unchanged replay {'repeats the log exactly' if result.exact else differs}"]
    lines += [_says(result, trace) for trace in [*(others or [unchanged]), *result.placebos]]
    lines += [_peaks(result)] if others else []
    if others and not result.recurs(unchanged):
        lines.append("the event does not recur even unchanged, so the change cannot be judged from this replay")
    elif not all(result.recurs(trace) for trace in result.placebos):
        lines.append(
            f"a slightly different learning rate removes this {result.event.kind}, too, so its absence shows no cause; "
            "compare heights with these over several events"
        )
    return lines + (_lives(result) if result.judged else [])


def _lives(result: Replay) -> list[str]:
    """Whether the run would have lived, trace by trace, and what that shows."""
    traces = [*result.traces, *result.placebos]
    falls = {trace.label: result.fell(trace) for trace in traces}
    lines = [
        f"{label}: {'whole to the last of these steps' if fall is None else f'fell apart at step {fall.step}'}"
        for label, fall in falls.items()
    ]
    if falls[traces[0].label] is None:
        lines.append("the run does not fall apart within these steps even unchanged: judge more of them (--after)")
    elif any(falls[trace.label] is None for trace in result.placebos):
        lines.append("a slightly different learning rate saves the run, too, so that a change saves it shows no cause")
    return lines


def _peaks(result: Replay) -> str:
    heights = [f"{_number(result.peak(trace))} ({trace.label})" for trace in [*result.traces, *result.placebos]]
    usually = f"; usually {_number(result.event.reference)}" if result.event.reference is not None else ""
    return f"{result.event.series} around the event: {', '.join(heights)}{usually}"


def _says(result: Replay, trace: Trace) -> str:
    kind = result.event.kind
    largest = max((row[names.GRAD_TOTAL_RAW] for row in trace.rows), key=lambda v: v if not math.isnan(v) else math.inf)
    if result.recurs(trace):
        return f"{trace.label}: the {kind} recurs at step {trace.found[kind]} (largest ‖g‖ {largest:.4g})"
    return f"{trace.label}: no {kind} (largest ‖g‖ {largest:.4g})"
