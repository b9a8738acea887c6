"""A study whose disk runs full says so in a line for each trial, loses nothing, and goes on where there is room."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ablations.ledger import Ledger
from tests.ablations.disturbing import COMMAND, REPOSITORY, numbers
from tests.ablations.tiny import TINY, write

pytestmark = [pytest.mark.campaign, pytest.mark.processes, pytest.mark.timeout(1200)]
NET = {"kind": "tests.ablations.fake_trial.Net", "width": 16, "depth": 1, "condition_width": 16}
SETTINGS = TINY | {"model.network": NET, "train.init": "random", "train.steps": 24, "checkpoint.every": 6}
KILOBYTES, ENOUGH = 600, "200m"


def mount(folder: Path, options: str) -> bool:
    """A file system in memory, with these options; whether that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="full-") as made:
        if not mount(Path(made), f"size={KILOBYTES}k"):
            pytest.skip("may not mount a small disk")
        yield Path(made)
        subprocess.run(["umount", "-l", made], check=True)


def run(study: str, root: Path) -> tuple[int, str]:
    """Exit code and what was printed, on another disk."""
    arguments = [*COMMAND, study, "--root", str(root), "--no-mlflow", "--cpus", "2"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_full_disk(tmp_path: Path, disk: Path) -> None:
    study = write(tmp_path / "full.yaml", set=SETTINGS, seeds=2)
    assert run(study, tmp_path / "quiet")[0] == 0
    code, said = run(study, disk / "work")
    assert code == 1, said
    assert "Traceback" not in said
    assert "No space left" in said
    assert mount(disk, f"remount,size={ENOUGH}")
    code, said = run(study, disk / "work")
    assert code == 0, said
    quiet, after = (Ledger(root / "ledger.jsonl").read() for root in (tmp_path / "quiet", disk / "work"))
    assert len(after) == 4
    assert {key: numbers(record) for key, record in after.items()} == {k: numbers(r) for k, r in quiet.items()}
