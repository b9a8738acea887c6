"""Telling a launcher's own restart from a second start by hand.

When a process dies under ``torchrun --max-restarts``, the launcher ends the others and starts the *same* command again,
on which a run must go on; typed in again by a person, that command is refused, since a run exists. So a run directory
notes (in ``env.json``) which launchers began it: one on each machine. Those live on over restarts, all but the ones
whose machines were lost; so a run goes on where any of its launchers has a part in the present start. Torchrun's own
words do not tell: its count of restarts is each machine's own and leaves out those that a machine's coming or going
has caused, rank 0 may be on another machine than before, and a job's name (``--rdzv-id``) may be used again.
"""

import os
import socket
from pathlib import Path

LAUNCH = "TWINRL_LAUNCH"
"""Environment variable that names the launcher to a worker of Ray: the folder of what only this launch needs."""
BEGUN = "begun"
"""File in it that says that this is not the first attempt."""


def launch() -> str:
    """A name of this process's launcher on this machine, the same after each of its restarts; "" without one.

    It is the launcher's host, process and time of start; workers of Ray are told theirs.
    """
    if LAUNCH in os.environ:
        return os.environ[LAUNCH]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    return f"{socket.gethostname()}:{parent}:{_started(parent)}"


def patience() -> float:
    """Seconds to wait for a lost attempt's processes to die; to be asked once an attempt, by its first process.

    None for the first attempt, nor under torchrun, which waits by itself; Ray may still be ending them.
    """
    if LAUNCH not in os.environ:
        return 0.0
    begun = Path(os.environ[LAUNCH]) / BEGUN
    first = not begun.exists()
    begun.touch()
    return 0.0 if first else 60.0


def _started(process: int) -> str:
    """When a process was started, in the system's ticks; tells it from a later one of the same number."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:  # a system without /proc
        return ""
