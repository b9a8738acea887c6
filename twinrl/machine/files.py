"""Files and folders that are whole or not there, and locks that die with their process."""

import errno
import fcntl
import logging
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
GONE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What an error says of a file that is not there as it was written; others are about rights, disks and machines."""
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
MASK = os.umask(0o077)
"""The rights that files of this process do not have."""
os.umask(MASK)


def cache_dir() -> Path:
    """Where built artefacts live: ``$TWINRL_CACHE``, else ``$XDG_CACHE_HOME/twinrl``, else ``~/.cache/twinrl``."""
    if explicit := os.environ.get("TWINRL_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "twinrl"


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


def check_plain(path: Path) -> None:
    """Raises IsADirectoryError where something else than a file is: whoever opens a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise IsADirectoryError(errno.EISDIR, "Is no file", str(path))


def unfinished(path: Path) -> Path:
    """Where ``path`` is written before it takes its name; hidden, with its suffix, by which writers know the format."""
    return path.with_name(f".{path.stem}.new{path.suffix}")


@contextmanager
def publishing(path: Path) -> Iterator[Path]:
    """A free path to write a file or folder to; where the block ends well, it is on disk and takes its name at once.

    What was there before is replaced, or stays if the block fails. What a killed process left half written goes away.
    Files have the rights that the umask gives, also where a library has made them private.
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
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a full disk
            error.filename = str(path)
        raise
    finally:
        remove(new)
        remove(old)


def write_text(path: Path, text: str) -> None:
    """Replace a small file, all or nothing."""
    with publishing(path) as new:
        new.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Put a file, or a folder and all that is in it, on disk, with the rights of the umask."""
    for inside in path.iterdir() if path.is_dir() else ():
        _sync(inside)
    open_up(path)
    _sync_one(path)


def open_up(path: Path) -> None:
    """Give a file the rights that the umask gives: safetensors makes it readable by its owner alone."""
    mode = path.stat().st_mode
    if path.is_file() and (wanted := mode | 0o666 & ~MASK) != mode:
        path.chmod(wanted)


def _sync_one(path: Path) -> None:
    """Put a file's content, or a folder's list of names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, refusal: Exception, patience: float = 0.0) -> Iterator[None]:
    """Inside, this process alone holds the lock file at ``path``, made if need be; arguments as for :func:`lock`.

    Who holds it may delete it, and its folder: who has waited for it then takes the one that has its name now.
    It is opened for writing, without which NFS gives no lock.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_plain(path)
        with path.open("a") as file:
            lock(file, refusal, patience)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return


@contextmanager
def alone(path: Path, refusal: Exception, patience: float = 0.0) -> Iterator[None]:
    """As :func:`locked`, for what takes a short while: no lock file is left."""
    with locked(path, refusal, patience):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def lock(file: IO[Any], refusal: Exception, patience: float = 0.0) -> None:
    """Take the lock of an open file; closing it, or the end of the process however it comes, lets it go.

    It holds between machines where the file system hands it on. One that has no locks costs a warning.

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
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logging.getLogger(__name__).warning(
                "%s cannot be locked (%s): see to it that no other process writes there", file.name, error.strerror
            )
            return None
