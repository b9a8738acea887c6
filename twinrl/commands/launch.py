"""``launch.workers=N``: the processes of a run, started by Ray Train on this machine or on a cluster.

Ray Train places the workers, forms their process group and starts all of them again where one is lost. Each does what
a process of ``torchrun … -m twinrl train`` does, so the run goes on as after a restart of torchrun's
(:mod:`twinrl.fsdp.restart`). Ray Train's own files, the request to stop and the workers' output lie in a scratch folder
beside the run directories while it trains; the output is kept in ``<run directory>/ranks/rank-<i>.txt``.
"""

import math
import os
import socket
from concurrent.futures import Future, wait
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
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
from twinrl.machine import cluster, consoles
from twinrl.machine.background import in_background
from twinrl.machine.streams import show_traceback
from twinrl.run.layout import RANKS
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig

OUTPUT, STOP, POLL_SECONDS = "rank-{}.txt", "stop", 0.2


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
        (folder := settings.run.dir.resolve()).mkdir(parents=True, exist_ok=True)  # all machines see it
        made = TemporaryDirectory(prefix=".launch-", dir=folder, ignore_cleanup_errors=True)
        scratch = Path(stack.enter_context(made))
        plain = settings.model_dump(mode="json")
        told = {"cwd": os.getcwd(), "scratch": str(scratch), "run": str(run.path), "settings": plain, "fresh": fresh}
        trained = in_background(_trainer(stack, settings, told).fit)  # in the main thread it would take Ctrl-C
        try:
            _follow(trained, scratch, console)
            failure = trained.exception()
        except cluster.LostError as error:
            failure = error
        finally:
            _keep_output(scratch, run)
    if failure is not None:
        return _failed(failure, run, console)
    if isinstance(outcome := trained.result().return_value, InputError):
        raise outcome
    return outcome


def _failed(failure: BaseException, run: RunDirectory, console: Console) -> int:
    first = min(getattr(failure, "worker_failures", {0: failure}).items())[1]  # the cause of the others'
    said = str(first).strip().splitlines() or [type(first).__name__]
    console.print(Text("failed:", "bold red"), f"{said[-1].strip()}; see {run.path / RANKS}")
    if run.exists:
        console.print(f"continue with: {program()} resume {run.path}")
    return FAILED


def _trainer(stack: ExitStack, settings: RunConfig, told: dict[str, Any]) -> Any:
    """Ray Train's trainer around :func:`work`; its Ray is started or joined until the stack is closed.

    Raises:
        InputError: the cluster is out of reach, or too small: Ray Train would wait for it to grow.
    """
    import ray
    import torch
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRun
    from ray.train.torch import TorchConfig, TorchTrainer

    wanted, device = settings.launch, settings.machine.device
    if not ray.is_initialized():
        cluster.connect(wanted.address, math.ceil(wanted.workers * wanted.cpus), "launch.address")
        stack.callback(undisturbed()(cluster.leave))
    there = ray.cluster_resources()
    gpus = device.startswith("cuda") or (device == "auto" and there.get("GPU", 0) > 0)
    scaling = ScalingConfig(num_workers=wanted.workers, use_gpu=gpus, resources_per_worker={"CPU": wanted.cpus})
    for kind, needed in scaling.total_resources.items():
        if needed > there.get(kind, 0):
            raise InputError(
                f"launch.workers={wanted.workers} need more {kind}s than there are", got=f"{there.get(kind, 0):g}",
                expected=f"{needed:g}", fix="use fewer processes, launch.cpus=…, or machine.device=cpu",
            )  # fmt: skip
    return TorchTrainer(
        work,  # type: ignore[arg-type]  # what it returns is what fit() returns
        train_loop_config=told,
        torch_config=TorchConfig(backend=mesh.backend_of(torch.device("cuda" if gpus else "cpu"))),
        scaling_config=scaling,
        run_config=RayRun("train", told["scratch"], failure_config=FailureConfig(wanted.retries)),
    )


def _follow(trained: "Future[Any]", scratch: Path, console: Console) -> None:
    """Show what the first process says until all have ended. Ctrl-C asks them for a checkpoint."""
    output, running = scratch / OUTPUT.format(0), True
    output.touch()
    with output.open() as said, asking((scratch / STOP).touch):
        watch = cluster.Watch()
        while running:
            watch.check()
            running = bool(wait([trained], POLL_SECONDS).not_done)
            console.file.write(said.read())
            console.file.flush()


def _keep_output(scratch: Path, run: RunDirectory) -> None:
    """Append what the processes printed to the run's own files, if there is a run."""
    printed = {file.name: text for file in scratch.glob(OUTPUT.format("*")) if (text := file.read_text())}
    for name, text in printed.items() if run.exists else ():
        (run.path / RANKS).mkdir(exist_ok=True)
        with (run.path / RANKS / name).open("a") as kept:
            kept.write(text)


def work(told: dict[str, Any]) -> int | InputError:
    """One process of the run, in a worker of Ray Train.

    Arguments:
        told: plain values, because Ray sends them to other machines: the command's working directory, the scratch
            folder, whose name tells the launch from others, and :func:`launch`'s run directory, settings and ``fresh``.

    Returns:
        The exit code; what was wrong with the input, which another attempt would not mend.
    """
    os.chdir(told["cwd"])
    os.environ[restart.LAUNCH] = told["scratch"]
    rank, scratch = mesh.process_rank(), Path(told["scratch"])
    with (
        (scratch / OUTPUT.format(rank)).open("a", buffering=1) as output,
        redirect_stdout(output),
        redirect_stderr(output),
    ):
        before = output.tell()
        output.write(f"rank {rank} of {mesh.world_size()}: process {os.getpid()} on {socket.gethostname()}\n")
        console = consoles.Console(file=output, width=120, markup=False, emoji=False)
        try:
            with failures_named():
                if told["fresh"] is None:
                    return resume(Path(told["run"]), console, scratch / STOP)
                return train(config.validate(RunConfig, told["settings"]), told["fresh"], console, scratch / STOP)
        except InputError as error:
            output.truncate(before)  # of a run whose training is refused nothing is to change
            return error
        except BaseException as error:
            show_traceback(error)
            raise
