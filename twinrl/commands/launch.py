"""``launch.workers=N``: the processes of a run, started by Ray Train on this machine or on a cluster.

Each worker does what a process of ``torchrun … -m twinrl train`` does: the same function, the same process group, the
same run directory. Nothing of a run's state lives in Ray: when a worker or its machine is lost, Ray Train starts all
of them again, and they resume from the run's newest checkpoint, as ``twinrl resume`` would. Ray's own files, the
request to stop and the workers' output lie in a scratch folder beside the run directories while it trains; the output
is kept in ``<run directory>/ranks/rank-<i>.txt``.
"""

import fcntl
import math
import os
import socket
import tempfile
import threading
import time
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from twinrl import cluster, schema
from twinrl.commands import program
from twinrl.commands.interrupt import asking
from twinrl.commands.train import FAILED, INTERRUPTED, resume, train
from twinrl.errors import InputError
from twinrl.fsdp import mesh
from twinrl.fsdp.config import LaunchConfig
from twinrl.runs import CONFIG, RunDirectory, dump
from twinrl.schema import RunConfig

RANKS = "ranks"
"""Folder of a run directory that keeps what each process printed."""
POLL_SECONDS, LOCK_PATIENCE_SECONDS = 0.2, 60
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No usage reports, no folders of its own."""


@dataclass(frozen=True)
class Task:
    """What a worker needs to know: plain values, because Ray sends them to other machines.

    Attributes:
        cwd: working directory of the command. run: the run directory. config: file with the configuration.
        fresh: delete an older run first. older: time stamp of that run's configuration, by which it is told from the
            one that an attempt of this launch has begun; None: whatever is found is resumed.
        output: folder of the workers' output. stop: its existence ends training with a checkpoint.
        error: file for the one line that says what was wrong with the input.
    """

    cwd: str
    run: str
    config: str
    fresh: bool
    older: int | None
    output: str
    stop: str
    error: str


def launch(settings: RunConfig, run: RunDirectory, fresh: bool | None, console: Console) -> int:
    """Train a run on the configured processes and wait for its end; the exit code.

    Arguments:
        settings: of the run, with ``launch``.
        run: its directory.
        fresh: of a new run: whether to delete an older one first; None: the run is there, to be continued.
        console: shows what the first process says.

    Raises:
        InputError: the input is wrong, or the cluster out of reach or too small.
    """
    if fresh is False:
        run.refuse_existing()
    with ExitStack() as stack:
        scratch = _scratch(stack, settings)
        task = _task(settings, run, fresh, scratch)
        gpus = _session(stack, settings)
        stack.callback(_keep_output, scratch, run)
        failure = _wait(_trainer(settings, task, gpus), task, console)
        if (error := Path(task.error)).exists():
            raise InputError(error.read_text())
    return _exit_code(run, failure, console)


def _scratch(stack: ExitStack, settings: RunConfig) -> Path:
    """A folder for what is of no use afterwards; all machines see it, as they see the run."""
    try:
        settings.run.dir.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(
            prefix=".launch-", dir=settings.run.dir.resolve(), ignore_cleanup_errors=True
        )
    except OSError as error:
        raise InputError(f"run.dir {settings.run.dir} cannot be written", got=error.strerror) from error
    return Path(stack.enter_context(made))


def _task(settings: RunConfig, run: RunDirectory, fresh: bool | None, scratch: Path) -> Task:
    (scratch / CONFIG).write_text(dump(settings))
    older = _stamp(run) if fresh else None
    return Task(
        str(Path.cwd()), str(run.path.resolve()), str(scratch / CONFIG), bool(fresh), older, str(scratch),
        str(scratch / "stop"), str(scratch / "error"),
    )  # fmt: skip


def _stamp(run: RunDirectory) -> int | None:
    """When the run's configuration was written; None where there is no run."""
    return (run.path / CONFIG).stat().st_mtime_ns if run.exists else None


