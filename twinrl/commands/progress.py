"""What a person sees of a running run: progress bar, validation lines, events, and the MLflow view."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.text import Text

from twinrl.machine.consoles import Pace
from twinrl.run import names
from twinrl.stability.events import Event
from twinrl.tracking.mlflow_view import MLflowView

METRICS_SHOWN = {
    names.VAL_QUALITY: "quality",
    names.val("fd", 1): "fd at 1 NFE",
    names.val("accuracy", 1): "accuracy at 1 NFE",
}
EVENTS_SHOWN = 3


class ConsoleObserver:
    """A progress bar with the running loss, one line for each validation and each of the first events.

    Where the console is not a terminal (a file, a batch system's log), plain lines stand in for the bar, at a
    :class:`Pace`.
    Where nobody reads any more (a closed terminal or pipe), nothing is shown, and training goes on.

    Arguments:
        console: where to write.
        steps: of the whole run. done: steps that an earlier process made.
    """

    def __init__(self, console: Console, steps: int, done: int):
        self.console, self.average, self.events = console, math.nan, 0
        self.steps, self.pace = steps, Pace()
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(), TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self.task = self.progress.add_task("training", total=steps, completed=done, loss="")

    def __enter__(self) -> "ConsoleObserver":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._shown():
            self.progress.stop()

    @contextmanager
    def _shown(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SystemExit):  # rich's word for a closed pipe is the second
            self.console.quiet = True

    def after_step(self, row: Mapping[str, Any]) -> None:
        loss = row[names.LOSS_TOTAL]
        self.average = loss if math.isnan(self.average) else 0.95 * self.average + 0.05 * loss
        with self._shown():
            self._show(row)

    def _show(self, row: Mapping[str, Any]) -> None:
        self.progress.update(self.task, completed=row["step"], loss=f"loss {self.average:.4f}")
        if not self.console.is_terminal and self.pace.due(row["step"] / self.steps):
            self.progress.console.print(f"step {row['step']:>6} of {self.steps}  loss {self.average:.4f}")
        if names.VAL_QUALITY in row:
            shown = "  ".join(f"{label} {row[name]:.4f}" for name, label in METRICS_SHOWN.items() if name in row)
            self.progress.console.print(f"step {row['step']:>6}  {shown}")

    def after_checkpoint(self, offset: int) -> None:
        """Nothing to show."""

    def after_event(self, event: Event) -> None:
        self.events += 1
        if self.events <= EVENTS_SHOWN:
            last = "; further events are in events.jsonl alone" if self.events == EVENTS_SHOWN else ""
            with self._shown():
                self.progress.console.print(Text("event", "bold red"), f"{event.kind}: {event.message}{last}")


class MLflowObserver:
    """Publishes the log to MLflow whenever a checkpoint has made it durable."""

    def __init__(self, view: MLflowView):
        self.view = view

    def after_step(self, row: Mapping[str, Any]) -> None:
        """Steps are published at checkpoints."""

    def after_checkpoint(self, offset: int) -> None:
        self.view.publish_through(offset)

    def after_event(self, event: Event) -> None:
        """Events are in the log's rows."""


def judging(console: Console) -> Status:
    """A line while a run is judged."""
    return console.status("judging samples of the student and its teacher on the test split")
