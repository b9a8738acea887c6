"""One trial: train or resume a run directory to its end, then write one line into the ledger.

A trial is ``twinrl train`` in a process of its own, so it has its own threads, output file and fate, and what makes
a run continue bit for bit after a kill is twinrl's. An actor's trials are forks of one process, which has made the
imports that would cost each of them seconds. The Ray actor around it only waits: it stops the process on
request (a checkpoint is written), reports rungs to the scheduler, and records the result. Torch is not imported
here, so an actor is light and serves one trial after the other.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from pydantic import BaseModel, NonNegativeInt
from ray.tune import Trainable

from ablations import ledger
from ablations.fingerprint import sources
from ablations.ledger import TrialRecord
from twinrl.config import stored
from twinrl.machine import cluster, files, forks
from twinrl.run import layout, names, runlog
from twinrl.stability import verdict

POLL_SECONDS = 0.1
LOCK_PATIENCE_SECONDS = 60
WORST = 1e30
"""Stands for a metric that is not finite or missing: smaller is better, and halving can't order NaN."""
PRELOADED = ("twinrl.commands.train", "twinrl.lab.libraries")
"""Modules of which every training needs most."""
METRICS_KEPT = (names.VAL_QUALITY, names.VAL_VELOCITY_MSE, names.LOSS_TOTAL)
"""Last values of these go into the ledger beside the final table."""
FAILURE = ("step", "kind", "after", "recovered")
"""What the ledger keeps of a failure."""


Process: TypeAlias = "subprocess.Popen[bytes] | forks.Fork"

_servers: dict[tuple[str, int], forks.Server] = {}
"""This process's, by working directory and threads."""


class TrialError(RuntimeError):
    """The trial's process ended without a result; the message is the last line of its output."""


@dataclass(frozen=True)
class Task:
    """A trial as its process needs it: plain values, because Ray sends them to other machines.

    Attributes:
        title: arm and seed, for people.
        config_hash, seed, fingerprint, revision: for the ledger.
        sources: hash of twinrl's sources that the fingerprint was made with. unused: those that are not in it.
        directory: the run directory. config: file with the resolved configuration. output: of the process.
        ledger: file to write the record to. cwd: working directory of the process.
        steps: planned. metric: whose last value is kept and compared at rungs.
        workers, threads: processes and threads of each.
        stop: when this file exists, trials checkpoint and end. deadline: so they do at this time, in epoch seconds.
        rungs: steps at which the scheduler decides whether to go on.
    """

    title: str
    config_hash: str
    seed: int
    fingerprint: str
    sources: str
    unused: tuple[str, ...]
    revision: str | None
    directory: str
    config: str
    output: str
    ledger: str
    cwd: str
    steps: int
    metric: str
    workers: int
    threads: int
    stop: str
    deadline: float | None = None
    rungs: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """As in the ledger."""
        return ledger.key_of(self.config_hash, self.seed, self.fingerprint)

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.cwd, self.directory)

    @property
    def ended(self) -> bool:
        """Whether the run has its result."""
        return (self.path / layout.RESULT).is_file()

    def __deepcopy__(self, memo: object) -> "Task":
        """Itself, as nothing of it changes: Tune copies all trials' settings for each trial."""
        return self

    def asked_to_stop(self) -> bool:
        """Whether the study wants its trials to end for now."""
        return Path(self.stop).exists() or (self.deadline is not None and time.time() > self.deadline)


# --- the process ------------------------------------------------------------------------------------------


def advance(task: Task, rung: int | None = None) -> str:
    """Train until the run has ended, has a checkpoint at ``rung`` steps or later, or was asked to stop.

    Returns:
        ``ended``, ``rung`` or ``stopped``.

    Raises:
        TrialError: the process ended on its own without a result.
    """
    reason = _reason_to_pause(task, rung)
    if reason is not None:
        return reason
    _refuse_other_sources(task)
    _wait_until_free(task)
    process = _start(task)
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if reason is None and (reason := _reason_to_pause(task, rung)) not in (None, "ended"):
                process.send_signal(signal.SIGTERM)  # once: the second would not wait for a checkpoint
    finally:
        end(process)
    if task.ended:
        return "ended"
    if reason is None:
        raise TrialError(last_line(Path(task.output)) or f"the process ended with {process.returncode}")
    return reason


