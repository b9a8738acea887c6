"""A run under torchrun whose processes are killed at random moments ends with the numbers of an undisturbed one.

``KILLS=20`` in the environment makes it twenty moments instead of a few.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.fake_source import SMALL
from tests.fsdp import torchrun
from twinrl import checkpoints
from twinrl.runs import RunDirectory

KILLS = int(os.environ.get("KILLS", "2"))
STEPS, PATIENCE = 20 + 4 * KILLS, 600
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900 if KILLS <= 2 else 400 * KILLS),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]


def command(folder: Path) -> tuple[str, ...]:
    return (
        "train", "twinflow", *SMALL, f"run.dir={folder}", "machine.device=cpu", f"train.steps={STEPS}",
        "checkpoint={every: 2, asynchronous: true}", "evaluation.every=20", "fsdp.watchdog=60",
    )  # fmt: skip


def the_run(folder: Path) -> RunDirectory | None:
    found = list(folder.glob("twinflow-*-s0"))
    return RunDirectory(found[0]) if found else None


def saved(folder: Path) -> int:
    """Steps in the newest checkpoint."""
    run = the_run(folder)
    newest = checkpoints.newest(run.checkpoints) if run is not None else None
    return int(newest.name.removeprefix("step-")) if newest else 0


def kill_one(launcher: subprocess.Popen[bytes], folder: Path, moments: random.Random, known: set[int]) -> None:
    """Kill a rank: at any moment of its start, or, mostly, some time after it has gone on."""
    before, deadline = saved(folder), time.monotonic() + PATIENCE
    early = moments.random() < 0.2
    while time.monotonic() < deadline and launcher.poll() is None:
        found = torchrun.processes(launcher)
        if len(found) == 2 and known.isdisjoint(found.values()) and (early or saved(folder) > before):
            break
        time.sleep(0.02)
    time.sleep(moments.uniform(0, 5 if early else 1))
    found = torchrun.processes(launcher)
    known |= set(found.values())
    os.kill(found[moments.randrange(2)], signal.SIGKILL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDirectory, RunDirectory]:
    """The undisturbed run, and the disturbed one."""
    folder = tmp_path_factory.mktemp("kills")
    quiet, disturbed, output = folder / "quiet", folder / "disturbed", folder / "output.txt"
    assert torchrun.start(command(quiet), output).wait(PATIENCE) == 0, output.read_text()
    launcher = torchrun.start(command(disturbed), output, restarts=KILLS)
    moments, known = random.Random(11), set[int]()
    try:
        for _ in range(KILLS):
            kill_one(launcher, disturbed, moments, known)
        assert launcher.wait(PATIENCE) == 0, output.read_text()
    finally:
        launcher.terminate()  # with its processes, which it ends; nothing if all went well
    found = the_run(quiet), the_run(disturbed)
    assert found[0] is not None
    assert found[1] is not None
    assert output.read_text().count("exitcode: -9") == KILLS
    return found[0], found[1]


def rows(run: RunDirectory) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in lines]


def test_numbers_are_equal(runs: tuple[RunDirectory, RunDirectory]) -> None:
    quiet, disturbed = runs
    assert [row["iteration"] for row in rows(disturbed)] == list(range(STEPS))
    assert rows(disturbed) == rows(quiet)
    assert disturbed.result == quiet.result
    ours, theirs = (checkpoints.load(run.newest_checkpoint()) for run in (disturbed, quiet))
    for part, tensors in theirs.tensors.items():
        assert all(torch.equal(ours.tensors[part][name], value) for name, value in tensors.items()), part


def test_nothing_half_made_is_left(runs: tuple[RunDirectory, RunDirectory]) -> None:
    hidden = {path.name for path in runs[1].path.rglob(".*")}
    assert hidden == {".metadata"}  # of torch's checkpoints
    assert len(checkpoints.available(runs[1].checkpoints)) == 2


def test_the_same_command_by_hand_is_refused(runs: tuple[RunDirectory, RunDirectory], tmp_path: Path) -> None:
    """Even where the launcher tries again: it is another launch."""
    output = tmp_path / "output.txt"
    launcher = torchrun.start(command(runs[1].path.parent), output, restarts=1)
    assert launcher.wait(PATIENCE) == 1
    assert output.read_text().count("twinrl: this run exists and has finished") == 2
    assert "exitcode  : 2" in output.read_text()