def _output(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.txt"


def _keep_output(scratch: Path, run: RunDirectory) -> None:
    """Append what the processes printed to the run's own files, if there is a run."""
    if not run.exists:
        return
    (run.path / RANKS).mkdir(exist_ok=True)
    for found in sorted(scratch.glob("rank-*.txt")):
        with (run.path / RANKS / found.name).open("a") as kept:
            kept.write(found.read_text())


def _exit_code(run: RunDirectory, failure: BaseException | None, console: Console) -> int:
    result = run.result
    if result is not None:
        return FAILED if result["status"] == "diverged" else 0
    if failure is None:
        return INTERRUPTED  # the first process has said how to go on
    console.print(Text("failed:", "bold red"), f"{_said(failure)}; see {run.path / RANKS}")
    if run.exists:
        console.print(f"continue with: {program()} resume {run.path}")
    return FAILED


def _said(failure: BaseException) -> str:
    """The last line of the first worker's error, which is the cause of the others'."""
    causes = [str(cause) for _, cause in sorted(getattr(failure, "worker_failures", {}).items())]
    lines = [line.strip() for line in (causes[0] if causes else str(failure)).splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__


# --- Ray --------------------------------------------------------------------------------------------------------


def _session(stack: ExitStack, settings: RunConfig) -> bool:
    """Start or join Ray, until the stack is closed; whether the processes get a GPU each.

    Raises:
        InputError: the cluster is out of reach, or too small.
    """
    import ray

    wanted = settings.launch
    if not ray.is_initialized():
        environment = QUIET | {"PYTHONPATH": _python_path()}
        cluster.connect(wanted.address, math.ceil(wanted.workers * wanted.cpus), environment, "launch.address")
        stack.callback(ray.shutdown)
    there, device = ray.cluster_resources(), settings.machine.device
    gpus = device.startswith("cuda") or (device == "auto" and there.get("GPU", 0) > 0)
    for kind, needed in {"CPU": wanted.workers * wanted.cpus, "GPU": wanted.workers * gpus}.items():
        if needed > there.get(kind, 0):
            raise InputError(
                f"launch.workers={wanted.workers} need more {kind}s than there are", got=f"{there.get(kind, 0):g}",
                expected=f"{needed:g}", fix="use fewer processes, launch.cpus=…, or machine.device=cpu",
            )  # fmt: skip
    return gpus


def _python_path() -> str:
    """Where workers find this checkout, and classes of one's own beside the command."""
    here = [str(Path(__file__).resolve().parents[2]), str(Path.cwd())]
    return os.pathsep.join(dict.fromkeys([*here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))


def _trainer(settings: RunConfig, task: Task, gpus: bool) -> Any:
    """Ray Train's trainer around :func:`work`."""
    import torch
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRun
    from ray.train.torch import TorchConfig, TorchTrainer

    wanted: LaunchConfig = settings.launch
    each = {"CPU": wanted.cpus} | ({"GPU": 1.0} if gpus else {})
    return TorchTrainer(
        work,
        train_loop_config=asdict(task),
        torch_config=TorchConfig(backend=mesh.backend_of(torch.device("cuda" if gpus else "cpu"))),
        scaling_config=ScalingConfig(num_workers=wanted.workers, use_gpu=gpus, resources_per_worker=each),
        run_config=RayRun(
            name="train", storage_path=task.output, failure_config=FailureConfig(max_failures=wanted.retries)
        ),
    )


def _wait(trainer: Any, task: Task, console: Console) -> BaseException | None:
    """Train to the end, showing the first process's output; the failure, if there was one.

    Ray Train works in a thread of its own: in the main thread it would take Ctrl-C for itself.
    """
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:  # noqa: BLE001  reported below
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    with asking(Path(task.stop).touch), _Tail(_output(Path(task.output), 0), console) as tail:
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            tail.show()
    return failures[0] if failures else None


class _Tail:
    """Prints what is added to a file."""

    def __init__(self, path: Path, console: Console):
        self.path, self.console = path, console
        self.file: TextIO | None = None

    def __enter__(self) -> "_Tail":
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        if self.file is not None:
            self.file.close()

    def show(self) -> None:
        """Print what is new."""
        if self.file is None and self.path.exists():
            self.file = self.path.open()
        if self.file is not None and (text := self.file.read()):
            self.console.file.write(text)
            self.console.file.flush()


# --- a worker -----------------------------------------------------------------------------------------------------


def work(told: dict[str, Any]) -> None:
    """One process of the run, in a worker of Ray Train; see :class:`Task`.

    An :class:`InputError` is no failure that another attempt could mend: it is left for the launcher in a file.
    """
    task, rank = Task(**told), mesh.process_rank()
    os.chdir(task.cwd)
    with (
        _output(Path(task.output), rank).open("a", buffering=1) as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        output.write(f"rank {rank} of {mesh.world_size()}: process {os.getpid()} on {socket.gethostname()}\n")
        try:
            _work(task, Console(file=output, width=120, markup=False, emoji=False))
        except InputError as error:
            if rank == 0:
                Path(task.error).write_text(str(error))
        except BaseException:
            traceback.print_exc(file=output)
            raise


def _work(task: Task, console: Console) -> None:
    """Train, or resume what an earlier attempt has begun; all ranks see the same, since none has begun yet."""
    run, stop = RunDirectory(Path(task.run)), Path(task.stop)
    if (found := _stamp(run)) is not None and found != task.older:
        if mesh.process_rank() == 0:
            _wait_until_free(run)
        resume(run.path, console, stop)
    else:
        train(schema.load(task.config), task.fresh, console, stop)


def _wait_until_free(run: RunDirectory) -> None:
    """Return once no process holds the run's lock; a lost attempt's first process may take seconds to die."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with (run.path / CONFIG).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go on leaving the block
            except BlockingIOError:
                time.sleep(POLL_SECONDS)
            else:
                return
