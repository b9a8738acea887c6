"""``launch.workers=N``: the processes of a run, started by Ray Train on this machine or on a cluster.

Each worker does what a process of ``torchrun … -m twinrl train`` does: the same function, the same process group, the
same run directory. Nothing of a run's state lives in Ray: when a worker or its machine is lost, Ray Train starts all
of them again, and the run goes on as after a restart of torchrun's (:mod:`twinrl.fsdp.restart`). Ray's own files, the
request to stop and the workers' output lie in a scratch folder beside the run directories while it trains; the output
is kept in ``<run directory>/ranks/rank-<i>.txt``.
"""

import math
import os
import socket
import tempfile
import traceback
from concurrent.futures import Future, wait
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from twinrl import config
from twinrl.commands import program
from twinrl.commands.interrupt import asking, undisturbed
from twinrl.commands.train import FAILED, resume, train
from twinrl.config.components import failures_named
from twinrl.config.errors import InputError
from twinrl.fsdp import mesh, restart
from twinrl.machine import cluster
from twinrl.machine.background import in_background
from twinrl.run.layout import RANKS
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig

STOP, BEGUN = "stop", "begun"
"""Files whose existence ends training, and says that this is not its first attempt."""
POLL_SECONDS, LOCK_PATIENCE_SECONDS = 0.2, 60


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
        gpus = _session(stack, settings)
        told = {
            "cwd": str(Path.cwd()), "scratch": str(scratch), "run": str(run.path), "fresh": fresh,
            "settings": settings.model_dump(mode="json"),
        }  # fmt: skip
        trained = in_background(_trainer(settings, told, gpus).fit)
        try:
            _follow(trained, scratch, console)
        except cluster.LostError as error:
            return _failed(str(error), run, console)
        finally:
            if not _refused(trained):
                _keep_output(scratch, run)
    return _exit_code(trained, run, console)


def _refused(trained: "Future[Any]") -> bool:
    """Whether the input was wrong, so that nothing was trained, and nothing may have changed."""
    return trained.done() and trained.exception() is None and isinstance(trained.result().return_value, str)


def _exit_code(trained: "Future[Any]", run: RunDirectory, console: Console) -> int:
    """What the first process returned, see :func:`work`. Raises InputError where that is a line about the input."""
    if (failure := trained.exception()) is None:
        outcome: int | str = trained.result().return_value
        if isinstance(outcome, str):
            raise InputError(outcome)
        return outcome
    return _failed(f"{_said(failure)}; see {run.path / RANKS}", run, console)


def _failed(why: str, run: RunDirectory, console: Console) -> int:
    console.print(Text("failed:", "bold red"), why)
    if run.exists:
        console.print(f"continue with: {program()} resume {run.path}")
    return FAILED


def _scratch(stack: ExitStack, settings: RunConfig) -> Path:
    """A folder for what is of no use afterwards; all machines see it, as they see the run."""
    folder = settings.run.dir.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".launch-", dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise InputError(f"run.dir {settings.run.dir} cannot be written", got=error.strerror) from error
    return Path(stack.enter_context(made))


def _session(stack: ExitStack, settings: RunConfig) -> bool:
    """Start or join Ray, until the stack is closed; whether the processes get a GPU each.

    Raises:
        InputError: the cluster is out of reach, or too small.
    """
    import ray

    wanted = settings.launch
    if not ray.is_initialized():
        cluster.connect(wanted.address, math.ceil(wanted.workers * wanted.cpus), "launch.address")
        stack.callback(undisturbed()(cluster.leave))
    there, device = ray.cluster_resources(), settings.machine.device
    gpus = device.startswith("cuda") or (device == "auto" and there.get("GPU", 0) > 0)
    for kind, needed in {"CPU": wanted.workers * wanted.cpus, "GPU": wanted.workers * gpus}.items():
        if needed > there.get(kind, 0):
            raise InputError(
                f"launch.workers={wanted.workers} need more {kind}s than there are", got=f"{there.get(kind, 0):g}",
                expected=f"{needed:g}", fix="use fewer processes, launch.cpus=…, or machine.device=cpu",
            )  # fmt: skip
    return gpus


