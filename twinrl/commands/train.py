"""``twinrl train`` and ``twinrl resume``."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from twinrl import assembly
from twinrl.commands import pictures, program
from twinrl.commands.progress import ConsoleObserver, MLflowObserver
from twinrl.data.source import Source
from twinrl.errors import InputError
from twinrl.evaluation import FinalTable, Protocol, final_table
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig
from twinrl.tracking import runlog
from twinrl.tracking.mlflow_view import MLflowView
from twinrl.trainer import Outcome, Trainer

FAILED, INTERRUPTED = 1, 130


def train(settings: RunConfig, fresh: bool, console: Console) -> int:
    """Start a new run and train it to its end; the exit code."""
    run = RunDirectory(settings.directory)
    if not fresh:
        run.refuse_existing()
    device, source = machine_and_data(settings)  # before the directory, so that bad input leaves no half-made run
    run.start(settings, fresh)
    with run.locked():
        try:
            trainer = _trainer(settings, run, source, device)
        except InputError:
            run.discard()
            raise
        console.print(f"run directory [bold]{run.path}[/]")
        return _continue(trainer, console)


def resume(path: Path, console: Console) -> int:
    """Continue an unfinished run from its newest checkpoint; the exit code."""
    run = RunDirectory(path)
    settings = run.settings()
    if (result := run.result) is not None:
        console.print(f"{path} has {result['status']} after {result['step']} steps; nothing to resume")
        return 0
    with run.locked():
        device, source = machine_and_data(settings)
        return _continue(_trainer(settings, run, source, device), console)


def machine_and_data(settings: RunConfig) -> tuple[torch.device, Source]:
    """Device and data source; the number of threads is set on the way."""
    if settings.machine.threads:
        torch.set_num_threads(settings.machine.threads)
    device = assembly.device_of(settings)
    return device, assembly.load_source(settings, device)


def _trainer(settings: RunConfig, run: RunDirectory, source: Source, device: torch.device) -> Trainer:
    """The trainer in the state of the newest checkpoint, or at the start, of which the first pictures are drawn."""
    judges = assembly.held_out_rewards(settings, source, device)
    validator = pictures.Validator(Protocol(source, settings.evaluation, "validation", device, judges), run)
    trainer = Trainer(settings, run, source, device, validator)
    trainer.resume()
    if trainer.step == 0:
        validator.save_snapshot(trainer.objective.teacher.best, 0)
        pictures.save_times(trainer.times(), run.samples / "times.png")
    return trainer


def _continue(trainer: Trainer, console: Console) -> int:
    view = _view(trainer.settings, trainer.run)
    outcome = _train(trainer, view, console)
    return _conclude(trainer, outcome, view, console)


def _view(settings: RunConfig, run: RunDirectory) -> MLflowView | None:
    if not settings.tracking.mlflow:
        return None
    tags = {"config_hash": settings.hash, "seed": settings.seed}
    return MLflowView(run.path, settings.tracking.uri, experiment=settings.tracking.experiment, tags=tags)


def _train(trainer: Trainer, view: MLflowView | None, console: Console) -> Outcome:
    """The loop under a progress bar; Ctrl-C and SIGTERM end it at the next step, with a checkpoint."""
    if trainer.step:
        console.print(f"resuming at step {trainer.step}")
    with (
        ConsoleObserver(console, trainer.settings.train.steps, trainer.step) as shown,
        _interruptible(trainer),
    ):
        trainer.observers.append(shown)
        if view is not None:
            trainer.observers.append(MLflowObserver(view))
        return trainer.train()


@contextmanager
def _interruptible(trainer: Trainer) -> Iterator[None]:
    """SIGINT and SIGTERM ask the trainer to stop after the present step; a second one stops at once."""

    def ask(signum: int, frame: Any) -> None:
        trainer.interrupted = True  # and the system's own handlers, which a background job may have had switched off:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _conclude(trainer: Trainer, outcome: Outcome, view: MLflowView | None, console: Console) -> int:
    """Evaluate, draw, write the result and close the view; the exit code."""
    run = trainer.run
    if outcome.status == "interrupted":
        if view is not None:
            view.close("KILLED")
        console.print(
            f"interrupted at step {outcome.step}, checkpoint written; continue with: {program()} resume {run.path}"
        )
        return INTERRUPTED
    result: dict[str, Any] = {"status": outcome.status, "step": outcome.step, "message": outcome.message}
    if outcome.status != "diverged":
        table, grid = judge(trainer.settings, trainer.source, trainer.objective.teacher.best, run, console, run.samples)
        result["table"] = table.as_dict()
        console.print(table.rich())
        console.print(table.rich_scores())
        console.print(f"samples: {grid}")
    pictures.save_norms(run, run.samples / "norms.png")
    runlog.write_parquet(run.path)
    run.finish(result)
    if view is not None and view.close("FAILED" if outcome.status == "diverged" else "FINISHED"):
        console.print(f"curves and grids: {program()} ui {run.path.parent}")
    if outcome.status == "diverged":
        console.print(f"[bold red]diverged[/]: {outcome.message}; see {run.events}")
        return FAILED
    return 0


def judge(
    settings: RunConfig, source: Source, network: torch.nn.Module, run: RunDirectory, console: Console, folder: Path
) -> tuple[FinalTable, Path]:
    """The final table on the test split; sample grids, diversity and curves go to ``folder``."""
    device = next(network.parameters()).device
    with console.status("judging samples of the student and its teacher on the test split"):
        judges = assembly.held_out_rewards(settings, source, device)
        protocol = Protocol(source, settings.evaluation, "test", device, judges)
        network = pictures.in_single_precision(network)
        from_teacher = settings.train.init == "teacher"
        teacher = assembly.pretrained_teacher(settings, source, device) if from_teacher else None
        table = final_table(protocol, network, teacher)
        grid = pictures.save_final(protocol, network, run, folder)
    return table, grid
