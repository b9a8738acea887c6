"""Ctrl-C and SIGTERM as a request: finish the step, write a checkpoint, end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def asking(stop: Callable[[], object]) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM calls ``stop``; a second one ends the process at once.

    Does nothing outside the main thread, which alone gets signals (workers of Ray have a stop file).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(signum: int, frame: Any) -> None:
        stop()  # and then the system's own handlers, which a background job may have had switched off:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
