"""A real run on the lab, killed at five random moments and once interrupted, equals an undisturbed one bit for bit."""

import json
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from twinrl import checkpoints
from twinrl.runs import RunDirectory
from twinrl.tracking import names, runlog
from twinrl.tracking.mlflow_state import STATE_NAME

STEPS, EVERY, KILLS = 200, 10, 5
WITHIN = 2 * EVERY  # SIGKILL comes a random part of these steps after a process's first sign of life
PATIENCE = 300  # seconds for one process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from twinrl.cli import main; main()", *arguments]


def train(folder: Path, store: Path) -> list[str]:
    return command(
        "train", "twinflow", f"train.steps={STEPS}", "train.batch=32", f"checkpoint.every={EVERY}", f"run.dir={folder}",
        "evaluation={every: 50, n: 40, nfe: [1], teacher_steps: 2, velocity_rows: 10, grid_samples: 1}",
        f"tracking.uri=sqlite:///{store}", "machine={device: cpu, threads: 1}",
    )  # fmt: skip


def resume(run: RunDirectory) -> list[str]:
    return command("resume", str(run.path))


def the_run(folder: Path) -> RunDirectory | None:
    found = list(folder.glob("twinflow-*-s0"))
    return RunDirectory(found[0]) if found else None


def saved(folder: Path) -> int:
    """Steps in the newest checkpoint; −1 before the log is opened."""
    run = the_run(folder)
    if run is None or not run.log.exists():
        return -1
    newest = checkpoints.newest(run.checkpoints)
    return int(newest.name.removeprefix("step-")) if newest else 0


def end(arguments: list[str], folder: Path, delay: float, number: signal.Signals) -> tuple[int, str]:
    """Start a process and send it ``number``, ``delay`` seconds after its first sign of life; exit code and output.

    The sign is the log of a new run, and the first new checkpoint of a resumed one.
    """
    before = saved(folder)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + PATIENCE
    while saved(folder) <= before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(delay)
    early = process.poll() is not None
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert not early, f"ended by itself:\n{output}"
    return process.returncode, output


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, store: Path, lab: object) -> RunDirectory:
    """``lab`` is built before, if need be, so that no process is killed while it builds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(train(folder, store), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    run = the_run(folder)
    assert run is not None
    return run


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory, store: Path, undisturbed: RunDirectory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("disturbed")
    pace = statistics.median(row[names.STEP_SECONDS] for row in runlog.read(undisturbed.log))
    moments = random.Random(20_240_607)
    arguments = train(folder, store)
    for _ in range(KILLS):
        code, _ = end(arguments, folder, moments.uniform(0, WITHIN) * pace, signal.SIGKILL)
        assert code == -signal.SIGKILL
        run = the_run(folder)
        assert run is not None
        assert run.result is None
        arguments = resume(run)
    code, output = end(arguments, folder, 3 * pace, signal.SIGINT)
    assert code == 130, output
    assert "checkpoint written" in output
    done = subprocess.run(resume(run), capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return run


def test_final_checkpoints_are_equal(undisturbed: RunDirectory, disturbed: RunDirectory) -> None:
    a, b = (checkpoints.load(run.newest_checkpoint()) for run in (undisturbed, disturbed))
    assert a.state["step"] == STEPS
    assert set(a.tensors) == set(b.tensors) == {"student", "ema", "optimizer"}
    for part in a.tensors:
        assert set(a.tensors[part]) == set(b.tensors[part])
        assert [k for k, v in a.tensors[part].items() if not torch.equal(v, b.tensors[part][k])] == []
    different = {key for key in a.state if a.state[key] != b.state[key]}
    assert different <= {"log_offset"}  # perf/* has another number of digits


def exact(run: RunDirectory) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in run.log.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


def test_logs_are_equal_without_gap_or_repeat(undisturbed: RunDirectory, disturbed: RunDirectory) -> None:
    assert [row["iteration"] for row in exact(disturbed)] == list(range(STEPS))
    assert exact(disturbed) == exact(undisturbed)
    assert disturbed.events.read_bytes() == undisturbed.events.read_bytes() == b""


def test_verdicts_and_pictures_are_equal(undisturbed: RunDirectory, disturbed: RunDirectory) -> None:
    assert disturbed.result == undisturbed.result
    pictures = [sorted(path.name for path in run.samples.glob("step-*.png")) for run in (undisturbed, disturbed)]
    assert pictures[0] == pictures[1] == [f"step-{step:08d}.png" for step in (0, 50, 100, 150, 200)]
    for name in [*pictures[0], "final-1nfe.png"]:
        assert (disturbed.samples / name).read_bytes() == (undisturbed.samples / name).read_bytes()


def test_nothing_half_made_is_left(disturbed: RunDirectory) -> None:
    assert [path.name for path in disturbed.path.rglob("*") if path.name.startswith(".")] == []
    assert len(checkpoints.available(disturbed.checkpoints)) == 2


def test_mlflow_has_every_point_once(undisturbed: RunDirectory, disturbed: RunDirectory, store: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    ids = [json.loads((run.path / STATE_NAME).read_text())["run_id"] for run in (undisturbed, disturbed)]
    found = client.search_runs([client.get_experiment_by_name("twinrl").experiment_id])
    assert sorted(run.info.run_id for run in found) == sorted(ids)
    assert {run.info.status for run in found} == {"FINISHED"}
    for name in (names.LOSS_TOTAL, names.loss("rectify"), names.GRAD_TOTAL_RAW, names.VAL_QUALITY, names.STEP_SECONDS):
        a, b = ([(p.step, p.value) for p in client.get_metric_history(run_id, name)] for run_id in ids)
        assert len({step for step, _ in b}) == len(b) > 0
        if name != names.STEP_SECONDS:
            assert b == a
    assert len(client.get_metric_history(ids[1], names.LOSS_TOTAL)) == STEPS
