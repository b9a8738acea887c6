"""``python -m twinrl.machine.lifeline MODULE ARGUMENTS…``: run a module that ends when the process that started it
ends.

Standard input is a pipe whose other end only the starter holds. However that one dies, the system closes the pipe,
and this process and all that it started are killed. So no trial outlives its study, on any system, and its run
directory is free for the next one. Imports nothing but the standard library before the module.
"""

import os
import runpy
import signal
import sys
import threading


def hold() -> None:
    """Kill this process group once standard input ends."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    hold()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
