"""Programs that begin with their imports done: forks of a process that has imported, one after the other.

``python -m twinrl.machine.forks NAME…`` imports the modules, then reads lines of JSON from standard input, such as
``{"words": [MODULE, ARGUMENT…], "output": PATH}``. For each it forks. The fork runs the module as ``python -m`` does,
prints into the file, and ends when the process that asked for it ends (``lifeline.py``). Answers are two lines: the
fork's id, then its exit code. Nothing is computed before a fork, so there is no thread and no device for it to miss.
"""

import gc
import importlib
import json
import os
import runpy
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from twinrl.machine import lifeline

SIGKILLED = -9


class Fork:
    """A program that a :class:`Server` has started; what is used of ``subprocess.Popen``.

    Attributes:
        pid: leader of a session of its own.
        stdin: none of its own.
        returncode: None while it runs; minus the signal that ended it.
    """

    stdin = None

    def __init__(self, pid: int, answers: BinaryIO):
        self.pid, self.returncode = pid, None
        self._answers = answers

    returncode: int | None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.returncode is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """The exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = int(self._answers.readline() or SIGKILLED)  # nothing: the server itself was killed
        return self.returncode

    def send_signal(self, signal: int) -> None:
        """A signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, signal)


class Server:
    """Starts one program after the other, each with the modules imported. It ends with this process.

    Arguments:
        modules: to import beforehand.
        cwd: working directory of all programs.
        environment: theirs.
        output: takes what the imports print.
    """

    def __init__(self, modules: Sequence[str], cwd: str, environment: Mapping[str, str], output: BinaryIO):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twinrl.machine.forks", *modules], cwd=cwd, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, bufsize=0, start_new_session=True,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it can start a program."""
        return self.process.poll() is None

    def start(self, words: Sequence[str], output: Path) -> Fork:
        """``python -m MODULE ARGUMENT…``, once the one before has ended.

        Raises:
            ChildProcessError: the server has died; why is in its output.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"words": words, "output": str(output)}).encode() + b"\n")
        except BrokenPipeError:
            raise ChildProcessError(f"no process for {words[0]}: its imports failed") from None
        pid = self.process.stdout.readline()
        if not pid:
            raise ChildProcessError(f"no process for {words[0]}: its imports failed")
        return Fork(int(pid), self.process.stdout)  # type: ignore[arg-type]


def _serve(answers: int) -> list[str] | None:
    """Fork for every line; in a fork its words, in the server None when nobody asks any more."""
    while line := sys.stdin.buffer.readline():
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _become(asked["output"], answers)
            return list(asked["words"])
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(BrokenPipeError):  # who asked has ended, and with them the fork
            os.write(answers, f"{code}\n".encode())
    return None


def _become(output: str, answers: int) -> None:
    """A session of its own, said to whoever asked; then a life as long as theirs, and output to the file."""
    os.setsid()
    os.write(answers, f"{os.getpid()}\n".encode())
    os.close(answers)
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    lifeline.hold()


if __name__ == "__main__":
    answers = os.dup(1)
    os.dup2(2, 1)  # what the imports print is no answer
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # so that collections do not copy what forks share
    if words := _serve(answers):
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
