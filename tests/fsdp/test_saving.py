"""Checkpoints of several processes: written in the background, killed while being written, on a full disk."""

import os
import re
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests import forked
from tests.fsdp import torchrun
from tests.fsdp.torchrun import PATIENCE
from twinrl.run import checkpoints, layout

pytestmark = [pytest.mark.slow, pytest.mark.processes]
PRESET, WIDE = "flow_matching", "model.network={kind: mlp, width: 192, depth: 4, condition_width: 32}"


@pytest.mark.parametrize(
    ("asynchronous", "policy"),
    [
        (False, "stop"),
        (True, "continue"),
        pytest.param(False, "continue", marks=pytest.mark.campaign),
        pytest.param(True, "stop", marks=pytest.mark.campaign),
    ],
)
def test_a_full_disk_of_one_process_is_one_line(tmp_path: Path, asynchronous: bool, policy: str) -> None:
    """And under ``continue`` the run goes on, to fail only with its last state."""
    output = tmp_path / "output.txt"
    saving = f"checkpoint={{every: 2, asynchronous: {asynchronous}, on_error: {policy}}}"
    arguments = torchrun.command(tmp_path, WIDE, "train.steps=5", saving, preset=PRESET)
    launcher = torchrun.start(arguments, output, **{torchrun.FULL: "200000"})
    assert launcher.wait(PATIENCE) == 1
    text = output.read_text()
    lines = [line for line in text.splitlines() if line.startswith("twinrl: ")]
    assert len(lines) == 1
    assert "no checkpoint can be written" in lines[0]
    assert "on rank 1" in lines[0]
    assert "Error" not in re.split(r"(?m)^[WE]\d{4} |Sending process", text)[0]  # before torchrun's own report
    (run,) = tmp_path.glob("*-s0")
    assert list((run / "checkpoints").iterdir()) == []
    assert ("step      5 of 5" in text) == (policy == "continue")
    assert text.count("\nstep ") > 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_kill_while_saving_leaves_the_last_good_one(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    launcher = torchrun.start(torchrun.command(tmp_path, WIDE, "train.steps=400", preset=PRESET), output)
    seen: list[int] = []
    forked.wait_until(lambda: seen.extend(_saving(tmp_path)) or seen or launcher.poll() is not None, PATIENCE)
    for process in torchrun.processes(launcher).values():
        with suppress(ProcessLookupError):  # the launcher has ended it when it saw the other one's end
            os.kill(process, signal.SIGKILL)
    assert launcher.wait(PATIENCE) == 1
    (run,) = tmp_path.glob("*-s0")
    left = layout.available(run / "checkpoints")
    assert left
    for path in left:
        found = checkpoints.load(path)
        assert found.state["step"] == int(path.name.removeprefix("step-"))
    assert int(left[-1].name.removeprefix("step-")) <= seen[0]


def _saving(folder: Path) -> list[int]:
    """Steps after the first checkpoint's that are being written now."""
    found = [int(path.name[6:-4]) for path in folder.glob("*-s0/checkpoints/.step-*.new")]
    return [step for step in found if step > 2]
