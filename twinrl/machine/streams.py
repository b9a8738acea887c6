"""The standard streams as a command finds them: closed, full, or of an encoding that lacks letters."""

import errno
import io
import os
import sys
import threading
import traceback
from typing import TextIO

from twinrl.config.errors import InputError
from twinrl.config.secrets import shown
from twinrl.machine.text import printable

STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}


class Output(io.TextIOWrapper):
    """Standard output whose failure is one line and the last: what comes after it goes nowhere.

    A reader that has gone (``| head``) is no failure. What the encoding lacks is escaped.
    """

    def write(self, text: str) -> int:
        """Write and flush. Raises InputError where that cannot be."""
        if text == "":  # as libraries try a stream: it says nothing of the disk
            return 0
        try:
            super().write(text)
            super().flush()
        except OSError as error:
            _give_up(self)
            if error.errno != errno.EPIPE:
                raise InputError("standard output cannot be written", got=error.strerror, fix="make room") from error
        return len(text)


def prepare() -> None:
    """Closed streams lead nowhere, so that no file of a run takes their numbers; output becomes :class:`Output`.

    What ends the process or a thread of it is told by :func:`show_traceback`.
    """
    sys.excepthook = lambda kind, error, trace: show_traceback(error)
    threading.excepthook = _of_thread
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < len(STREAMS):
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, (name, mode) in enumerate(STREAMS.items()):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  for good
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = Output(sys.stdout.buffer, sys.stdout.encoding, "backslashreplace")


def _of_thread(told: threading.ExceptHookArgs) -> None:
    if told.exc_type is not SystemExit and told.exc_value is not None:
        show_traceback(told.exc_value)


def say(line: str) -> None:
    """One line for people on standard error, where it can be written; what would steer their terminal is escaped."""
    try:
        print(f"twinrl: {printable(' '.join(line.split()))}", file=sys.stderr, flush=True)
    except OSError:
        _give_up(sys.stderr)


def show_traceback(error: BaseException | None) -> None:
    """On standard error, without the passwords of addresses that are in it."""
    print(shown("".join(traceback.format_exception(error))), end="", file=sys.stderr)


def _give_up(stream: TextIO) -> None:
    """Let what is left of a stream go nowhere; the interpreter would fail on it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
