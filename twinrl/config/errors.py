"""Errors whose message is the whole story: what, got, expected, likely fix."""

import errno
import os

from twinrl.config.secrets import shown

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE}
"""What a disk, and no input, is to blame for."""
REMEDIES = {
    errno.ENOSPC: "make room on its disk", errno.EDQUOT: "make room on its disk",
    errno.EROFS: "write elsewhere, or mount its disk for writing",
    errno.EACCES: "mend its rights, or be its owner", errno.EPERM: "mend its rights, or be its owner",
    errno.EMFILE: "raise the limit of open files (`ulimit -n`)", errno.ENAMETOOLONG: "shorten the name",
}  # fmt: skip


LONGEST = 1000
"""Characters of what was found."""
NO_THREAD = "can't start new thread"
"""What Python says, as a RuntimeError, where the system lets it start no more threads."""
NO_MORE = "no more threads or processes can be started"
RAISE = "raise the limit of processes (`ulimit -u`, or the container's), or end others"


def of_threads(error: RuntimeError) -> str | None:
    """In one line, that no thread can be started; None where the error is another."""
    return f"{NO_MORE}; fix: {RAISE}" if NO_THREAD in str(error) else None


def of_system(error: OSError) -> str:
    """In one line, what the system says of a file, or of a process that it does not start, and the likely fix."""
    path = error.filename2 or error.filename
    if path is None and error.errno == errno.EAGAIN:
        return f"{NO_MORE}; got {error.strerror}; fix: {RAISE}"
    what = "a file" if path is None else os.fsdecode(path) if isinstance(path, bytes) else path
    remedy = REMEDIES.get(error.errno or 0)
    line = f"{what} cannot be used; got {error.strerror or error}" + (f"; fix: {remedy}" if remedy else "")
    return " ".join(line.split())


class InputError(Exception):
    """The user's input was wrong; the command line prints the message on one line and exits with 2. No address in it
    keeps a password.

    Arguments:
        what: what is wrong, e.g. ``"unknown key optim.lrr"``.
        got: what was found, if that helps.
        expected: what would have been right.
        fix: the likely remedy.

    *When to use*: for everything a user can mend by changing a file, a flag or a path. Bugs and failures of
    the run itself keep their own exception types (exit code 1).
    """

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str | None = None):
        parts = [what]
        if got is not None:
            parts.append(f"got {_brief(str(got))}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if fix is not None:
            parts.append(f"fix: {fix}")
        super().__init__(shown(" ".join("; ".join(parts).split())))


def _brief(text: str) -> str:
    """A text that a terminal can show; what other libraries print may repeat a whole file."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… (of {len(text)} characters)"
