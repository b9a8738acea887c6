"""One progress bar over all stages of a build."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Stage = Callable[[str, float], Callable[[], None]]
"""(name of the stage, cost of one of its steps) → what to call after each step."""


@contextmanager
def stages(title: str, total: float, shown: bool = True) -> Iterator[Stage]:
    """A bar over ``total`` units of cost that names the current stage; drawn on standard error.

    Arguments:
        title: what is being built.
        total: sum over the stages of steps × cost.
        shown: False for silence.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(), disable=not shown, transient=True) as bar:
        task = bar.add_task(title, total=total)

        def stage(name: str, cost: float) -> Callable[[], None]:
            bar.update(task, description=f"{title}: {name}")
            return lambda: bar.advance(task, cost)

        yield stage


def _console() -> object:
    from rich.console import Console

    return Console(stderr=True)
