"""The ledger: one JSON line for each finished trial, append-only, so that no finished trial is ever repeated.

A trial is its configuration's hash, its seed and the fingerprint of what else decides its numbers. Where and when
it ran is provenance. Ledgers of several machines are merged by reading them together (or by concatenating the
files, or by git): a key stands for the same numbers wherever it was computed.

Appending is atomic: one ``write`` of one line under a file lock, undone if the disk takes only a part of it. What a
killed writer leaves without its newline is no line, and the next writer cuts it off.
"""

import errno
import io
import json
import os
import socket
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any

from pydantic import ValidationError

from twinrl.config import one_line
from twinrl.config.errors import InputError
from twinrl.machine import files, memory
from twinrl.run import runlog, trial_lines
from twinrl.run.trial_lines import LEDGER_FORMAT

FINAL = ("finished", "stopped", "diverged")
"""How a run ends by its own rules; also what the study's halving prunes and what failed is on record."""
RANK = {"failed": 0, "pruned": 1} | dict.fromkeys(FINAL, 2)
LEDGER_PATIENCE_SECONDS = 30


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """The outcome of a trial.

    Attributes:
        config_hash, seed, fingerprint: what it is.
        status: finished, stopped, diverged; pruned (by halving); failed (no result, to be tried again).
        step: optimizer steps made.
        message: why, where the status alone does not say it.
        metrics: final table and last validation, flat; non-finite values are kept.
        diverged: step and kind of the failure, if there was one; since when the run was not known to be sound
            (``after``), and whether it had ``recovered`` by its end.
        seconds: of training, summed over the log.
        where: host, revision, directory and time; provenance.
    """

    config_hash: str
    seed: int
    fingerprint: str
    status: str
    step: int = 0
    message: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    diverged: Mapping[str, Any] | None = None
    seconds: float = 0.0
    where: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """What identifies the trial."""
        return key_of(self.config_hash, self.seed, self.fingerprint)

    @property
    def final(self) -> bool:
        """Whether the run ended by its own rules."""
        return self.status in FINAL

    @property
    def lost(self) -> bool:
        """Whether the run failed and did not recover."""
        return self.diverged is not None and not self.diverged.get("recovered", False)

    def line(self) -> str:
        """The record as strict JSON without newline."""
        content = asdict(self) | {"metrics": {name: runlog.encode(value) for name, value in self.metrics.items()}}
        return json.dumps({"format": LEDGER_FORMAT, **content}, allow_nan=False)


def key_of(config_hash: str, seed: int, fingerprint: str) -> str:
    """What identifies a trial."""
    return f"{config_hash}-s{seed}-{fingerprint}"


def provenance(directory: Path, revision: str | None) -> dict[str, Any]:
    """Where and when a trial ended, for :attr:`TrialRecord.where`."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"host": socket.gethostname(), "revision": revision, "directory": str(directory), "at": now}


class Ledger:
    """Records in one or several files, of which only what is new is read again.

    Arguments:
        paths: files, or folders whose ``*.jsonl`` are all read. The first is written to; in a folder that is the
            file named after this machine, so that several machines' work can be committed side by side.

    Raises:
        InputError: a file is not a ledger, or can't be read.
    """

    def __init__(self, *paths: Path):
        self.paths = paths
        first = paths[0]
        self.own = first if first.suffix == ".jsonl" else first / f"{socket.gethostname()}.jsonl"
        self._known: dict[str, TrialRecord] = {}
        self._ends: dict[Path, tuple[int, int]] = {}  # file → its inode, and the bytes of it that are known
        self._reading = Lock()  # a study's table and its view in MLflow read in threads of their own

    def read(self) -> dict[str, TrialRecord]:
        """Key → record, of all files; a final record goes before a pruned and that before a failed one."""
        with self._reading:
            paths = list(self._files())
            if any(path not in paths or not _grown(path, *end) for path, end in self._ends.items()):
                self._known, self._ends = {}, {}
            for path in paths:
                self._learn(path)
            return dict(self._known)

    def _learn(self, path: Path) -> None:
        """Take in the lines of a file that are not known yet."""
        inode, end = self._ends.get(path, (0, 0))
        try:
            files.check_plain(path)
            with path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                file.seek(end)
                lines = file.read().split(b"\n")[:-1]  # what has no newline is no line
        except OSError as error:
            raise InputError(f"the ledger {path} can't be read", got=error.strerror) from error
        with memory.uncollected():
            for line in lines:
                end += len(line) + 1
                record = _parse(line, path, end)
                known = self._known.get(key := record.key)
                if known is None or RANK[record.status] > RANK[known.status]:
                    self._known[key] = record
        self._ends[path] = inode, end

    def _files(self) -> Iterable[Path]:
        for path in self.paths:
            if path.suffix != ".jsonl":
                yield from sorted(path.glob("*.jsonl"))
            elif path.exists():
                yield path
            elif path != self.own:
                raise InputError(f"no ledger at {path}", expected="a .jsonl file or a folder of them")

    def append(self, record: TrialRecord) -> None:
        """Write one record to the first file, durably.

        Raises:
            OSError: the disk is full or read-only; the file is as before.
            InputError: another process has held the file for half a minute.
        """
        append(self.own, record)

    def check_writable(self) -> None:
        """Raises InputError where the first file can't be written, before any trial starts."""
        try:
            self.own.parent.mkdir(parents=True, exist_ok=True)
            files.check_plain(self.own)
            with self.own.open("ab") as file:
                _lock(file, self.own)
        except OSError as error:
            raise InputError(f"the ledger {self.own} can't be written", got=error.strerror) from error


def append(path: Path, record: TrialRecord) -> None:
    """:meth:`Ledger.append` for a process that only knows the file."""
    line = record.line().encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
        _lock(file, path)
        length = runlog.end_of_last_line(file.fileno())
        file.truncate(length)
        write_line(file, line, length)


def write_line(file: io.FileIO, line: bytes, length: int) -> None:
    """Put ``line`` on disk behind ``length`` bytes of an unbuffered file, all of it or nothing.

    Raises:
        OSError: the disk is full.
    """
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    except OSError as error:
        error.filename = file.name
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            file.truncate(length)
        raise


def _lock(file: IO[bytes], path: Path) -> None:
    """Take the file's lock, waiting for other writers, who hold it for milliseconds."""
    refusal = InputError(f"the ledger {path} is locked by another process", fix="end that process")
    files.lock(file, refusal, LEDGER_PATIENCE_SECONDS)


def _grown(path: Path, inode: int, end: int) -> bool:
    """Whether a file is the one that was read, with no less in it."""
    found = path.stat()
    return found.st_ino == inode and found.st_size >= end


def _parse(line: bytes, path: Path, end: int) -> TrialRecord:
    """The record of a line that ends at byte ``end``."""
    try:
        return TrialRecord(**trial_lines.checked(json.loads(line)))
    except (ValueError, TypeError, RecursionError) as error:
        got = one_line(error.errors()) if isinstance(error, ValidationError) else repr(line[:60])
        number = path.read_bytes()[:end].count(b"\n")
        raise InputError(
            f"{path}, line {number}, is not a ledger's", got=got, expected=f"a record of {LEDGER_FORMAT}",
            fix="name another --ledger, or delete the line",
        ) from error  # fmt: skip
