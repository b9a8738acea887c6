"""``python -m twinrl.machine.aftermath SESSION RAYLET``: end what a session of Ray leaves behind, whatever ended its
starter.

Standard input is a pipe whose other end only the starter holds; however that one dies, the system closes it. Ray's
agents would look for their node and then report to the head: where both are gone, that takes them minutes.
"""

import os
import sys
import time
from contextlib import suppress

import psutil

NAME = "twinrl.machine.aftermath"
TITLED = "ray::"
"""How the titles of Ray's agents and workers begin."""
LAST_SECONDS, POLL_SECONDS = 10.0, 0.5


def end_all_of(session: str, raylet: int) -> int:
    """Kill the processes that a session has left; how many there were.

    Arguments:
        session: its folder, which the command lines of most of them name; of agents, whose titles are written over
            command line and environment, the open files lie in it.
        raylet: id of its node process, which the environment of workers names.
    """
    found = [process for process in psutil.process_iter(["cmdline", "environ"]) if _is_of(process, session, raylet)]
    for process in found:
        with suppress(psutil.Error):
            process.kill()
    return len(found)


def _is_of(process: psutil.Process, session: str, raylet: int) -> bool:
    words, variables = process.info["cmdline"] or (), process.info["environ"] or {}
    if process.pid == os.getpid() or any(NAME in word for word in words):
        return False
    if any(session in word for word in words) or variables.get("RAY_RAYLET_PID") == str(raylet):
        return True
    return any(word.startswith(TITLED) for word in words[:1]) and _has_open(process, session)


def _has_open(process: psutil.Process, folder: str) -> bool:
    """Whether a process has opened a file in a folder, by what its descriptors link to."""
    try:
        return any(file.path.startswith(folder) for file in process.open_files())
    except psutil.Error:  # it has ended, or is another user's
        return False


def main(session: str, raylet: int) -> None:
    """Wait for the starter's end, then until nothing of the session comes up any more."""
    while os.read(0, 1):
        pass
    deadline = time.monotonic() + LAST_SECONDS
    while end_all_of(session, raylet) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
