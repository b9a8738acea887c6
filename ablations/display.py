"""What a person sees of a study: the plan, a live table while trials run, and the outcome of each arm."""

import math
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ablations.design import arm_name
from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial
from ablations.trial import Task, checkpointed
from twinrl.run import layout
from twinrl.stability.divergence import NEVER_WHOLE

TAIL_BYTES = 4096
FAILURES_SHOWN = 10
BESIDES = 300.0
"""What a trial costs besides its steps, in steps, roughly; for what is said to be left."""
LEFT = ("begun", "failed", "missing")
MOST_COLUMNS = 3
TEST_ACCURACY = "test/accuracy_1nfe"


def duration(seconds: float) -> str:
    """``"1 h 05 min"``, ``"4 min 10 s"``, ``"12 s"``."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def by_arm(plan: Plan) -> dict[str, list[Trial]]:
    """Arm → its trials, one for each seed."""
    found: dict[str, list[Trial]] = {}
    for trial in plan.trials:
        found.setdefault(trial.arm, []).append(trial)
    return found


def arms_table(plan: Plan, running: Mapping[str, str] | None = None) -> Table:
    """One line for each arm: how many of its seeds are where, and the median of the study's metric.

    Arguments:
        running: key → step, of trials in flight.
    """
    running, metric = running or {}, plan.study.config.metric
    factors = _columns(plan)
    table = Table(title=f"study {plan.study.name}", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for heading in factors or ("arm",):
        table.add_column(escape(heading), overflow="fold")
    for heading in ("done", "diverged", "left", f"median\n{metric}", "accuracy\n1 NFE"):
        table.add_column(heading, justify="right")
    if running:
        table.add_column("running")
    for arm, trials in by_arm(plan).items():
        records = [record for trial in trials if (record := plan.record(trial)) is not None]
        active = ", ".join(f"s{t.settings.seed} {running[t.key]}" for t in trials if t.key in running)
        cells = [
            f"{len(records)}/{len(trials)}",
            _failed(records),
            _left(plan, trials),
            median(records, metric, math.inf),
            median(records, TEST_ACCURACY, 0.0),
        ]
        names = [trials[0].levels[factor] for factor in factors] or [arm]
        table.add_row(*map(escape, names), *cells, *([active] if running else []))
    return table


def _columns(plan: Plan) -> list[str]:
    """The factors to give columns of their own: where the arms' names only spell out levels, which would be long."""
    factors = list(plan.study.factors)
    spelled = all(trial.arm == arm_name(trial.levels) and len(trial.levels) == len(factors) for trial in plan.trials)
    return factors if spelled and 1 < len(factors) <= MOST_COLUMNS else []


def _left(plan: Plan, trials: Sequence[Trial]) -> str:
    states = [plan.state(trial) for trial in trials]
    return ", ".join(f"{states.count(state)} {state}" for state in LEFT if state in states) or "–"


def _failed(records: Sequence[TrialRecord]) -> str:
    """How many runs failed, and what of them needs saying."""
    failures = [record.diverged for record in records if record.diverged is not None]
    notes = {NEVER_WHOLE: sum(failure["kind"] == NEVER_WHOLE for failure in failures),
             "recovered": sum(bool(failure.get("recovered")) for failure in failures)}  # fmt: skip
    said = ", ".join(f"{count} {note}" for note, count in notes.items() if count)
    return f"{len(failures)} ({said})" if said else str(len(failures) or "–")


def median(records: Sequence[TrialRecord], metric: str, worst: float) -> str:
    """Median over the records; ``worst`` stands for what is not finite, or was not measured as the run was lost."""
    values = [record.metrics.get(metric, math.nan) for record in records if metric in record.metrics or record.lost]
    values = [value if math.isfinite(value) else worst for value in values]
    return f"{statistics.median(values):.4g}" if values else "–"


class Board:
    """The live table of a study in progress, and its plain lines where the console is no terminal.

    Arguments:
        plan: as it was before the start. tasks: what is to run now, by key.
    """

    def __init__(self, plan: Plan, tasks: Mapping[str, Task], console: Console):
        self.plan, self.tasks, self.console = plan, dict(tasks), console
        self.running: set[str] = set()
        self.ended: set[str] = set()
        self.failures: list[tuple[Task, str]] = []
        self.began, self.pictured = time.monotonic(), False

    def start(self, key: str) -> None:
        """A trial has begun."""
        self.running.add(key)

    def end(self, key: str, note: str) -> None:
        """A trial has ended, or was stopped."""
        self.running.discard(key)
        self.ended.add(key)
        if not self.console.is_interactive:
            counted = f"{len(self.ended)}/{len(self.tasks)}"
            self.console.print(
                f"{counted}  {escape(self.tasks[key].title)}: {escape(note)}; {self.eta()}", soft_wrap=True
            )
        self.plan = self.plan.reread()

    def fail(self, key: str, message: str) -> None:
        """A trial has failed for the last time."""
        self.failures.append((self.tasks[key], message))
        self.end(key, f"failed: {message}")

    def look(self) -> None:
        """Name the first picture that a running trial has drawn, once."""
        for key in [] if self.pictured else sorted(self.running):
            if drawn := layout.grids(Path(self.tasks[key].directory)):
                self.pictured = True
                self.console.print(f"first samples: {escape(str(drawn[0]))}", soft_wrap=True)
                return

    def share(self) -> float:
        """Of the trials that are to run now, in [0, 1]."""
        work = len(self.ended) + sum(fraction(self.tasks[key]) for key in sorted(self.running))
        return work / len(self.tasks)

    def eta(self) -> str:
        """How much is left, from the pace since the start."""
        work = self.share()
        pace = (time.monotonic() - self.began) / work if work > 0 else math.nan
        return f"{duration((1 - work) * pace)} left" if work < 1 else "all ended"

    def state(self) -> str:
        """How many trials are where."""
        return f"{len(self.ended)} of {len(self.tasks)} trials ended, {len(self.running)} running"

    def table(self) -> Table:
        """The arms, with the steps of what runs."""
        return arms_table(self.plan, {k: f"{round(100 * fraction(self.tasks[k]))}%" for k in sorted(self.running)})

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table()
        yield f"{self.state()}; {self.eta()}"
        yield from failure_lines(self.failures)


@contextmanager
def live(board: Board) -> Iterator[None]:
    """Show the table while trials run, on a terminal that can."""
    shown = Live(board, console=board.console, refresh_per_second=1, transient=True)
    with shown if board.console.is_interactive else nullcontext():
        yield


def failure_lines(failures: Sequence[tuple[Task, str]]) -> list[str]:
    """One line for each failed trial, with its output's file."""
    lines = [
        f"[red]failed[/] {escape(task.title)}: {escape(message)} ({escape(task.output)})" for task, message in failures
    ]
    more = len(lines) - FAILURES_SHOWN
    return lines[:FAILURES_SHOWN] + ([f"… and {more} more"] if more > 0 else [])


def fraction(task: Task) -> float:
    """Share of a trial that is made, from its output or its newest checkpoint."""
    shown = re.findall(r"step +(\d+)", _tail(Path(task.output)))
    return min(1.0, max(checkpointed(task.path), int(shown[-1]) if shown else 0, 0) / (task.steps + BESIDES))


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
