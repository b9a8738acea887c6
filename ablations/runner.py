"""Ray Tune over the trials that the ledger lacks.

Nothing of a study's state lives in Ray: the ledger says what is finished and each run directory where it stands, so
whatever is killed, ``run`` again plans what is missing and goes on. Tune schedules, retries, halves and, on a
cluster, finds the machines. Ray's own files of an experiment are scratch and are removed.
"""

import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import wait
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from rich.console import Console

from ablations import cluster, ledger
from ablations.cluster import Machine
from ablations.display import Board, failure_lines, live
from ablations.ledger import TrialRecord
from ablations.plan import Plan, Trial
from ablations.study import Resources
from ablations.trial import RayTrial, Task, TrialError, pruned, record
from twinrl.commands.interrupt import asking, undisturbed
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine.background import in_background
from twinrl.machine.cluster import Watch, leave
from twinrl.run.environment import git_state
from twinrl.training.runs import dump

POLL_SECONDS = 0.2
Show: TypeAlias = Callable[[Board], AbstractContextManager[None]]


class Runner:
    """Runs plans, one after the other, in one Ray session that starts when the first trial has to.

    Arguments:
        machine: where. console: for what is said. show: shows a board while its trials run.

    *When to use*: as a context manager; leaving it ends the session, unless Ray was running before.
    """

    def __init__(self, machine: Machine, console: Console, show: Show = live):
        os.environ.update(cluster.QUIET_TUNE)
        self.machine, self.console, self.show = machine, console, show
        self.began, self.started, self.owns_session = time.time(), 0, False

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        if self.owns_session:
            with undisturbed():
                leave()

    def run(self, plan: Plan, ended: Callable[[Trial], object] | None = None) -> tuple[Plan, list[str]]:
        """Run what is missing of a plan, within its study's budget.

        Arguments:
            plan: what is wanted. ended: told about each trial that has got its result.

        Returns:
            The plan after that, and one line for each trial that failed.

        Raises:
            InputError: no trial was started: another study runs in this workspace, the ledger can't be written,
                the cluster is out of reach or too small.
            OSError: the workspace can't be written.
            LostError: Ray has gone; trials go on from their checkpoints when the study is run again.
        """
        with lock(plan.workspace.root):
            plan.workspace.ledger.check_writable()
            request = stop_request(plan)
            request.unlink(missing_ok=True)
            plan = _harvest(plan)
            budget = plan.study.config.budget
            trials = plan.missing[: None if budget.trials is None else max(0, budget.trials - self.started)]
            if not trials:
                return plan, []
            slots = self._slots(plan.study.config.resources)
            self.started += len(trials)
            deadline = None if budget.minutes is None else self.began + 60 * budget.minutes
            write_configurations(trials, plan)
            tasks = {trial.key: task_of(trial, plan, deadline) for trial in trials}
            board = Board(plan, tasks, self.console)
            with asking(request.touch), self._scratch(plan) as scratch, self.show(board):
                _tune(plan, board, ended or (lambda trial: None), slots, scratch)
            return plan.reread(), failure_lines(board.failures)

    def _scratch(self, plan: Plan) -> tempfile.TemporaryDirectory[str]:
        """A folder for Tune's own files: not on the workspace's disk, which may be full, unless machines share it."""
        shared = None if self.machine.address is None else plan.workspace.study_folder(plan.study).resolve()
        return tempfile.TemporaryDirectory(prefix="ray-", dir=shared, ignore_cleanup_errors=True)

    def _slots(self, resources: Resources) -> int:
        """How many trials fit at once; starts or joins Ray."""
        if not ray.is_initialized():
            self.owns_session = True  # also of one that is interrupted while it starts
            cluster.connect(self.machine, self.console)
        return cluster.slots(ray.nodes(), resources)


def lock(root: Path) -> AbstractContextManager[None]:
    """One study at a time in a workspace. Entering raises InputError where another process has it."""
    refusal = InputError(f"another study is running in {root}", fix="wait for it to end, or name another --root")
    return files.locked(root / ".lock", refusal)


def _harvest(plan: Plan) -> Plan:
    """Record runs that ended while nobody was left to write their line."""
    for trial in plan.missing:
        if trial.run.result is not None:
            plan.workspace.ledger.append(record(task_of(trial, plan)))
    return plan.reread()


def task_of(trial: Trial, plan: Plan, deadline: float | None = None) -> Task:
    """The trial as its process needs it."""
    folder = plan.workspace.study_folder(plan.study).resolve()
    run = trial.run.path
    output = folder / "outputs" / f"{trial.fingerprint[:8]}-{run.name}.txt"
    resources, stop = plan.study.config.resources, plan.study.config.stop
    steps = trial.settings.train.steps
    return Task(
        title=trial.title, config_hash=trial.config_hash, seed=trial.settings.seed, fingerprint=trial.fingerprint,
        sources=trial.sources, unused=trial.unused, revision=revision(), directory=str(run),
        config=str(_configuration(trial, folder)), output=str(output),
        ledger=str(plan.workspace.ledger.own.resolve()), cwd=str(Path.cwd()), steps=steps,
        metric=plan.study.config.metric, workers=resources.workers, threads=resources.cpus,
        stop=str(folder / "stop"), deadline=deadline,
        rungs=tuple(rungs(stop.grace_steps, stop.reduction, steps)) if stop.kind == "asha" else (),
    )  # fmt: skip


