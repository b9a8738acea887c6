"""One trial: train or resume a run directory to its end, then write one line into the ledger.

A trial is ``twinrl train`` in a process of its own, so it has its own threads, output file and fate, and what makes
a run continue bit for bit after a kill is twinrl's. The Ray actor around it only waits: it stops the process on
request (a checkpoint is written), reports rungs to the scheduler, and records the result. Torch is not imported
here, so an actor is light and serves one trial after the other.
"""

import fcntl
import json
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
from typing import Any

from ray.tune import Trainable

from ablations import ledger
from ablations.fingerprint import sources
from ablations.ledger import Record
from twinrl.tracking import names, runlog

SOURCES = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.1
LOCK_PATIENCE_SECONDS = 60
WORST = 1e30
"""Stands for a metric that is not finite or missing: smaller is better, and halving can't order NaN."""
RESULT, CONFIG, EVENTS, CHECKPOINTS = "result.json", "config.yaml", "events.jsonl", "checkpoints"
KEPT = (names.VAL_QUALITY, names.VAL_VELOCITY_MSE, names.LOSS_TOTAL)
"""Last values of these go into the ledger beside the final table."""


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
        return f"{self.config_hash}-s{self.seed}-{self.fingerprint}"

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.cwd, self.directory)

    @property
    def ended(self) -> bool:
        """Whether the run has its result."""
        return (self.path / RESULT).is_file()

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


