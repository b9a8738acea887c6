"""A run under torchrun whose processes are killed at random moments ends with the numbers of an undisturbed one."""

import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.fsdp import torchrun
from tests.fsdp.torchrun import PATIENCE, Ended
from tests.logs import rows, tensors, the_run
from twinrl.run import layout, names, runlog
from twinrl.training.runs import RunDirectory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]


@dataclass(frozen=True)
class Plan:
    """How often a run is killed.

    Attributes:
        kills: of one rank. steps: of the run. early: share of kills at any moment of a process's start; the others
            come up to ``within`` steps after the first new checkpoint. No kill waits until the run has gone further.
        start: of a launcher.
    """

    kills: int
    steps: int
    early: float
    within: int
    start: Callable[..., forked.Process]

    def command(self, folder: Path) -> tuple[str, ...]:
        return torchrun.command(folder, f"train.steps={self.steps}")


ONCE = Plan(kills=1, steps=torchrun.STEPS, early=0, within=2, start=torchrun.start)
OFTEN = Plan(kills=20, steps=400, early=0.2, within=10, start=torchrun.start_anew)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ONCE, id="once"),
        pytest.param(OFTEN, id="often", marks=[pytest.mark.campaign, pytest.mark.timeout(8000)]),
    ],
)
def plan(request: pytest.FixtureRequest) -> Plan:
    return request.param


def saved(folder: Path) -> int:
    """Steps in the newest checkpoint."""
    run = the_run(folder)
    newest = layout.newest(run.checkpoints) if run is not None else None
    return int(newest.name.removeprefix("step-")) if newest else 0


def kill_one(plan: Plan, launcher: forked.Process, folder: Path, moments: random.Random, pace: float) -> None:
    """Kill one of the ranks that run now."""
    before, early = saved(folder), moments.random() < plan.early
    forked.wait_until(lambda: len(torchrun.processes(launcher)) == 2, PATIENCE)
    if not early:
        forked.wait_until(lambda: saved(folder) > before or launcher.poll() is not None, PATIENCE)
    moment = time.monotonic() + moments.uniform(0, 5 if early else plan.within * pace)
    forked.wait_until(lambda: time.monotonic() > moment or saved(folder) > before + plan.within, PATIENCE)
    found = torchrun.processes(launcher)
    assert len(found) == 2, "it has ended by itself"
    os.kill(found[moments.randrange(2)], signal.SIGKILL)
    forked.wait_until(lambda: set(found.values()).isdisjoint(torchrun.processes(launcher).values()), PATIENCE)


@pytest.fixture(scope="module")
def quiet(plan: Plan, undisturbed: tuple[Path, Ended, Ended], tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The undisturbed run."""
    folder = undisturbed[0]
    if plan is not ONCE:
        folder = tmp_path_factory.mktemp("quiet")
        output = folder / "output.txt"
        assert plan.start(plan.command(folder), output).wait(PATIENCE) == 0, output.read_text()
    run = the_run(folder)
    assert run is not None
    return run


@pytest.fixture(scope="module")
def disturbed(plan: Plan, quiet: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The same under fire."""
    folder = tmp_path_factory.mktemp("disturbed")
    output, moments = folder / "output.txt", random.Random(11)
    pace = statistics.median(row[names.STEP_SECONDS] for row in runlog.read(quiet.log))
    launcher = plan.start(plan.command(folder), output, restarts=plan.kills)
    try:
        for _ in range(plan.kills):
            kill_one(plan, launcher, folder, moments, pace)
        assert launcher.wait(PATIENCE) == 0, output.read_text()
    finally:
        launcher.terminate()  # with its processes, which it ends; nothing if all went well
    run, text = the_run(folder), output.read_text()
    assert run is not None
    assert text.count("failed (exitcode: ") == plan.kills, text  # of the killed one, or of the one that missed it
    assert text.count("resuming at step") >= (1 - plan.early) * plan.kills / 2, text
    return run


def test_numbers_are_equal(plan: Plan, quiet: RunDirectory, disturbed: RunDirectory) -> None:
    assert [row["iteration"] for row in rows(disturbed)] == list(range(plan.steps))
    assert rows(disturbed) == rows(quiet)
    assert disturbed.result == quiet.result
    ours, theirs = tensors(disturbed), tensors(quiet)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []


def test_nothing_half_made_is_left(disturbed: RunDirectory) -> None:
    hidden = {path.name for path in disturbed.path.rglob(".*")}
    assert hidden == {".lock", ".metadata"}  # the second of torch's checkpoints
    assert len(layout.available(disturbed.checkpoints)) == 2


def test_the_same_command_by_hand_is_refused(plan: Plan, disturbed: RunDirectory, tmp_path: Path) -> None:
    """Even where the launcher tries again: it is another launch."""
    output = tmp_path / "output.txt"
    launcher = plan.start(plan.command(disturbed.path.parent), output, restarts=1)
    assert launcher.wait(PATIENCE) == 1
    assert output.read_text().count("twinrl: this run exists and has finished") == 2
    assert "exitcode  : 2" in output.read_text()
