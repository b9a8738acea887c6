"""The run directory of a loop that is not twinrl's, by the trainer's own writers."""

import logging
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.run.runlog import RunLog
from twinrl.stability.events import Event
from twinrl.training.runs import EventLog, NoLog, RunDirectory

_log = logging.getLogger(__name__)
SECONDS = 2.0
"""What is logged is on disk after so long, whatever happens to the process."""
_open: "WeakValueDictionary[Path, Book]" = WeakValueDictionary()


class Book:
    """One run as it is written; its folder is locked until it is closed.

    Arguments:
        path: the run directory.
        writes: whether this process writes; of several one does.
        fresh: an older run there may go. resume: it goes on.

    Attributes:
        begun: step whose gradient is there and whose row is not; 0 between steps.

    Raises:
        InputError: a run exists there, or none to be resumed; the folder can't be written.
    """

    def __init__(self, path: Path, writes: bool, fresh: bool = False, resume: bool = False):
        self.run, self.writes, self.fresh, self.resume = RunDirectory(path), writes, fresh, resume
        self.log: RunLog | NoLog = RunLog(self.run.log) if writes else NoLog()
        self.events: EventLog | NoLog = EventLog(self.run.events) if writes else NoLog()
        self.rows, self.step, self.begun, self.ended = 0, 0, 0, False
        self._synced, self._lengths = time.monotonic(), (0, 0)
        self._stack = ExitStack()

    def take(self) -> None:
        """Lock the folder; an older book of this process that is open there is closed first."""
        key = self.run.path.resolve()
        if (older := _open.get(key)) is not None:
            older.close()
        self._stack.enter_context(self.run.locked())
        try:
            self._check()
        except InputError:
            self._stack.close()
            raise
        _open[key] = self

    def _check(self) -> None:
        if self.resume and not self.run.exists:
            raise InputError(f"there is no run to resume: {self.run.path}", fix="leave resume out")
        if self.run.exists and not (self.fresh or self.resume):
            raise InputError(
                f"this run exists: {self.run.path}",
                fix="name another run; or fresh=True starts it over, resume=True goes on",
            )

    def start(self, settings: Settings) -> None:
        """Write configuration and environment: the run exists."""
        if not self.resume:
            self.run.start(settings, fresh=True)

    def append(self, row: Mapping[str, Any]) -> None:
        """Log a step."""
        self.log.append(row)
        self.rows, self.step = self.rows + 1, int(row["step"])
        if time.monotonic() - self._synced > SECONDS:
            self.sync()

    def record(self, event: Event) -> None:
        """Log an event, and say so where Python's logging is heard: by default on stderr."""
        self.events.append(event.as_dict())
        if self.writes:
            _log.warning("%s: %s", self.run.path, event.message)

    def sync(self) -> tuple[int, int]:
        """Put all on disk; the lengths of log and events in bytes."""
        self._synced = time.monotonic()
        if not self.ended and self.run.exists:
            self._lengths = self.log.sync(), self.events.sync()
        return self._lengths

    def trim(self, log: int, events: int) -> None:
        """Cut both back to where a checkpoint was made. Raises InputError where they are shorter."""
        self.log.check(log)
        self.events.check(events)
        self.log.trim(log)
        self.events.trim(events)

    def close(self, status: str | None = "finished", message: str = "") -> None:
        """Write how the run ended (None: it is to be resumed), and let go of its folder; twice is harmless."""
        if self.ended:
            return
        length, _ = self.sync()
        self.ended = True
        if status == "finished" and self.begun and self.writes:
            _log.warning(
                "%s: step %d is not in the log: watch.step() is missing after its backward", self.run.path, self.begun
            )
        if length and status is not None:
            result = {"status": status, "step": self.step, "message": message}
            self.run.finish({name: value for name, value in result.items() if value != ""})
        self.log.close()
        self.events.close()
        self._stack.close()

    def close_at_exit(self) -> None:
        """For the end of the process, or of whoever had the watch: unfinished where an exception has ended it."""
        failed = getattr(sys, "last_value", None) is not None or sys.exc_info()[0] is not None
        self.close(None if failed else "finished")
