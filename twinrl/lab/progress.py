"""One progress bar over all stages of a build, or a share of somebody else's.

Where there is no terminal, plain lines stand in for the bar.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from torch import Tensor

from twinrl.machine.consoles import Console, Description, Pace


class Stage(Protocol):
    """Announces a stage of the build."""

    def __call__(self, name: str, cost: float, steps: int | None = None) -> Callable[[], None]:
        """What to call after each of the stage's steps.

        Arguments:
            name: shown beside the bar while the stage runs.
            cost: of one step, in the units of the bar's total.
            steps: after which the name disappears; None where no other stage follows or runs beside it.
        """
        ...


class InterruptedBuildError(Exception):
    """The build was given up elsewhere; raised in stages that are still running."""


Told: TypeAlias = Callable[[str, float], object]
"""Told what runs, and which share of the build in [0, 1] is made; from the stages' threads, too."""
Shown: TypeAlias = Callable[[str, Mapping[str, Tensor]], object]
"""Given a title, and rows of pixels (K, 3, H, W) in [−1, 1] by their labels; from the builder's thread."""


@dataclass(frozen=True)
class Watcher:
    """Whoever shows a build as a part of something longer."""

    told: Told
    shown: Shown


_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def show(title: str, rows: Mapping[str, Tensor]) -> None:
    """Give what is built so far to the watcher, as pictures; arguments as of :data:`Shown`."""
    if (watcher := _WATCHER.get()) is not None:
        watcher.shown(title, rows)


@contextmanager
def watched_by(told: Told, shown: Shown = lambda title, rows: None) -> Iterator[None]:
    """Builds inside draw no bar of their own and tell whoever watches instead.

    *When to use*: where a build is a part of something longer that shows its own progress.
    """
    token = _WATCHER.set(Watcher(told, shown))
    try:
        yield
    finally:
        _WATCHER.reset(token)


@contextmanager
def stages(title: str, total: float, shown: bool = True) -> Iterator[Stage]:
    """A bar over ``total`` units of cost that names the running stages; drawn on standard error unless watched.

    When the block ends, by an error or the keyboard too, stages still running in other threads are interrupted
    at their next step.

    Arguments:
        title: what is being built.
        total: sum over the stages of steps × cost.
        shown: False for silence.
    """
    columns = (Description(), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    watcher, console = _WATCHER.get() if shown else None, Console(stderr=True)
    drawn = shown and watcher is None
    with Progress(*columns, console=console, disable=not (drawn and console.is_interactive), transient=True) as bar:
        bar.add_task(title, total=total)
        build = _Build(title, total, bar, watcher, Pace() if drawn and bar.disable else None)
        try:
            yield build.stage
        finally:
            build.ended = True


@dataclass
class _Build:
    """A bar with one task, or lines at a pace; ``left``: the steps that a stage still has to make, by its name."""

    title: str
    total: float
    bar: Progress
    watcher: Watcher | None
    pace: Pace | None
    left: dict[str, int | None] = field(default_factory=dict)
    ended: bool = False

    def stage(self, name: str, cost: float, steps: int | None = None) -> Callable[[], None]:
        """As :class:`Stage`."""
        self.left[name] = steps
        self._describe()
        return lambda: self._tick(name, cost)

    def _tick(self, name: str, cost: float) -> None:
        if self.ended:
            raise InterruptedBuildError
        steps = self.left[name]
        self.left[name] = None if steps is None else steps - 1
        self.bar.advance(self.bar.task_ids[0], cost)
        if self.left[name] == 0:
            self._describe()
        else:
            self._tell()

    def _describe(self) -> None:
        running = ", ".join(name for name, steps in list(self.left.items()) if steps != 0)
        self.bar.update(self.bar.task_ids[0], description=f"{self.title}: {running}" if running else self.title)
        self._tell()

    def _tell(self) -> None:
        (task,) = self.bar.tasks
        share = task.completed / self.total
        if self.watcher is not None:
            self.watcher.told(task.description, share)
        elif self.pace is not None and self.pace.due(share):
            self.bar.console.print(f"{task.description} {share:.0%}", markup=False, soft_wrap=True)
