"""One command on one damaged folder: a fork of this process with limits, what it said, and what is wrong with that."""

import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

CPU_SECONDS, WALL_SECONDS = 20, 150
"""What a command may compute, and how long it may take on a busy machine."""
LIMITS = {resource.RLIMIT_CPU: CPU_SECONDS, resource.RLIMIT_AS: 16 << 30, resource.RLIMIT_FSIZE: 1 << 30}
END_WITH_PARENT = 1
"""Linux's number of what ``prctl`` is asked for."""
LINES, CHARACTERS = 3, 1500
"""Of a refusal: a warning or two may stand before its line."""


@dataclass(frozen=True)
class Done:
    """How a command ended; ``rc`` None: it did not."""

    rc: int | None
    out: str
    err: str
    seconds: float


def run(
    words: Sequence[str],
    where: Path,
    streams: Path,
    prepare: Callable[[], object],
    limits: Mapping[int, int] = LIMITS,
    seconds: float = WALL_SECONDS,
) -> Done:
    """``twinrl`` with these words in the folder ``where``, in a fork that has all imports already.

    Arguments:
        streams: a folder for what it prints. prepare: called first, in the fork.
        limits: of resources. seconds: it may take.
    """
    streams.mkdir(parents=True, exist_ok=True)
    out, err = streams / "out", streams / "err"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os._exit(_command(words, where, out, err, prepare, limits))
    code = _wait(child, began + seconds)
    text = (file.read_text(errors="replace") for file in (out, err))
    return Done(code, *text, seconds=time.monotonic() - began)


def _command(
    words: Sequence[str], where: Path, out: Path, err: Path, prepare: Callable[[], object], limits: Mapping[int, int]
) -> int:
    os.setsid()
    ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
    for number, path in ((0, Path(os.devnull)), (1, out), (2, err)):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    for limit, most in limits.items():
        resource.setrlimit(limit, (most, most + 5))  # the soft one first: SIGXCPU says which
    code: object = 0
    try:
        os.chdir(where)
        sys.argv = ["twinrl", *words]
        prepare()
        from twinrl.cli import main

        main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001  what Python itself would do
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code if isinstance(code, int) else 1


def _wait(child: int, deadline: float) -> int | None:
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def photograph(folder: Path) -> dict[str, tuple[int, ...]]:
    """Path → mode, size and time of the last change of everything in a folder; equal if nothing was written."""
    found = {}
    for at, folders, names in os.walk(folder):
        for name in (*folders, *names):
            state = os.lstat(os.path.join(at, name))
            found[os.path.relpath(os.path.join(at, name), folder)] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


def wrong(done: Done, changed: Sequence[str], different: Mapping[str, object], may_end_badly: bool) -> str:
    """What is wrong with how a command ended; "" if nothing is.

    Arguments:
        changed: paths that are not as before. different: facts that are not those of the undamaged folder.
        may_end_badly: whether a run may diverge, or stop, with exit code 1.
    """
    last = ([line for line in done.err.splitlines() if line.strip()] or [""])[-1]
    if done.rc is None:
        return f"no end within {CPU_SECONDS} s of computing or {WALL_SECONDS} s; {last[:120]}"
    if "Traceback (most recent call last)" in done.out + done.err:
        return f"traceback: {last[:200]}"
    if done.rc == 0:
        return f"other numbers without a word: {', '.join(different)[:200]}" if different else ""
    if done.rc == 1 and may_end_badly:
        return ""
    if done.rc != 2:
        return f"exit code {done.rc}: {last[:200]}"
    return _of_a_refusal(done.err, last, changed)


def _of_a_refusal(err: str, last: str, changed: Sequence[str]) -> str:
    if not last.startswith("twinrl: "):
        return f"no line of twinrl's: {last[:200]}"
    if len([line for line in err.splitlines() if line.strip()]) > LINES or len(err) > CHARACTERS:
        return f"{len(err.splitlines())} lines, {len(err)} characters: {last[:200]}"
    if changed:
        return f"refused, but changed {', '.join(changed)[:160]}: {last[:160]}"
    return ""
