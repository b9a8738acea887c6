"""Files and folders that are whole or not there, and locks that die with their process."""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from twinrl.config.errors import InputError

POLL_SECONDS = 0.05


def check_writable(folder: Path, what: str, fix: str) -> None:
    """Before time is spent: raises InputError where no file can be made in a folder, which need not exist yet.

    Arguments:
        folder: where a nameless file is made, or in the nearest folder above it that there is.
        what: is said not to be writable.
        fix: likely remedy.
    """
    there = folder
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise InputError(f"{what} cannot be written", got=error.strerror, fix=fix) from error


def unfinished(path: Path) -> Path:
    """Where ``path`` is written before it takes its name."""
    return path.with_name(f".{path.name}.new")


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A free path to write a file or folder to; where the block ends well, it is on disk and takes its name at once.

    What was there before is replaced, or stays if the block fails. What a killed process left half written goes away.
    """
    new, old = unfinished(path), path.with_name(f".{path.name}.old")
    remove(new)
    try:
        yield new
        _sync(new)
        if path.is_dir():  # a full folder cannot be replaced in one move
            path.rename(old)
        new.replace(path)
        _sync_one(path.parent)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    finally:
        remove(new)
        remove(old)


def write_text(path: Path, text: str) -> None:
    """Replace a small file, all or nothing."""
    with publishing(path) as new:
        new.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Put a file, or a folder and all that is in it, on disk."""
    for inside in path.iterdir() if path.is_dir() else ():
        _sync(inside)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    """Put a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(file: IO[Any], refusal: Exception, patience: float = 0.0) -> None:
    """Take the lock of an open file; closing it, or the end of the process however it comes, lets it go.

    Arguments:
        file: that all who want the lock open.
        refusal: raised where another process has held it for ``patience`` seconds.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= deadline:
                raise refusal from error
            time.sleep(POLL_SECONDS)
