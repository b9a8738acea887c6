"""Checkpoints of several processes: written in the background, killed while being written, on a full disk."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from tests.fake_source import SMALL
from tests.fsdp import torchrun
from twinrl import checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PATIENCE = 600
WIDE = "model.network={kind: mlp, width: 192, depth: 4, condition_width: 32}"


def command(folder: Path, *overrides: str) -> tuple[str, ...]:
    return (
        "train", "twinflow", *SMALL, f"run.dir={folder}", "machine.device=cpu", "train.steps=8", "checkpoint.every=2",
        "evaluation.every=8", "stability.capsules.every=0", WIDE, *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_of_one_process_is_one_line(tmp_path: Path, asynchronous: bool, policy: str) -> None:
    """And under ``continue`` the run goes on, to fail only with its last state."""
    output = tmp_path / "output.txt"
    arguments = command(tmp_path, f"checkpoint={{asynchronous: {asynchronous}, on_error: {policy}}}")
    launcher = torchrun.start(arguments, output, **{torchrun.FULL: "200000"})
    assert launcher.wait(PATIENCE) == 1
    text = output.read_text()
    lines = [line for line in text.splitlines() if line.startswith("twinrl: ")]
    assert len(lines) == 1
    assert "no checkpoint can be written" in lines[0]
    assert "on rank 1" in lines[0]
    assert "Error" not in re.split(r"(?m)^[WE]\d{4} |Sending process", text)[0]  # before torchrun's own report
    (run,) = tmp_path.glob("twinflow-*")
    assert list((run / "checkpoints").iterdir()) == []
    assert ("step      8 of 8" in text) == (policy == "continue")
    assert text.count("\nstep ") > 0


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
def test_a_kill_while_saving_leaves_the_last_good_one(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    launcher = torchrun.start(command(tmp_path, "checkpoint.asynchronous=true", "train.steps=400"), output)
    seen = _wait_for_a_save(tmp_path)
    for process in torchrun.processes(launcher).values():
        os.kill(process, signal.SIGKILL)
    assert launcher.wait(PATIENCE) == 1
    (run,) = tmp_path.glob("twinflow-*")
    left = checkpoints.available(run / "checkpoints")
    assert left
    for path in left:
        found = checkpoints.load(path)
        assert found.state["step"] == int(path.name.removeprefix("step-"))
    assert int(left[-1].name.removeprefix("step-")) <= seen


def _wait_for_a_save(folder: Path) -> int:
    """Return while a checkpoint after the first is being written; its step."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for path in folder.glob("twinflow-*/checkpoints/.step-*.new"):
            if (step := int(path.name[6:-4])) > 2:
                return step
    raise AssertionError("no checkpoint was ever being written")
