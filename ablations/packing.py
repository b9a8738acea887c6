"""Trials that share a process: ``resources: {packed: N}`` groups seeds of an arm, whose network calls are batched.

To Ray a group is one trial; to the ledger, the table and whoever resumes them its members stay trials of their own.
A member that fails is reported alone, and tried again with whatever else of its group is unfinished.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune import Trainable

from ablations import ledger, trial
from ablations.ledger import Ledger
from ablations.trial import RayTrial, Task, TrialError


class PackError(TrialError):
    """Members of a group have ended without a result.

    Arguments:
        messages: key of each → the last line of its output.
    """

    def __init__(self, messages: Mapping[str, str]):
        super().__init__(messages)
        self.messages = messages


def groups(tasks: Iterable[Task], packed: int) -> list[list[Task]]:
    """Tasks that differ in their seed alone, at most ``packed`` together, in the order of their first."""
    arms: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        arms.setdefault((task.config_hash, task.fingerprint), []).append(task)
    chunks = [arm[i : i + packed] for arm in arms.values() for i in range(0, len(arm), packed)]
    order = {task.key: number for arm in arms.values() for number, task in enumerate(arm)}
    return sorted(chunks, key=lambda chunk: order[chunk[0].key])  # stable: complete seeds first


def work(tasks: Sequence[Task], packed: int) -> tuple[type[Trainable], dict[str, Any]]:
    """What Ray Tune is to run for these tasks, and its search space."""
    if packed == 1:
        return RayTrial, {"task": tune.grid_search([asdict(task) for task in tasks])}
    found = [[asdict(task) for task in group] for group in groups(tasks, packed)]
    return RayPack, {"tasks": tune.grid_search(found)}


def tasks_of(config: Mapping[str, Any]) -> list[Task]:
    """The tasks of one of Ray's trials."""
    return [Task(**one) for one in (config["tasks"] if "tasks" in config else [config["task"]])]


# --- the process ------------------------------------------------------------------------------------------


def advance(tasks: Sequence[Task]) -> str:
    """Train those that are unfinished until all have ended or were asked to stop: ``ended`` or ``stopped``.

    Raises:
        TrialError: the sources have changed, or a run is being trained elsewhere.
        PackError: the process ended on its own and some have no result.
    """
    left = [task for task in tasks if not task.ended]
    if not left:
        return "ended"
    if left[0].asked_to_stop():
        return "stopped"
    trial._refuse_other_sources(left[0])
    for task in left:
        trial._wait_until_free(task)
    stopped = _watch(_start(left), left[0])
    failed = [task for task in left if not task.ended]
    if failed and not stopped:
        raise PackError({task.key: _why(task, left[0]) for task in failed})
    return "stopped" if failed else "ended"


def _watch(process: "subprocess.Popen[bytes]", task: Task) -> bool:
    """Wait for the process, and ask it once to end if the study is to stop; whether it was asked."""
    asked = False
    try:
        while process.poll() is None:
            time.sleep(trial.POLL_SECONDS)
            if not asked and task.asked_to_stop():
                process.send_signal(signal.SIGTERM)
                asked = True
    finally:
        trial.end(process)
    return asked


def _start(tasks: Sequence[Task]) -> "subprocess.Popen[bytes]":
    """The training process; the trials print into their own outputs, the process itself into the group's."""
    pairs = [path for task in tasks for path in (task.config, task.output)]
    command = [sys.executable, "-m", "ablations.lifeline", "ablations.packed", *pairs]
    for task in tasks:
        begun = trial._mended(task)
        Path(task.output).parent.mkdir(parents=True, exist_ok=True)
        with Path(task.output).open("a") as file:
            twinrl = f"resume {task.directory}" if begun else f"train {task.config}"
            file.write(f"$ twinrl {twinrl}  # {len(tasks)} packed into one process\n")
    with _output(tasks[0]).open("ab") as file:
        return subprocess.Popen(
            command, cwd=tasks[0].cwd, env=trial.environment(tasks[0].threads), start_new_session=True,
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _output(first: Task) -> Path:
    """What the process of a group prints outside its members."""
    return Path(first.output).with_suffix(".pack.txt")


def _why(task: Task, first: Task) -> str:
    """The last line of a member's output; of the process's, where the member did not get to say anything."""
    said = trial.last_line(Path(task.output))
    return trial.last_line(_output(first)) or "the process ended" if said.startswith("$ ") or not said else said


# --- Ray --------------------------------------------------------------------------------------------------


class RayPack(Trainable):
    """What Ray Tune runs in place of :class:`ablations.trial.RayTrial` where seeds are packed."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the group."""
        self.tasks = tasks_of(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Serve the next group in the same actor."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Train the group; every member with a result has its line in the ledger afterwards, whatever the others."""
        try:
            reason = advance(self.tasks)
        finally:
            self._record()
        return {"step": self.tasks[0].steps, "reason": reason, "done": True}

    def _record(self) -> None:
        path = Path(self.tasks[0].ledger)
        known = Ledger(path).read()
        for task in self.tasks:
            if task.ended and not (task.key in known and known[task.key].final):
                ledger.append(path, trial.record(task))

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run directories are the state."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: the run directories are the state."""
