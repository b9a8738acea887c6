"""Telling a launcher's own restart from a second start by hand.

When a process dies under ``torchrun --max-restarts``, the launcher ends the others and starts the *same* command again,
on which a run must go on; typed in again by a person, that command is refused, since a run exists. So a run directory
notes (in ``env.json``) which launch began it.
"""

import os
import socket
from pathlib import Path


def is_restart() -> bool:
    """Whether the launcher has started this process in the place of an earlier one."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch() -> str:
    """A name of this launch, the same after each of its restarts; "" without a launcher.

    It is torchrun's ``--rdzv-id`` where one was given (with ``--standalone`` torchrun makes one up), else host and
    process of the launcher.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return f"{socket.gethostname()}:{os.getppid()}:{_started(os.getppid())}" if name == "none" else name


def _started(process: int) -> str:
    """When a process was started, in the system's ticks; tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # a system without /proc
        return ""
