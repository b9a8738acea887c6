"""One progress bar over all stages of a build, or a share of somebody else's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor


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
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    left: dict[str, int | None] = {}  # steps, by name of the stage
    ended, watcher = False, _WATCHER.get() if shown else None
    drawn = shown and watcher is None
    with Progress(*columns, console=Console(stderr=True), disable=not drawn, transient=True) as bar:
        task = bar.add_task(title, total=total)

        def describe() -> None:
            running = ", ".join(name for name, steps in list(left.items()) if steps != 0)
            bar.update(task, description=f"{title}: {running}")
            tell()

        def tell() -> None:
            if watcher is not None:
                watcher.told(bar.tasks[0].description, bar.tasks[0].completed / total)

        def stage(name: str, cost: float, steps: int | None = None) -> Callable[[], None]:
            left[name] = steps
            describe()
            return lambda: tick(name, cost)

        def tick(name: str, cost: float) -> None:
            if ended:
                raise InterruptedBuildError
            steps = left[name]
            left[name] = None if steps is None else steps - 1
            bar.advance(task, cost)
            if left[name] == 0:
                describe()
            else:
                tell()

        try:
            yield stage
        finally:
            ended = True