def _reason_to_pause(task: Task, rung: int | None) -> str | None:
    if task.ended:
        return "ended"
    if task.asked_to_stop():
        return "stopped"
    return "rung" if rung is not None and checkpointed(task.path) >= rung else None


def _refuse_other_sources(task: Task) -> None:
    """Raises TrialError where code was edited since the study was planned: its numbers would be filed wrongly."""
    if sources(unused=task.unused) != task.sources:
        raise TrialError("twinrl's sources have changed since this study was started; run it again to use them")


def _start(task: Task) -> Process:
    """The training process, its output appended to the trial's file."""
    begun = (task.path / layout.CONFIG).is_file()
    twinrl = ["twinrl", *(["resume", task.directory] if begun else ["train", task.config])]
    output = Path(task.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        file.write(f"$ {' '.join(twinrl)}\n".encode())
        file.flush()
        if task.workers == 1 and sys.platform == "linux":  # elsewhere libraries are not safe to fork
            return _forked(task, twinrl, file)
        return subprocess.Popen(
            [sys.executable, "-m", *_launcher(task), "twinrl.machine.lifeline", *twinrl],
            cwd=task.cwd, env=environment(task.threads), start_new_session=True,
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


def _forked(task: Task, words: list[str], file: BinaryIO) -> forks.Fork:
    """The process as a fork of this actor's server. Raises TrialError where its imports fail."""
    kind = (task.cwd, task.threads)
    if kind not in _servers or not _servers[kind].alive:
        _servers[kind] = forks.Server(PRELOADED, task.cwd, environment(task.threads), file)
    try:
        return _servers[kind].start(words, Path(task.output).absolute())
    except ChildProcessError as error:
        raise TrialError(last_line(Path(task.output)) or str(error)) from error


def ranks_folder(output: str) -> Path:
    """Where what processes other than the first print is kept, in one folder for each start."""
    return Path(output).with_suffix(".ranks")


def _launcher(task: Task) -> list[str]:
    """The words before a process's own: torchrun's, where a trial has several processes.

    The first process prints into the trial's output, the others into files of their own. Torchrun gives each a
    process group of its own, so each has a lifeline, too.
    """
    if task.workers == 1:
        return []
    others = ",".join(f"{rank}:3" for rank in range(1, task.workers))
    logs = [f"--log-dir={ranks_folder(task.output)}", f"--redirects={others}"]
    return [
        "twinrl.machine.lifeline",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={task.workers}",
        *logs,
        "-m",
    ]


def environment(threads: int) -> dict[str, str]:
    """Environment of a process that trains: its threads, a wide console, and this checkout's packages first."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120", "PYTHONPATH": cluster.python_path()}


def _wait_until_free(task: Task) -> None:
    """Return once no process holds the run's lock; a killed study's last trial may take seconds to die."""
    if (lock := task.path / layout.LOCK).is_file():
        with files.locked(lock, TrialError(f"another process is training {task.directory}"), LOCK_PATIENCE_SECONDS):
            pass


def end(process: Process) -> None:
    """End a trial's process and what it has left behind: its group, and all that hold its lifeline."""
    with suppress(ProcessLookupError):  # it has ended by itself, and nothing of its group is left
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        process.stdin.close()
    process.wait()


def checkpointed(run: Path) -> int:
    """Steps of the run's newest checkpoint; −1 if there is none."""
    newest = layout.newest(run / layout.CHECKPOINTS)
    return -1 if newest is None else layout.step_of(newest)


class Durable(BaseModel):
    """What a study reads of a checkpoint's state."""

    log_offset: NonNegativeInt


def durable_log(run: Path) -> int | None:
    """Bytes of the run's log that its newest checkpoint has put on disk for good; None before the first one.

    What is behind them a resumed run cuts off and writes again. Raises InputError where the checkpoint is damaged.
    """
    newest = layout.newest(run / layout.CHECKPOINTS)
    try:
        return None if newest is None else stored.read(newest / layout.STATE, Durable, "delete it").log_offset
    except (FileNotFoundError, NotADirectoryError):  # replaced meanwhile
        return None


def last_line(path: Path) -> str:
    """The last line of a process's output that says something."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


# --- the record -------------------------------------------------------------------------------------------


def record(task: Task) -> TrialRecord:
    """The ledger's line for a run that has ended."""
    result = layout.read_result(task.path)
    assert result is not None
    return _record(task, result)


def pruned(task: Task, rung: int) -> TrialRecord:
    """The ledger's line for a run that successive halving ended: censored there, unless it had diverged before."""
    return _record(task, {"status": "pruned", "step": rung, "message": f"halved at step {rung}"})


def _record(task: Task, result: Mapping[str, Any]) -> TrialRecord:
    rows = layout.read_rows(task.path)
    failure = verdict.of_run(task.path, rows)
    metrics = verdict.final_values(
        runlog.surviving(rows, rows), lambda name: name in (*METRICS_KEPT, task.metric), failure
    )
    try:
        tabled = table_metrics(result.get("table"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise layout.damaged_result(task.path, f"table: {type(error).__name__} {error}") from error
    return TrialRecord(
        task.config_hash, task.seed, task.fingerprint, result["status"], result["step"], result.get("message", ""),
        metrics=metrics | tabled,
        diverged=None if failure is None else {name: getattr(failure, name) for name in FAILURE},
        seconds=round(sum(row.get(names.STEP_SECONDS, 0.0) for row in rows), 3),
        where=ledger.provenance(Path(task.directory), task.revision),
    )  # fmt: skip


def table_metrics(table: Mapping[str, Any] | None) -> dict[str, float]:
    """The student's rows of the final table as ``test/<metric>_<n>nfe``; a family's table has no others."""
    rows = (table or {}).get("rows", [])
    if isinstance(rows, Mapping):
        return {f"test/{name}_{nfe}nfe": float(value) for nfe, row in rows.items() for name, value in row.items()}
    return {
        f"test/{name}_{row['nfe']}nfe": float(estimate["value"])
        for row in rows
        if row["name"] == "student"
        for name, estimate in row["metrics"].items()
    }


def at_rung(run: Path, metric: str, rung: int) -> float:
    """The last value of a metric logged at ``rung`` steps or before.

    ``WORST`` where it is missing or not finite, and for a run that has failed by then and not recovered.
    """
    rows = layout.read_rows(run)
    until = [row for row in runlog.surviving(rows, rows) if row["step"] <= rung]
    failure = verdict.of_run(run, until)
    if failure is not None and failure.lost:
        return WORST
    return comparable(verdict.final_values(until, {metric}.__contains__, failure).get(metric, math.nan))


def comparable(value: float) -> float:
    """A finite number that orders as ``value`` should where smaller is better."""
    return min(max(value, -WORST), WORST) if math.isfinite(value) else WORST


# --- Ray --------------------------------------------------------------------------------------------------


class RayTrial(Trainable):
    """What Ray Tune runs: each ``step`` advances the trial to its next rung or to its end."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the task."""
        self.task: Task = config["task"]
        self.rungs = list(self.task.rungs)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Serve the next trial in the same actor."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Advance; the last report of a trial is ``done`` and says how it ended."""
        rung = self.rungs.pop(0) if self.rungs else None
        reason = advance(self.task, rung)
        if reason == "rung":
            assert rung is not None
            value = at_rung(self.task.path, self.task.metric, rung)
            return {"step": rung, "compared": value, "reason": reason, "done": False}
        done = {"step": self.task.steps, "reason": reason, "done": True}
        if reason == "ended":
            outcome = record(self.task)
            ledger.append(Path(self.task.ledger), outcome)
            done["compared"] = WORST if outcome.lost else comparable(outcome.metrics.get(self.task.metric, math.nan))
        return done

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run directory is the state."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: the run directory is the state."""
