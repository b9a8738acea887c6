"""Torchrun on two "machines", of which one is lost and another one comes in its place: the run goes on."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.fake_source import SMALL
from tests.fsdp import torchrun
from twinrl import checkpoints
from twinrl.runs import RunDirectory
from twinrl.tracking import runlog

STEPS, PATIENCE = 60, 300
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
    pytest.mark.skipif("NODES" not in os.environ, reason="a minute or two to notice the loss and start again: NODES=1"),
]


def command(folder: Path) -> tuple[str, ...]:
    return (
        "train", "twinflow", *SMALL, f"run.dir={folder}", "machine.device=cpu", f"train.steps={STEPS}",
        "checkpoint.every=2", "evaluation.every=0", "stability.capsules.every=0",
    )  # fmt: skip


def lose(launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a launcher and its processes, as when its machine loses power."""
    own = list(torchrun.processes(launcher).values())
    for pid in [launcher.pid, *own]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()


def test_a_machine_that_replaces_a_lost_one_goes_on_as_rank_0(tmp_path: Path) -> None:
    """Its launcher has restarted nothing, and had no part in the run's beginning; the other one has both."""
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    port, arguments = torchrun.free_port(), command(tmp_path)
    stays = torchrun.start_node(arguments, first, 2, port, "127.0.0.3")
    lost = torchrun.start_node(arguments, second, 2, port, "127.0.0.2")
    launchers = [stays, lost]
    try:
        deadline = time.monotonic() + PATIENCE
        while not list(tmp_path.glob("twinflow-*/checkpoints/step-*")):
            assert time.monotonic() < deadline, first.read_text() + second.read_text()
            time.sleep(0.02)
        assert list(torchrun.processes(lost)) == [0]
        lose(lost)
        launchers.append(torchrun.start_node(arguments, second, 2, port, "127.0.0.1"))
        assert [one.wait(PATIENCE) for one in (stays, launchers[-1])] == [0, 0], first.read_text() + second.read_text()
    finally:
        for launcher in launchers:
            launcher.terminate()
    (folder,) = tmp_path.glob("twinflow-*")
    run = RunDirectory(folder)
    assert run.result is not None
    assert run.result["status"] == "finished"
    assert "resuming at step" in second.read_text()
    assert [row["step"] for row in runlog.read(run.log)] == list(range(1, STEPS + 1))
    assert checkpoints.load(run.newest_checkpoint()).state["step"] == STEPS
