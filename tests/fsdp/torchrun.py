"""``torchrun -m twinrl`` with the fake source: ``python -m tests.fsdp.torchrun train …`` is one of its processes."""

import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from torch import Tensor

from tests.fake_source import Planted
from twinrl.branches import Rows
from twinrl.terms.term import Context, Query, Target

REPOSITORY = Path(__file__).parents[2]


FULL = "BYTES_OF_RANK_1"
"""Environment variable: rank 1 can write no larger file, as on a full disk of its machine."""


def start(
    arguments: tuple[str, ...], output: Path, restarts: int = 0, world: int = 2, **more: str
) -> subprocess.Popen[bytes]:
    """A launcher of ``world`` processes; all that they print is added to the file ``output``.

    Arguments:
        arguments: of the command line.
        output: standard output and error.
        restarts: that the launcher may make.
        world: processes.
        more: environment variables.
    """
    return _launch(["--nproc-per-node", str(world), "--standalone"], arguments, output, restarts, more)


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
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    restarting = ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"} | more
    with output.open("ab") as file:
        return subprocess.Popen(
            [*command, *restarting, "-m", "tests.fsdp.torchrun", *arguments],
            cwd=REPOSITORY, env=environment, stdout=file, stderr=file,
        )  # fmt: skip


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def processes(launcher: subprocess.Popen[bytes]) -> dict[int, int]:
    """Rank → id of the launcher's processes that run now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0") if parent == launcher.pid else []
        except (OSError, ValueError):  # it has just ended
            continue
        ranks = [int(entry[5:]) for entry in environment if entry.startswith(b"RANK=")]
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


if __name__ == "__main__":
    from tests.fsdp.cases import register
    from twinrl.cli import main
    from twinrl.terms import TERMS

    if FULL in os.environ and os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ[FULL]),) * 2)
    register()
    TERMS["sleeping"] = Sleeping
    sys.argv[0] = "twinrl"
    main()
