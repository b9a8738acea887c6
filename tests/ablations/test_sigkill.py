"""A study whose driver, Ray workers and trials are killed at random moments ends with the numbers of a quiet one.

``KILLS=30`` in the environment makes it thirty moments instead of a few.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from tiny import TINY, write

from ablations.ledger import Ledger, Record
from ablations.trial import checkpointed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc"),
]
KILLS = int(os.environ.get("KILLS", "4"))
STEPS, PATIENCE = 60 * max(1, KILLS // 4), 300
COMMAND = [sys.executable, "-c", "from ablations.cli import app; app()", "run"]
REPOSITORY = Path(__file__).parents[2]


def start(study: str, root: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    arguments = [*COMMAND, study, "--root", str(root), "--no-mlflow", "--cpus", "2"]
    with (root.parent / f"{root.name}.txt").open("ab") as output:
        return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)


def progress(root: Path) -> int:
    """Checkpointed steps of all runs."""
    return sum(max(0, checkpointed(run)) for run in root.glob("????????/*-s?"))


def trials(root: Path) -> list[int]:
    """Ids of the trial processes of a workspace."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ablations.lifeline" in words and str(root).encode() in words:
            found.append(int(folder.name))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def kill(target: str, driver: subprocess.Popen[bytes], root: Path) -> None:
    if target == "driver":
        driver.kill()
        driver.wait()
        return
    for pid in trials(root)[:1]:
        os.kill(pid if target == "trial" else parent(pid), signal.SIGKILL)


def wait_for_progress(driver: subprocess.Popen[bytes], root: Path) -> None:
    before, deadline = progress(root), time.monotonic() + PATIENCE
    while progress(root) <= before and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory, lab: object) -> tuple[Path, Path]:
    """Workspaces of a quiet and of a disturbed study; ``lab`` is built before, if need be."""
    folder = tmp_path_factory.mktemp("kills")
    study = write(folder / "kills.yaml", set=TINY | {"train.steps": STEPS}, retries=KILLS, seeds=1)
    quiet, disturbed = folder / "quiet", folder / "disturbed"
    assert start(study, quiet).wait(PATIENCE * 4) == 0, (folder / "quiet.txt").read_text()
    moments, driver = random.Random(7), start(study, disturbed)
    for target in islice(cycle(["driver", "trial", "worker", "driver"]), KILLS):
        wait_for_progress(driver, disturbed)
        time.sleep(moments.uniform(0, 0.5))
        kill(target, driver, disturbed)
        driver = driver if driver.poll() is None else start(study, disturbed)
    assert driver.wait(PATIENCE * 4) == 0, (folder / "disturbed.txt").read_text()
    return quiet, disturbed


def rows(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in lines]


def numbers(record: Record) -> tuple[object, ...]:
    return record.key, record.status, record.step, dict(record.metrics), record.diverged


def test_logs_and_records_are_equal(roots: tuple[Path, Path]) -> None:
    quiet, disturbed = roots
    runs = sorted(path.relative_to(quiet) for path in quiet.glob("????????/*-s?"))
    assert len(runs) == 2
    for run in runs:
        assert rows(disturbed / run) == rows(quiet / run)
        assert len(rows(quiet / run)) == STEPS
    ours, theirs = (Ledger(root / "ledger.jsonl").read() for root in roots)
    assert {key: numbers(record) for key, record in ours.items()} == {k: numbers(r) for k, r in theirs.items()}


def test_no_finished_trial_was_repeated(roots: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in (roots[1] / "ledger.jsonl").read_text().splitlines()]
    assert [line["status"] for line in lines] == ["finished"] * 2


def test_nothing_is_left_running(roots: tuple[Path, Path]) -> None:
    assert trials(roots[1]) == []