def _trainer(settings: RunConfig, told: dict[str, Any], gpus: bool) -> Any:
    """Ray Train's trainer around :func:`work`."""
    import torch
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRun
    from ray.train.torch import TorchConfig, TorchTrainer

    wanted = settings.launch
    each = {"CPU": wanted.cpus} | ({"GPU": 1.0} if gpus else {})
    return TorchTrainer(
        work,  # type: ignore[arg-type]  # what it returns is what fit() returns
        train_loop_config=told,
        torch_config=TorchConfig(backend=mesh.backend_of(torch.device("cuda" if gpus else "cpu"))),
        scaling_config=ScalingConfig(num_workers=wanted.workers, use_gpu=gpus, resources_per_worker=each),
        run_config=RayRun(
            name="train", storage_path=told["scratch"], failure_config=FailureConfig(max_failures=wanted.retries)
        ),
    )


def _follow(trained: "Future[Any]", scratch: Path, console: Console) -> None:
    """Show what the first process says until all have ended. Ctrl-C asks them for a checkpoint.

    Ray Train works in a thread of its own: in the main thread it would take Ctrl-C for itself.
    """
    output, running = _output(scratch, 0), True
    output.touch()
    with output.open() as said, asking((scratch / STOP).touch):
        watch = cluster.Watch()
        while running:
            watch.check()
            running = bool(wait([trained], POLL_SECONDS).not_done)
            console.file.write(said.read())
            console.file.flush()


def _output(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.txt"


def _keep_output(scratch: Path, run: RunDirectory) -> None:
    """Append what the processes printed to the run's own files, if there is a run."""
    if not run.exists:
        return
    (run.path / RANKS).mkdir(exist_ok=True)
    for found in scratch.glob("rank-*.txt"):
        with (run.path / RANKS / found.name).open("a") as kept:
            kept.write(found.read_text())


def _said(failure: BaseException) -> str:
    """The last line of the first worker's error, which is the cause of the others'."""
    causes = [str(cause) for _, cause in sorted(getattr(failure, "worker_failures", {}).items())]
    lines = [line.strip() for line in (causes or [str(failure)])[0].splitlines() if line.strip()]
    return lines[-1] if lines else type(failure).__name__


def work(told: dict[str, Any]) -> int | str:
    """One process of the run, in a worker of Ray Train.

    Arguments:
        told: plain values, because Ray sends them to other machines: the command's working directory, the scratch
            folder, whose name tells the launch from others, and :func:`launch`'s run directory, settings and ``fresh``.

    Returns:
        The exit code; the line that says what was wrong with the input, which another attempt would not mend.
    """
    rank = mesh.process_rank()
    os.chdir(told["cwd"])
    with (
        _output(Path(told["scratch"]), rank).open("a", buffering=1) as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        output.write(f"rank {rank} of {mesh.world_size()}: process {os.getpid()} on {socket.gethostname()}\n")
        try:
            with failures_named():
                return _work(told, Console(file=output, width=120, markup=False, emoji=False))
        except InputError as error:
            return str(error)
        except BaseException:
            traceback.print_exc()
            raise


def _work(told: dict[str, Any], console: Console) -> int:
    run, fresh, stop = RunDirectory(Path(told["run"])), told["fresh"], Path(told["scratch"], STOP)
    os.environ[restart.LAUNCH] = told["scratch"]
    begun = Path(told["scratch"], BEGUN)
    if mesh.process_rank() == 0:
        if fresh is None or begun.exists():
            with run.locked(LOCK_PATIENCE_SECONDS):
                pass  # a lost attempt's first process may take seconds to die
        begun.touch()
    if fresh is None:
        return resume(run.path, console, stop)
    return train(config.validate(RunConfig, told["settings"]), fresh, console, stop)
