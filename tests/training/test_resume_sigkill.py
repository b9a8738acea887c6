"""A run killed at random moments and once interrupted equals an undisturbed one bit for bit."""

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import forked
from tests.fake_source import SMALL
from tests.logs import rows, tensors, the_run
from twinrl.run import checkpoints, layout, names, runlog
from twinrl.training.runs import RunDirectory

PATIENCE = 600  # seconds for one process
pytestmark = [pytest.mark.slow, pytest.mark.processes]


@dataclass(frozen=True)
class Plan:
    """A run and how often it is killed: up to two checkpoints' steps after a process's first sign of life.

    Attributes:
        kills: how often. steps: of the run. every: steps to a checkpoint. judged: steps to a validation.
        overrides: of its configuration. anew: in processes that import everything themselves, on the lab.
    """

    kills: int
    steps: int
    every: int
    judged: int
    overrides: tuple[str, ...]
    anew: bool

    def start(self, output: Path, *arguments: str) -> forked.Process:
        """A process of the command line."""
        if not self.anew:
            return forked.start(forked.command_line, *arguments, output=output, OMP_NUM_THREADS="1")
        command = [sys.executable, "-m", "twinrl", *arguments]
        with output.open("ab") as file:
            return subprocess.Popen(command, stdout=file, stderr=file)

    def train(self, folder: Path, store: Path) -> tuple[str, ...]:
        """The command line of a new run."""
        return (
            "train", "twinflow", *self.overrides, f"train.steps={self.steps}", f"checkpoint.every={self.every}",
            f"evaluation.every={self.judged}", f"run.dir={folder}", "tracking.mlflow=true",
            f"tracking.uri=sqlite:///{store}", "machine={device: cpu, threads: 1}",
        )  # fmt: skip


ONCE = Plan(kills=1, steps=24, every=4, judged=8, overrides=SMALL, anew=False)
OFTEN = Plan(
    kills=5, steps=200, every=10, judged=50, anew=True,
    overrides=(
        "train.batch=32", "evaluation={n: 40, nfe: [1], teacher_steps: 2, velocity_rows: 10, grid_samples: 1}"
    ),
)  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(ONCE, id="once"),
        pytest.param(OFTEN, id="lab", marks=[pytest.mark.campaign, pytest.mark.timeout(3600)]),
    ],
)
def plan(request: pytest.FixtureRequest) -> Plan:
    if request.param.anew:
        request.getfixturevalue("whole_lab")  # built before, if need be, so that no process is killed while it builds
    return request.param


def saved(folder: Path) -> int:
    """Steps in the newest checkpoint; −1 before the log is opened."""
    run = the_run(folder)
    if run is None or not run.log.exists():
        return -1
    newest = layout.newest(run.checkpoints)
    return int(newest.name.removeprefix("step-")) if newest else 0


def end(process: forked.Process, folder: Path, before: int, delay: float, number: signal.Signals) -> int:
    """Send a process ``number``, ``delay`` seconds after its first sign of life; the exit code.

    The sign is the log of a new run, and the first new checkpoint of a resumed one.
    """
    forked.wait_until(lambda: saved(folder) > before or process.poll() is not None, PATIENCE)
    time.sleep(delay)
    assert process.poll() is None, "it has ended by itself"
    process.send_signal(number)
    return process.wait(PATIENCE)


@pytest.fixture(scope="module")
def store(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(scope="module")
def undisturbed(plan: Plan, tmp_path_factory: pytest.TempPathFactory, store: Path) -> RunDirectory:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = folder / "output.txt"
    assert plan.start(output, *plan.train(folder, store)).wait(PATIENCE) == 0, output.read_text()
    run = the_run(folder)
    assert run is not None
    return run


@pytest.fixture(scope="module")
def disturbed(
    plan: Plan, tmp_path_factory: pytest.TempPathFactory, store: Path, undisturbed: RunDirectory
) -> RunDirectory:
    folder = tmp_path_factory.mktemp("disturbed")
    output, arguments = folder / "output.txt", plan.train(folder, store)
    pace = statistics.median(row[names.STEP_SECONDS] for row in runlog.read(undisturbed.log))
    moments = random.Random(20_240_607)
    for _ in range(plan.kills):
        before, delay = saved(folder), moments.uniform(0, 2 * plan.every) * pace
        code = end(plan.start(output, *arguments), folder, before, delay, signal.SIGKILL)
        assert code == -signal.SIGKILL, output.read_text()
        run = the_run(folder)
        assert run is not None
        assert run.result is None
        arguments = "resume", str(run.path)
    before = saved(folder)
    assert end(plan.start(output, *arguments), folder, before, 3 * pace, signal.SIGINT) == 130, output.read_text()
    assert "checkpoint written" in output.read_text()
    assert plan.start(output, *arguments).wait(PATIENCE) == 0, output.read_text()
    return run


def test_final_checkpoints_are_equal(plan: Plan, undisturbed: RunDirectory, disturbed: RunDirectory) -> None:
    a, b = (checkpoints.load_state(run.newest_checkpoint()) for run in (undisturbed, disturbed))
    assert a["step"] == plan.steps
    assert a["parts"] == ["ema", "optimizer", "student"]
    assert {key for key in a if a[key] != b[key]} <= {"log_offset"}  # perf/* has another number of digits
    ours, theirs = tensors(disturbed), tensors(undisturbed)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []


def test_logs_are_equal_without_gap_or_repeat(plan: Plan, undisturbed: RunDirectory, disturbed: RunDirectory) -> None:
    assert [row["iteration"] for row in rows(disturbed)] == list(range(plan.steps))
    assert rows(disturbed) == rows(undisturbed)
    assert disturbed.events.read_bytes() == undisturbed.events.read_bytes() == b""


def test_verdicts_and_pictures_are_equal(plan: Plan, undisturbed: RunDirectory, disturbed: RunDirectory) -> None:
    assert disturbed.result == undisturbed.result
    pictures = [sorted(path.name for path in run.samples.glob("step-*.png")) for run in (undisturbed, disturbed)]
    assert pictures[0] == pictures[1] == [f"step-{step:08d}.png" for step in range(0, plan.steps + 1, plan.judged)]
    for name in [*pictures[0], "final-1nfe.png"]:
        assert (disturbed.samples / name).read_bytes() == (undisturbed.samples / name).read_bytes()


def test_nothing_half_made_is_left(disturbed: RunDirectory) -> None:
    assert [path.name for path in disturbed.path.rglob("*") if path.name.startswith(".")] == [layout.LOCK]
    assert len(layout.available(disturbed.checkpoints)) == 2


def test_mlflow_has_every_point_once(
    plan: Plan, undisturbed: RunDirectory, disturbed: RunDirectory, store: Path
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    ids = [json.loads((run.path / layout.MLFLOW).read_text())["run_id"] for run in (undisturbed, disturbed)]
    found = client.search_runs([client.get_experiment_by_name("twinrl").experiment_id])
    assert sorted(run.info.run_id for run in found) == sorted(ids)
    assert {run.info.status for run in found} == {"FINISHED"}
    for name in (names.LOSS_TOTAL, names.loss("rectify"), names.GRAD_TOTAL_RAW, names.VAL_QUALITY, names.STEP_SECONDS):
        a, b = ([(p.step, p.value) for p in client.get_metric_history(run_id, name)] for run_id in ids)
        assert len({step for step, _ in b}) == len(b) > 0
        if name != names.STEP_SECONDS:
            assert b == a
    assert len(client.get_metric_history(ids[1], names.LOSS_TOTAL)) == plan.steps
