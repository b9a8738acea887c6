"""The exact run log: one JSON line a row, append-only, the truth that every other view is built from.

A float is written with as many digits as it takes to read the same float back; non-finite values are the
strings ``"nan"``, ``"inf"`` and ``"-inf"``, so that each line is strict JSON. A checkpoint stores the byte
offset that :meth:`RunLog.sync` returned, and a resume cuts the log back to it, so a resumed log has neither
gap nor repeat. Only a line that ends in a newline is a row: what a killed process left half written never
counts. Imports neither torch nor pandas, so that analysis can use it anywhere.
"""

import json
import math
import numbers
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from twinrl.config.errors import InputError
from twinrl.machine import files

LogRow: TypeAlias = Mapping[str, Any]
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: object) -> object:
    """``value`` as strict JSON: non-finite floats become strings, numpy and torch scalars Python numbers.

    Raises:
        TypeError: neither a string, a bool, None, a number nor a scalar that ``float()`` takes.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    number = _to_float(value)
    if math.isfinite(number):
        return number
    return "nan" if math.isnan(number) else ("inf" if number > 0 else "-inf")


def _to_float(value: Any) -> float:
    """``float(value)``, with an error that names the type instead of the attempt."""
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"a log row takes scalars, got {type(value).__name__}: {value!r:.80}") from error


def decode(value: object) -> object:
    """The inverse of :func:`encode`."""
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


class RunLog:
    """Appends rows to ``path``; what :meth:`sync` has returned is on disk.

    Arguments:
        path: the file, usually ``<run>/log.jsonl``; its folder must exist. It is opened at the first use of the log,
            made if missing, and a torn last line is cut off then.

    Raises:
        InputError: at the first use: the file cannot be opened for writing, or is a link.

    *When to use*: by the one process that writes a run's rows (rank 0). Readers use :func:`read`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._opened: BinaryIO | None = None

    @property
    def _file(self) -> BinaryIO:
        if self._opened is None:
            if self.path.is_symlink():  # in a run of somebody else's it may lead to any file of this user's
                raise InputError(f"the run log {self.path} is a link", fix="put the file itself in its place")
            try:
                self._opened = open(self.path, "ab+")  # noqa: SIM115 (kept open for the whole run)
            except OSError as error:
                raise InputError(
                    f"cannot write the run log {self.path}", got=error.strerror, fix="check the folder's rights"
                ) from error
            self._cut(end_of_last_line(self._opened.fileno()))
        return self._opened

    def append(self, row: Mapping[str, object]) -> None:
        """Write one row, buffered. Strings that spell a non-finite number would read back as that number.

        Raises:
            TypeError: a value is not a scalar.
        """
        line = json.dumps({name: encode(value) for name, value in row.items()}, allow_nan=False)
        self._file.write(line.encode() + b"\n")

    def sync(self) -> int:
        """Put everything appended so far on disk; returns the log's length in bytes, for the checkpoint."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def check(self, offset: int) -> None:
        """Changes nothing.

        Raises:
            InputError: the log is shorter than ``offset``, or ``offset`` is not the end of a row.
        """
        if self._opened is not None:
            self._opened.flush()
        length, before = 0, b""
        if self.path.is_file():
            with self.path.open("rb") as file:
                length = os.fstat(file.fileno()).st_size
                before = os.pread(file.fileno(), 1, max(offset - 1, 0))
        if offset != 0 and not (0 < offset <= length and before == b"\n"):
            raise InputError(
                f"{self.path} does not belong to this checkpoint",
                got=f"{length} bytes, no row ending at byte {offset}",
                expected=f"a row that ends at byte {offset}",
                fix="restore the log that was written with the checkpoint",
            )

    def trim(self, offset: int) -> None:
        """Cut everything after byte ``offset``, which a checkpoint got from :meth:`sync`; errors as :meth:`check`."""
        self.check(offset)
        self._file.flush()
        self._cut(offset)

    def _cut(self, length: int) -> None:
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close; calling it twice is harmless."""
        if self._opened is not None and not self._opened.closed:
            self.sync()
            self._opened.close()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def end_of_last_line(descriptor: int, block: int = 1 << 16) -> int:
    """Byte offset just after the last newline of an open file; 0 if there is none."""
    end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def rows(path: str | os.PathLike[str], start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a log one by one, in order; a torn last line is left out.

    Arguments:
        path: a ``log.jsonl``.
        start: byte offset to begin at, the end of a row.
        stop: byte offset to end at; rows that end after it are left out. Default: the whole file.

    Raises:
        InputError: the file is missing, or a line is not a JSON object.
        OSError: it cannot be read.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # whoever opens a pipe would wait for ever
        raise InputError(f"the run log {path} is no file", fix="name a run directory that has one")
    try:
        with open(path, "rb") as file:
            end = file.seek(start)
            for line in file:
                end += len(line)
                if not line.endswith(b"\n") or (stop is not None and end > stop):
                    return
                yield _parse(line, Path(path), end)
    except files.GONE as error:
        raise InputError(
            f"cannot read the run log {path}", got=error.strerror, fix="name a run directory that has one"
        ) from error


def _parse(line: bytes, path: Path, end: int) -> dict[str, Any]:
    """The row that ``line``, which ends at byte ``end``, stands for."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError(
            f"{path}, line {path.read_bytes()[:end].count(10)}, is corrupted",
            got=repr(line[:60]),
            expected="one JSON object",
            fix="resume from a checkpoint before that line, or delete the line",
        )
    return {name: decode(value) for name, value in row.items()}


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All rows of a log; arguments and errors as for :func:`rows`."""
    return list(rows(path))


def surviving(entries: Iterable[dict[str, Any]], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ``entries`` of a run, its rows or its events, that no rollback has taken back.

    A rollback returns to the step of a checkpoint, while ``iteration`` never repeats: where the log goes back in
    steps, what it had from there on belongs to an attempt that was abandoned.

    Arguments:
        entries: rows, or lines of events.jsonl. rows: the whole log, in order.

    *When to use*: for every verdict on a run. What was lived through (time spent, spikes) is in all rows.
    """
    kept: list[Mapping[str, Any]] = []
    abandoned = set()
    for row in rows:
        while kept and kept[-1]["step"] >= row["step"]:
            abandoned.add(kept.pop()["iteration"])
        kept.append(row)
    return [entry for entry in entries if entry.get("iteration") not in abandoned]


def rollbacks(rows: Sequence[Mapping[str, Any]]) -> int:
    """How often a run returned to a checkpoint: the places where its log goes back in steps."""
    return sum(after["step"] <= before["step"] for before, after in pairwise(rows))