def write_configurations(trials: Iterable[Trial], plan: Plan) -> None:
    """Write what the trials' processes read. Seeds of an arm differ in one line."""
    folder, texts = plan.workspace.study_folder(plan.study).resolve(), dict[str, str]()
    for trial in trials:
        if trial.arm not in texts:
            texts[trial.arm] = dump(trial.settings, leave_out={"seed"})
            _configuration(trial, folder).parent.mkdir(parents=True, exist_ok=True)
        _configuration(trial, folder).write_text(f"{texts[trial.arm]}seed: {trial.settings.seed}\n")


def _configuration(trial: Trial, folder: Path) -> Path:
    return folder / "configs" / trial.fingerprint[:8] / f"{trial.run.path.name}.yaml"


@cache
def revision() -> str | None:
    """Git revision of the code, with a mark where files differ from it; provenance."""
    state = git_state(Path(__file__).parent)
    return None if state is None else f"{state['revision']}{'+changes' if state['dirty'] else ''}"


def rungs(grace: int, reduction: int, steps: int) -> Iterable[int]:
    """Steps at which successive halving decides: grace · reduction^k, below the run's end."""
    while grace < steps:
        yield grace
        grace *= reduction


# --- Ray --------------------------------------------------------------------------------------------------


def bundles(resources: Resources) -> list[dict[str, float]]:
    """One bundle for each process of a trial; they are placed on one machine."""
    gpus = {"GPU": resources.gpus} if resources.gpus else {}
    return [{"CPU": resources.cpus} | gpus] * resources.workers


def _tune(plan: Plan, board: Board, ended: Callable[[Trial], object], slots: int, scratch: str) -> None:
    """Run the board's trials to their ends."""
    config = plan.study.config
    placement = tune.PlacementGroupFactory(bundles(config.resources), strategy="STRICT_PACK")
    tuner = tune.Tuner(
        tune.with_resources(RayTrial, placement),
        param_space={"task": tune.grid_search(list(board.tasks.values()))},
        tune_config=tune.TuneConfig(scheduler=_scheduler(plan), reuse_actors=True, max_concurrent_trials=slots),
        run_config=tune.RunConfig(
            name="tune", storage_path=scratch, verbose=0,
            failure_config=tune.FailureConfig(max_failures=config.retries),
            callbacks=[Follow(plan, board, ended)],
        ),
    )  # fmt: skip
    watch = Watch(partial(cluster.fits, config.resources))
    work = in_background(tuner.fit)  # this thread has the signals
    while wait([work], POLL_SECONDS).not_done:
        watch.check()
        board.look()
    work.result()


def _scheduler(plan: Plan) -> Any:
    """Successive halving where the study asks for it (Li et al., arXiv:1810.05934); else first in, first out."""
    stop = plan.study.config.stop
    if stop.kind != "asha":
        return FIFOScheduler()
    longest = max(trial.settings.train.steps for trial in plan.trials)
    return ASHAScheduler(
        time_attr="step", metric="compared", mode="min", max_t=max(longest, stop.grace_steps),
        grace_period=stop.grace_steps, reduction_factor=stop.reduction, stop_last_trials=False,
    )  # fmt: skip


def stop_request(plan: Plan) -> Path:
    """The file whose existence asks the study's trials, wherever they run, to checkpoint and end."""
    return plan.workspace.study_folder(plan.study) / "stop"


def interrupted(plan: Plan) -> bool:
    """Whether the last run of the study was asked to stop."""
    return stop_request(plan).exists()


class Follow(tune.Callback):
    """Keeps the board, and the ledger's lines that no trial can write itself.

    Arguments:
        plan: what is run. board: shown meanwhile. ended: told about trials that have their result.
    """

    def __init__(self, plan: Plan, board: Board, ended: Callable[[Trial], object]):
        self.plan, self.board, self.ended = plan, board, ended
        self.trials = {trial.key: trial for trial in plan.trials}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune stores callbacks to restore an experiment, and these experiments are never restored."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.board.start(trial.config["task"].key)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        task, last = trial.config["task"], trial.last_result
        halved = last.get("reason") == "rung"
        if halved:
            _note(self.plan, task, pruned(task, last["step"]))
        self.board.end(task.key, "pruned" if halved else last.get("reason", "ended"))
        if task.ended:
            self.ended(self.trials[task.key])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        task, message = trial.config["task"], _message(trial.pickled_error_file)
        where = ledger.provenance(Path(task.directory), task.revision)
        failed = TrialRecord(task.config_hash, task.seed, task.fingerprint, "failed", message=message, where=where)
        _note(self.plan, task, failed)
        self.board.fail(task.key, message)


def _message(file: str | None) -> str:
    """What the exception that Tune stored in ``file`` says, in one line."""
    if file is None:
        return "the trial could not be started"
    error = pickle.loads(Path(file).read_bytes())
    if isinstance(error, ray.exceptions.RayActorError):
        return "its Ray worker died"
    cause = getattr(error, "cause", error)
    lines = str(cause).strip().splitlines() or [""]
    return (lines[-1] if isinstance(cause, TrialError) else f"{type(cause).__name__}: {lines[0]}")[:300]


def _note(plan: Plan, task: Task, outcome: TrialRecord) -> None:
    """A ledger line for a trial without a result; a full disk must not end the study."""
    try:
        plan.workspace.ledger.append(outcome)
    except OSError as error:
        print(f"{task.title} {outcome.status}; the ledger can't take the line: {error.strerror}", flush=True)
