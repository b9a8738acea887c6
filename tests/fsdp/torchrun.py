"""``torchrun -m twinrl`` with the fake source: ``python -m tests.fsdp.torchrun train …`` is one of its processes.

:func:`start` forks them, with torchrun's own launcher; :func:`start_anew` starts all as a user does.
"""

import os
import resource
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from tests import forked
from tests.fake_source import SMALL, Planted
from twinrl.flow.branches import Rows
from twinrl.terms import TERMS
from twinrl.terms.term import Context, Query, Target

REPOSITORY = Path(__file__).parents[2]
TWO = ("--nproc-per-node", "2", "--standalone")
FULL = "BYTES_OF_RANK_1"
"""Environment variable: rank 1 can write no larger file, as on a full disk of its machine."""
PATIENCE = 600
STEPS = 12
NETWORK = "{kind: tests.fsdp.launched.Net, width: 16, depth: 1, condition_width: 16}"
SETTINGS = (
    *SMALL, "machine={device: cpu, threads: 1}", f"model.network={NETWORK}", "evaluation.every=0",
    "checkpoint={every: 2, asynchronous: true}", "stability.capsules.every=0", "fsdp.watchdog=60",
)  # fmt: skip
"""A run of 12 steps."""


def command(folder: Path, *overrides: str, preset: str = "twinflow") -> tuple[str, ...]:
    """The command line of such a run under a folder."""
    return "train", preset, *SETTINGS, f"run.dir={folder}", *overrides


@dataclass(frozen=True)
class Ended:
    """How a process has ended."""

    code: int
    output: str
    errors: str


def together(world: int, folder: Path, *arguments: str) -> list[Ended]:
    """The command line in ``world`` processes, started as torchrun would, without a launcher to end them.

    Arguments:
        world: processes.
        folder: new; for what they print.
        arguments: of the command line.
    """
    folder.mkdir()
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    files = [(folder / f"output-{rank}.txt", folder / f"errors-{rank}.txt") for rank in range(world)]
    started = [
        forked.start(
            command_line, *arguments, output=output, errors=errors, OMP_NUM_THREADS="1", RANK=str(rank),
            LOCAL_RANK=str(rank), **shared,
        )
        for rank, (output, errors) in enumerate(files)
    ]  # fmt: skip
    codes = [process.wait(PATIENCE) for process in started]
    return [Ended(code, *(file.read_text() for file in own)) for code, own in zip(codes, files, strict=True)]


def start(arguments: tuple[str, ...], output: Path, restarts: int = 0, **more: str) -> forked.Process:
    """A launcher of two processes; all that they print is added to the file ``output``.

    Arguments:
        arguments: of the command line.
        output: standard output and error.
        restarts: that the launcher may make.
        more: environment variables.
    """
    options = (*TWO, *_restarting(restarts))
    return forked.start(forked.torchrun, options, command_line, arguments, output=output, OMP_NUM_THREADS="1", **more)


def start_anew(arguments: tuple[str, ...], output: Path, restarts: int = 0) -> forked.Process:
    """As :func:`start`, with processes that import everything themselves."""
    return _launch(list(TWO), arguments, output, restarts, {})


def start_node(
    arguments: tuple[str, ...], output: Path, restarts: int, port: int, address: str
) -> subprocess.Popen[bytes]:
    """A launcher of one process, as on one of two machines.

    Arguments:
        arguments, output, restarts: as for :func:`start`.
        port: of this machine, where the launchers meet; the first one to come listens there.
        address: of the launcher's machine, such as 127.0.0.2; ranks are given in the order of addresses.

    The variable lets processes meet anew after each restart; by itself torch 2.13 sends them to the first rank 0's
    machine for ever.
    """
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
    patience = ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=5"]
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", address, *meeting, *patience]
    return _launch(options, arguments, output, restarts, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def _launch(
    options: list[str], arguments: tuple[str, ...], output: Path, restarts: int, more: dict[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, *_restarting(restarts)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | more
    with output.open("ab") as file:
        return subprocess.Popen(
            [*command, "-m", "tests.fsdp.torchrun", *arguments],
            cwd=REPOSITORY, env=environment, stdout=file, stderr=file,
        )  # fmt: skip


def _restarting(restarts: int) -> tuple[str, ...]:
    return "--max-restarts", str(restarts), "--monitor-interval", "0.1"


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def processes(launcher: forked.Process) -> dict[int, int]:
    """Rank → id of the launcher's processes that run now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, environment = (folder / "stat").read_text(), (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # it has just ended, or is another user's
            continue
        name, _, rest = stat.partition("(")[2].rpartition(")")
        if int(rest.split()[1]) == launcher.pid:
            anew = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
            ranks = [int(name[5:])] if name.startswith("rank-") else anew
            found |= {rank: int(folder.name) for rank in ranks}
    return found


class Sleeping(Planted):
    """Keeps rank 1 asleep at one step; its target is that of a plain regression."""

    class Config(Planted.Config):
        kind: Literal["sleeping"] = "sleeping"  # type: ignore[assignment]

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        if rows.draws.step == self.config.at and os.environ["RANK"] == "1":
            time.sleep(600)
        return Target(rows.v)


def command_line(*arguments: str) -> None:
    """One process."""
    if FULL in os.environ and os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ[FULL]),) * 2)
    TERMS["sleeping"] = Sleeping
    forked.command_line(*arguments)


if __name__ == "__main__":
    command_line(*sys.argv[1:])
