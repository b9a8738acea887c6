"""Trials whose outcome is planted, run here one by one: what a study makes of them, without Ray and training."""

import json
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from ablations import plan as plans
from ablations import runner, trial
from ablations.display import Board
from ablations.plan import Plan, Trial
from ablations.runner import Runner
from ablations.trial import RayTrial, Task, TrialError
from twinrl.config import read_yaml, validate
from twinrl.run import layout, names, runlog
from twinrl.training.runs import dump
from twinrl.training.schema import RunConfig

EVERY = 4
"""Steps between two rows, and two checkpoints."""
STEP_SECONDS = 0.25


@dataclass
class Planted:
    """Stands for training and for Ray Tune.

    Attributes:
        quality: of a configuration after a step: what is logged as ``val/quality``. A value that is not finite is a
            divergence, at which ``stability.policy: stop`` ends the run. TrialError: the process fails there.
        accuracy: the judge's, in the final table.
        trained: title, first and last step of every piece of training.
        begun: titles of the trials that were given to Ray.
    """

    quality: Callable[[RunConfig, int], float]
    accuracy: float = 0.9
    trained: list[tuple[str, int, int]] = field(default_factory=list)
    begun: list[str] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Until the end of the test."""
        monkeypatch.setattr(trial, "advance", self.advance)
        monkeypatch.setattr(runner, "_tune", self.tune)
        monkeypatch.setattr(Runner, "_slots", lambda this, resources: 1)
        monkeypatch.setattr(plans, "content_hash", lambda settings: "content")

    def advance(self, task: Task, rung: int | None = None) -> str:
        """As ``ablations.trial.advance``."""
        if (reason := trial._reason_to_pause(task, rung)) is not None:
            return reason
        settings = validate(RunConfig, read_yaml(Path(task.config)))
        begun = max(0, trial.checkpointed(task.path))
        task.path.mkdir(parents=True, exist_ok=True)
        (task.path / layout.CONFIG).write_text(dump(settings))
        for step in range(begun + EVERY, task.steps + 1, EVERY):
            value = self.quality(settings, step)
            plant(task.path, step, value, self.accuracy)
            if not math.isfinite(value) and settings.stability.policy == "stop":
                return self._end(task, begun, {"status": "diverged", "step": step})
            if rung is not None and step >= rung:
                self.trained.append((task.title, begun, step))
                return "rung"
        row = {"name": "student", "nfe": 1, "metrics": {"accuracy": {"value": self.accuracy}}}
        return self._end(task, begun, {"status": "finished", "step": task.steps, "table": {"rows": [row]}})

    def _end(self, task: Task, begun: int, result: dict[str, Any]) -> str:
        self.trained.append((task.title, begun, result["step"]))
        (task.path / layout.RESULT).write_text(json.dumps(result))
        return "ended"

    def tune(self, plan: Plan, board: Board, ended: Callable[[Trial], object], slots: int, scratch: str) -> None:
        """What Ray Tune does for ``ablations.runner``, one trial after the other."""
        follow, scheduler = runner.Follow(plan, board, ended), runner._scheduler(plan)
        for number, task in enumerate(board.tasks.values()):
            self.begun.append(task.title)
            one = SimpleNamespace(trial_id=str(number), config={"task": task}, last_result={})
            scheduler.on_trial_add(None, one)
            follow.on_trial_start(0, [], one)
            try:
                _run(one, scheduler, plan.study.config.retries)
            except TrialError as error:
                one.pickled_error_file = Path(scratch, f"{number}.pkl")
                one.pickled_error_file.write_bytes(pickle.dumps(error))
                follow.on_trial_error(0, [], one)
            else:
                follow.on_trial_complete(0, [], one)


def plant(run: Path, step: int, value: float, accuracy: float) -> None:
    """One row of a run's log with its quality, and a checkpoint; its loss is not finite where that is not."""
    (run / layout.CHECKPOINTS / f"step-{step:08d}").mkdir(parents=True)
    row = {"iteration": step - 1, "step": step, names.VAL_QUALITY: runlog.encode(value)}
    row[names.val("accuracy", 1)] = accuracy
    broken = {} if math.isfinite(value) else {names.LOSS_TOTAL: runlog.encode(value)}
    _append(run / layout.LOG, row | {names.STEP_SECONDS: STEP_SECONDS} | broken)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _run(one: SimpleNamespace, scheduler: Any, retries: int) -> None:
    actor = RayTrial(one.config)
    while True:
        try:
            one.last_result = actor.step()
        except TrialError:
            if retries == 0:
                raise
            retries, actor = retries - 1, RayTrial(one.config)
            continue
        if one.last_result["done"]:
            return
        if scheduler.on_trial_result(None, one, one.last_result) == TrialScheduler.STOP:
            return
