"""The whole of ``ablate run`` in one display: the data, which may have to be built first, the trials, the report.

A terminal shows one bar over these parts, and the study's table while trials run. Anything else gets plain lines.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from torch import Tensor

from ablations.display import BESIDES, Board, duration, failure_lines
from ablations.plan import Plan
from ablations.study import Study
from twinrl.evaluation import grids
from twinrl.lab import progress
from twinrl.machine.consoles import Pace

BUILD, CLOSING = 4000.0, 400.0
"""What building the laboratory and the report cost, in steps; for the bar alone."""
BUILT = "data.png"
"""Picture of the data, where they had to be built."""
BAR_WIDTH = 24
SETTLED_SECONDS = 5


@dataclass
class Part:
    """A part of the whole.

    Attributes:
        work: in steps, roughly. share: made, in [0, 1]. before: made when the command was started.
    """

    work: float
    share: float = 0.0
    before: float = 0.0


class Course:
    """One bar over the parts of a study's run.

    Arguments:
        study: to be run. console: where it is shown.

    *When to use*: as a context manager around everything that takes time, :meth:`data` around what loads the data,
    :meth:`planned` once it is known what is missing, :meth:`trials` while they run, and :meth:`closing` after them.
    """

    def __init__(self, study: Study, console: Console):
        steps = sum(arm.settings.train.steps + BESIDES for arm in study.arms)
        self.build, self.trained, self.closed = Part(0), Part(steps * len(study.config.seeds)), Part(CLOSING)
        self.console, self.what = console, "loading the data"
        self.began, self._pace, self._lock = time.monotonic(), Pace(), RLock()
        self._live = Live(self, console=console, refresh_per_second=2, transient=True)
        self.board: Board | None = None

    def __enter__(self) -> "Course":
        if self.console.is_interactive:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    # --- the parts ----------------------------------------------------------------------------------------

    @contextmanager
    def data(self, folder: Path) -> Iterator[None]:
        """While data are loaded; a build fills the bar's first part, and its picture goes to ``folder``."""
        with progress.watched_by(self._building, lambda title, rows: self._picture(folder, title, rows)):
            yield
        self.build.share = 1.0

    def _building(self, what: str, share: float) -> None:
        with self._lock:  # models are trained side by side
            self.build.work, self.build.share, self.what = BUILD, share, what
            if not self.console.is_interactive and self._pace.due(share):
                self.console.print(f"{escape(what)} {share:.0%}", soft_wrap=True)

    def _picture(self, folder: Path, title: str, rows: Mapping[str, Tensor]) -> None:
        path = folder / BUILT
        with suppress(OSError):  # a workspace that can't be written is refused when the study's index is
            folder.mkdir(parents=True, exist_ok=True)
            grids.save(grids.sample_grid(torch.stack(list(rows.values())), list(rows)), path)
            self.console.print(f"{escape(title)}: {escape(str(path))}", soft_wrap=True)

    def planned(self, plan: Plan) -> None:
        """Take what the ledger has for made."""
        self.trained.share = self.trained.before = 1 - len(plan.missing) / len(plan.trials)
        self.what = "starting the trials"

    @contextmanager
    def trials(self, board: Board) -> Iterator[None]:
        """While trials run: their table above the bar."""
        self.board = board
        try:
            yield
        finally:
            self._take_trials()
            self.board = None

    def _take_trials(self) -> None:
        if self.board is not None:
            part = self.trained
            part.share = part.before + (1 - part.before) * self.board.share()
            self.what = self.board.state()

    def closing(self, what: str, share: float = 0.0) -> None:
        """``what`` is done now that trials are over; ``share`` in [0, 1] of what then comes is made."""
        self.what, self.closed.share = what, share

    # --- what is shown ------------------------------------------------------------------------------------

    def made(self, before: bool = False) -> float:
        """Steps' worth of work that is made, or was before the command."""
        parts = (self.build, self.trained, self.closed)
        return sum(part.work * (part.before if before else part.share) for part in parts)

    def left(self) -> str:
        """How much longer it takes, by the pace so far; empty where nothing tells."""
        whole = self.build.work + self.trained.work + self.closed.work
        here, elapsed = self.made() - self.made(before=True), time.monotonic() - self.began
        if here <= 0 or elapsed < SETTLED_SECONDS:
            return ""
        return f"{duration(elapsed / here * (whole - self.made()))} left"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self._take_trials()
        if self.board is not None:
            yield self.board.table()
            yield from failure_lines(self.board.failures)
        share = self.made() / (self.build.work + self.trained.work + self.closed.work)
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True, overflow="ellipsis")
        line.add_row(escape(self.what), ProgressBar(1.0, share, width=BAR_WIDTH), f"{share:.0%}", self.left())
        yield line
