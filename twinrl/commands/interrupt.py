"""Ctrl-C, SIGTERM and a closed terminal as a request: finish the step, write a checkpoint, end."""

import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def asking(stop: Callable[[], object]) -> Iterator[None]:
    """Inside, the first SIGINT, SIGTERM or SIGHUP calls ``stop``; a second SIGINT or SIGTERM ends the process at once.

    A SIGHUP that comes later changes nothing: shells and kernels send several. Under ``nohup`` it asks for nothing.
    Does nothing outside the main thread, which alone gets signals (workers of Ray have a stop file).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        if signum == signal.SIGHUP:
            leave_terminal()
        stop()  # and then the system's own handlers, which a background job may have had switched off:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.SIGHUP in before:
            signal.signal(signal.SIGHUP, lambda *_: leave_terminal())

    asked = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        asked.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in asked}
    for number in asked:
        signal.signal(number, ask)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, which has to be short, SIGINT and SIGTERM are passed over: what was begun is tidied up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_terminal() -> None:
    """What is printed from now on goes nowhere if it went to a terminal: a closed one answers with errors."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        try:
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nowhere, stream)
        except OSError:  # closed before
            continue
    os.close(nowhere)
