"""Starts studies as processes, finds what they have started, and reads what they have left."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ablations.ledger import TrialRecord
from ablations.trial import checkpointed

COMMAND = [sys.executable, "-c", "from ablations.cli import app; app()", "run"]
REPOSITORY = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
STORE = "--object-store-memory=80000000"


def start(study: str, root: Path, *options: str, **variables: str) -> subprocess.Popen[bytes]:
    """``ablate run``; its output goes to a text file beside the workspace."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | variables
    arguments = [*COMMAND, study, "--root", str(root), "--no-mlflow", *options]
    with (root.parent / f"{root.name}.txt").open("ab") as output:
        return subprocess.Popen(arguments, cwd=REPOSITORY, env=environment, stdout=output, stderr=output)


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    """Return once the condition holds; AssertionError if it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def progress(root: Path) -> int:
    """Checkpointed steps of all runs."""
    return sum(max(0, checkpointed(run)) for run in root.glob("????????/*-s?"))


def words(pid: int) -> str:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def processes() -> list[int]:
    """Ids of all processes."""
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def trials(root: Path) -> list[int]:
    """Ids of the trial processes of a workspace."""
    return [pid for pid in processes() if "twinrl.machine.lifeline" in (line := words(pid)) and str(root) in line]


def parent(pid: int) -> int:
    """Id of the process that started ``pid``; 0 if that has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def below(pid: int, stop: str | None = None) -> list[int]:
    """Ids of all that a process has started, directly or not; without those whose command line has ``stop``."""
    children: dict[int, list[int]] = {}
    for found in processes():
        children.setdefault(parent(found), []).append(found)
    own = [child for child in children.get(pid, []) if stop is None or stop not in words(child)]
    return own + [further for child in own for further in below(child, stop)]


def numbers(record: TrialRecord) -> tuple[object, ...]:
    """All of a record but when and where."""
    return record.key, record.status, record.step, dict(record.metrics), record.diverged


def lines(root: Path) -> list[dict[str, Any]]:
    """The ledger's lines."""
    return [json.loads(line) for line in (root / "ledger.jsonl").read_text().splitlines()]


class Node:
    """One Ray node of this machine; leaving its block kills it and all that it started."""

    def __init__(self, folder: Path, name: str, *arguments: str, **variables: str):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | variables
        with (folder / f"{name}.txt").open("wb") as output:
            self.process = subprocess.Popen(
                [*RAY, STORE, f"--node-name={name}", *arguments],
                cwd=REPOSITORY, env=environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        """SIGKILL to the raylet and its workers, as when the machine loses power; trials have to notice."""
        for pid in [*below(self.process.pid, stop="twinrl.machine.lifeline"), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
