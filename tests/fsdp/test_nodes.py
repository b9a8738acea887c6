"""Torchrun on two "machines", of which one is lost and another one comes in its place: the run goes on."""

import os
import signal
from pathlib import Path

import pytest

from tests import forked
from tests.fsdp import torchrun
from tests.fsdp.torchrun import PATIENCE
from tests.logs import the_run
from twinrl.run import checkpoints, runlog

STEPS = 60
pytestmark = [
    pytest.mark.campaign,  # a minute or two to notice the loss and start again
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]


def lose(launcher: forked.Process) -> None:
    """SIGKILL to a launcher and its processes, as when its machine loses power."""
    own = list(torchrun.processes(launcher).values())
    for pid in [launcher.pid, *own]:
        os.kill(pid, signal.SIGKILL)
    launcher.wait()


def test_a_machine_that_replaces_a_lost_one_goes_on_as_rank_0(tmp_path: Path) -> None:
    """Its launcher has restarted nothing, and had no part in the run's beginning; the other one has both."""
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    port, arguments = torchrun.free_port(), torchrun.command(tmp_path, f"train.steps={STEPS}")
    stays = torchrun.start_node(arguments, first, 2, port, "127.0.0.3")
    lost = torchrun.start_node(arguments, second, 2, port, "127.0.0.2")
    launchers: list[forked.Process] = [stays, lost]
    try:
        begun = "twinflow-*/checkpoints/step-*"
        forked.wait_until(lambda: list(tmp_path.glob(begun)), PATIENCE, lambda: first.read_text() + second.read_text())
        assert list(torchrun.processes(lost)) == [0]
        lose(lost)
        launchers.append(torchrun.start_node(arguments, second, 2, port, "127.0.0.1"))
        assert [one.wait(PATIENCE) for one in (stays, launchers[-1])] == [0, 0], first.read_text() + second.read_text()
    finally:
        for launcher in launchers:
            launcher.terminate()
    run = the_run(tmp_path)
    assert run is not None
    assert run.result is not None
    assert run.result["status"] == "finished"
    assert "resuming at step" in second.read_text()
    assert [row["step"] for row in runlog.read(run.log)] == list(range(1, STEPS + 1))
    assert checkpoints.load(run.newest_checkpoint()).state["step"] == STEPS
