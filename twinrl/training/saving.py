"""Checkpoints of a run in training: written at once or in the background, and on disk before the next one is."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from twinrl.config.errors import InputError
from twinrl.fsdp.ranks import Ranks
from twinrl.run import checkpoints
from twinrl.run.checkpoints import Checkpoint, SaveError
from twinrl.run.runlog import RunLog
from twinrl.training.runs import EventLog, NoLog, RunDirectory
from twinrl.training.schema import CheckpointConfig


class Informed(Protocol):
    """Is told about checkpoints."""

    def after_checkpoint(self, offset: int) -> None:
        """A checkpoint is on disk; the log is durable up to byte ``offset``."""


class Saver:
    """Writes the states of a run, each together with the lengths of the logs that belong to it.

    Arguments:
        config: when, how many, and what if it fails.
        run: its directory. ranks: the processes that write together.
        log, events: made durable before each state, so that a resumed run cuts them back to it.
        observers: are told when a checkpoint is on disk.

    Attributes:
        newest: iteration of the newest checkpoint that is on disk, or about to be; None if there is none.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        run: RunDirectory,
        ranks: Ranks,
        log: RunLog | NoLog,
        events: EventLog | NoLog,
        observers: Sequence[Informed],
    ):
        self.config, self.run, self.ranks, self.observers = config, run, ranks, observers
        self.log, self.events = log, events
        self.newest: int | None = None
        self.pending: tuple[Future[None], int] | None = None  # a checkpoint being written, and the log's length in it

    def save(self, step: int, iteration: int, state: Callable[[int, int], Checkpoint]) -> None:
        """Write a checkpoint, or only begin to (:meth:`settle`).

        Arguments:
            step, iteration: where training is.
            state: given the lengths of log and events, everything that training needs to go on.

        Raises:
            SaveError: the disk is full, read-only or away; older checkpoints are untouched.
        """
        offsets = self.synced()
        where = self.run.checkpoints, step, state(*offsets), self.config.keep
        if self.config.asynchronous:
            self.pending = self.ranks.save_later(*where), offsets[0]
        else:
            self.ranks.save(*where)
            self._tell(offsets[0])
        self.newest = iteration

    def check_never_saved(self) -> None:
        """Raises InputError where no checkpoint is there and the log is longer than until the first one was due.

        A start from the beginning would cut that log off.
        """
        if self.config.on_error == "continue" or not self.run.log.is_file():
            return
        made = self.run.log.read_bytes().count(b"\n")
        if made > self.config.every * (2 if self.config.asynchronous else 1):
            raise InputError(
                f"the checkpoints of {self.run.path} are gone", got=f"a log of {made} steps",
                fix=f"put them back, or delete {self.run.log} to start from the beginning",
            )  # fmt: skip

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one. Raises SaveError if it could not be."""
        if self.pending is None:
            return
        (future, offset), self.pending, newest = self.pending, None, self.newest
        self.newest = None
        self.ranks.together(future.result)
        self.newest = newest
        self._tell(offset)

    def _tell(self, offset: int) -> None:
        for observer in self.observers:
            observer.after_checkpoint(offset)

    def synced(self) -> tuple[int, int]:
        """Put log and events on disk; their lengths."""
        lengths: list[int] = [0, 0]

        def sync() -> None:
            with checkpoints.saving(self.run.path):
                lengths[:] = self.log.sync(), self.events.sync()

        self.ranks.on_first(sync)
        return lengths[0], lengths[1]

    def attempt(self, action: Callable[[], None], step: int) -> None:
        """Write, or go on without what could not be written if ``checkpoint.on_error`` says so."""
        try:
            action()
        except SaveError as error:
            if self.config.on_error == "stop":
                raise
            if self.ranks.first:
                logging.getLogger(__name__).warning("step %d: %s", step, error)