def _start(task: Task) -> subprocess.Popen[bytes]:
    """The training process, its output appended to the trial's file."""
    begun = _mended(task)
    twinrl = ["resume", task.directory] if begun else ["train", task.config]
    command = [sys.executable, "-m", *_launcher(task), "twinrl.lifeline", "twinrl", *twinrl]
    output = Path(task.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        file.write(f"$ twinrl {' '.join(twinrl)}\n".encode())
        file.flush()
        return subprocess.Popen(
            command, cwd=task.cwd, env=environment(task.threads), start_new_session=True,
            stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip


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
        "twinrl.lifeline",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={task.workers}",
        *logs,
        "-m",
    ]


def environment(threads: int) -> dict[str, str]:
    """Environment of a process that trains: its threads, a wide console, and this checkout's packages first."""
    path = [str(SOURCES), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    joined = os.pathsep.join(dict.fromkeys(path))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "120", "PYTHONPATH": joined}


def _mended(task: Task) -> bool:
    """Whether the run was begun; a configuration that a kill left half written is written again."""
    path = task.path / CONFIG
    if not path.is_file():
        return False
    if checkpointed(task.path) < 0 and path.read_text() != (text := Path(task.config).read_text()):
        path.write_text(text)
    return True


def _wait_until_free(task: Task) -> None:
    """Return once no process holds the run's lock; a killed study's last trial may take seconds to die."""
    path, deadline = task.path / CONFIG, time.monotonic() + LOCK_PATIENCE_SECONDS
    while path.is_file():
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go on leaving the block
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TrialError(f"another process is training {task.directory}") from None
        time.sleep(POLL_SECONDS)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a trial's process and what it has left behind: its group, and all that hold its lifeline."""
    with suppress(ProcessLookupError):  # it has ended by itself, and nothing of its group is left
        os.killpg(process.pid, signal.SIGKILL)
    assert process.stdin is not None
    process.stdin.close()
    process.wait()


def checkpointed(run: Path) -> int:
    """Steps of the run's newest checkpoint; −1 if there is none."""
    found = [int(p.name.removeprefix("step-")) for p in (run / CHECKPOINTS).glob("step-*")]
    return max(found, default=-1)


def durable_log(run: Path) -> int | None:
    """Bytes of the run's log that its newest checkpoint has put on disk for good; None before the first one.

    What is behind them a resumed run cuts off and writes again.
    """
    folder = run / CHECKPOINTS / f"step-{checkpointed(run):08d}"
    try:
        return int(json.loads((folder / "state.json").read_text())["log_offset"])
    except (FileNotFoundError, NotADirectoryError):  # none yet, or replaced meanwhile
        return None


def last_line(path: Path) -> str:
    """The last line of a process's output that says something."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:300]


# --- the record -------------------------------------------------------------------------------------------


def record(task: Task) -> Record:
    """The ledger's line for a run that has ended."""
    return _record(task, json.loads((task.path / RESULT).read_text()))


def pruned(task: Task, rung: int) -> Record:
    """The ledger's line for a run that successive halving ended: censored there, unless it had diverged before."""
    return _record(task, {"status": "pruned", "step": rung, "message": f"halved at step {rung}"})


def _record(task: Task, result: Mapping[str, Any]) -> Record:
    rows = runlog.read(task.path / runlog.LOG_NAME)
    metrics = final_metrics(runlog.surviving(rows, rows), (*KEPT, task.metric))
    return Record(
        task.config_hash, task.seed, task.fingerprint, result["status"], result["step"], result.get("message", ""),
        metrics=metrics | table_metrics(result.get("table")),
        diverged=divergence(task.path, rows, result),
        seconds=round(sum(row.get(names.STEP_SECONDS, 0.0) for row in rows), 3),
        where=ledger.provenance(Path(task.directory), task.revision),
    )  # fmt: skip


def final_metrics(rows: list[dict[str, Any]], wanted: tuple[str, ...]) -> dict[str, float]:
    """The last logged value of each wanted metric that was logged at all."""
    found: dict[str, float] = {}
    for row in rows:
        found |= {name: float(row[name]) for name in wanted if name in row}
    return found


def table_metrics(table: Mapping[str, Any] | None) -> dict[str, float]:
    """The student's rows of the final table as ``test/<metric>_<n>nfe``."""
    students = [row for row in (table or {}).get("rows", []) if row["name"] == "student"]
    return {
        f"test/{name}_{row['nfe']}nfe": float(estimate["value"])
        for row in students
        for name, estimate in row["metrics"].items()
    }


def divergence(run: Path, rows: list[dict[str, Any]], result: Mapping[str, Any]) -> dict[str, Any] | None:
    """Step and kind of a run's divergence; None if it stayed healthy, or was rescued by a rollback.

    The event ``diverged`` is the trainer's verdict. A run that a policy stopped has diverged too, by its last event.
    """
    events = runlog.surviving(runlog.read(run / EVENTS), rows) if (run / EVENTS).is_file() else []
    verdict = next((event for event in events if event["kind"] == "diverged"), None)
    if verdict is not None:
        kind = "quality" if verdict.get("series") == names.VAL_QUALITY else "nonfinite"
        return {"step": verdict["step"], "kind": kind}
    if result["status"] != "diverged":
        return None
    return {"step": result["step"], "kind": events[-1]["kind"] if events else "unknown"}


def at_rung(run: Path, metric: str, rung: int) -> float:
    """The last value of a metric logged at ``rung`` steps or before, ``WORST`` where it is missing or not finite."""
    rows = runlog.read(run / runlog.LOG_NAME)
    values = [row[metric] for row in runlog.surviving(rows, rows) if metric in row and row["step"] <= rung]
    return comparable(values[-1] if values else math.nan)


def comparable(value: float) -> float:
    """A finite number that orders as ``value`` should where smaller is better."""
    return min(max(value, -WORST), WORST) if math.isfinite(value) else WORST


# --- Ray --------------------------------------------------------------------------------------------------


class RayTrial(Trainable):
    """What Ray Tune runs: each ``step`` advances the trial to its next rung or to its end."""

    def setup(self, config: dict[str, Any]) -> None:
        """Take the task."""
        self.task = Task(**config["task"])
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
            done["compared"] = comparable(outcome.metrics.get(self.task.metric, math.nan))
        return done

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: the run directory is the state."""

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing: the run directory is the state."""
