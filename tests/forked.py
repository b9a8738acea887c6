"""Commands in processes of their own, without the seconds that imports take: forks of a server that has imported all.

A fork runs the same code as a process that was started anew, with its own signals, files, locks and exit code. The
server itself computes nothing and has no threads that a fork would miss. Campaigns start whole processes.
"""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from multiprocessing import forkserver, popen_fork
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, Protocol

REPOSITORY = Path(__file__).parents[1]
IMPORTED = (
    "pytest", "fsspec", "scipy.stats", "pandas", "pyarrow.parquet", "mlflow",
    "matplotlib.pyplot", "matplotlib.backends.backend_agg",
    "torch._dynamo", "torch.distributed.run", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "ablations.cli", "analysis.cli", "twinrl.cli", "twinrl.commands.train", "twinrl.commands.inspect",
    "twinrl.evaluation.figures", "twinrl.evaluation.grids", "twinrl.fsdp.sharded", "twinrl.fsdp.watchdog",
    "twinrl.fsdp.checkpoint", "tests.fsdp.cases", "tests.fsdp.launched", "tests.backends.families.made",
)  # fmt: skip
"""By the server. What is missing here is imported by the forks: right, but slow."""


class Process(Protocol):
    """What :class:`Forked` and ``subprocess.Popen`` share."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...
    def terminate(self) -> None: ...
    def send_signal(self, sig: int) -> None: ...


class Forked:
    """A forked process with the methods of ``subprocess.Popen``."""

    def __init__(self, process: ForkServerProcess):
        self.process = process

    @property
    def pid(self) -> int:
        """Its id."""
        assert self.process.pid is not None
        return self.process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode

    def send_signal(self, sig: int) -> None:
        """A signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()

    def terminate(self) -> None:
        """SIGTERM."""
        self.process.terminate()


@cache
def server() -> ForkServerContext:
    """Started on first use; it ends with this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


def start(
    function: Callable[..., object], *arguments: Any, output: Path, errors: Path | None = None, **variables: str
) -> Forked:
    """A process that calls a function of a module; its exit code is that of a program that does.

    Arguments:
        function, arguments: the call.
        output: file to which all that it prints is added. errors: another one for standard error.
        variables: of its environment, besides those of this process.
    """
    environment = dict(os.environ) | variables
    process = server().Process(target=_call, args=(function, arguments, output, errors or output, environment))
    process.start()
    return Forked(process)


def _call(
    function: Callable[..., object],
    arguments: tuple[Any, ...],
    output: Path,
    errors: Path,
    environment: Mapping[str, str],
) -> None:
    for number, path in ((1, output), (2, errors)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    _become(environment)
    function(*arguments)


def _become(environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(REPOSITORY)
    if "OMP_NUM_THREADS" in environment:  # which libraries read when they are loaded
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))


def command_line(*arguments: str) -> None:
    """``twinrl`` on the fake source; without figures, see there."""
    from tests.fsdp import launched  # noqa: F401
    from twinrl.cli import main

    sys.argv = ["twinrl", *arguments]
    main()


def torchrun(options: tuple[str, ...], rank: Callable[..., object], arguments: tuple[str, ...]) -> None:
    """torchrun's own launcher; its processes call ``rank(*arguments)``, forked from it rather than started anew."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    def forked(_: SubprocessHandler, words: tuple[str, ...], environment: dict[str, str]) -> popen_fork.Popen:
        process = multiprocessing.get_context("fork").Process(target=_rank, args=(rank, arguments, environment))
        process.start()
        return process._popen  # type: ignore[attr-defined]

    SubprocessHandler._popen = forked  # type: ignore[method-assign, assignment]
    run.main([*options, "--no-python", rank.__name__])


def _rank(rank: Callable[..., object], arguments: tuple[str, ...], environment: Mapping[str, str]) -> None:
    import signal

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):  # the launcher has set its own
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    _become(environment)
    name_process(f"rank-{environment['RANK']}")
    rank(*arguments)


def name_process(name: str) -> None:
    """As /proc shows it."""
    Path("/proc/self/comm").write_text(name)


def wait_until(condition: Callable[[], object], seconds: float, said: Callable[[], str] = str) -> None:
    """Return once the condition holds; AssertionError with what is said if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {said()}"
        time.sleep(0.01)
