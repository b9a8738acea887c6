"""Training in one process of a run, from its start or its newest checkpoint to its final table."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from twinrl.commands import program, starts
from twinrl.commands.failures import FAILED, in_one_line
from twinrl.commands.interrupt import asking
from twinrl.commands.progress import ConsoleObserver, MLflowObserver, judging
from twinrl.config.errors import InputError
from twinrl.evaluation import figures
from twinrl.flow.branches import allocate
from twinrl.flow.source import Data
from twinrl.fsdp import mesh, restart
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.run import layout
from twinrl.tracking.mlflow_view import MLflowView
from twinrl.training import assembly, pictures
from twinrl.training.opened import OpenedRun
from twinrl.training.runs import RunDirectory
from twinrl.training.schema import RunConfig
from twinrl.training.trainer import Outcome, Trainer

INTERRUPTED = 130


@in_one_line
def train(settings: RunConfig, fresh: bool, console: Console, stop: Path | None = None) -> int:
    """Start a new run and train it to its end; the exit code. A launcher's restart of it goes on.

    Arguments:
        settings: of the run. fresh: delete an older one first.
        console: of this process, quiet in all but the first.
        stop: training ends with a checkpoint once this file exists, as after Ctrl-C.
    """
    run = RunDirectory(settings.directory)
    with _launched(settings) as (ranks, device), ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(run.locked(restart.patience())))
        launchers = ranks.gathered(restart.launch())
        goes_on = ranks.anywhere(ranks.first and run.begun_by(launchers))
        if goes_on and ranks.anywhere(ranks.first and run.result is not None):
            return _ended(run, _of_rank(console, ranks))
        if not fresh and not goes_on:
            ranks.on_first(run.refuse_existing)
        if not goes_on:
            ranks.on_first(run.refuse_remains)
        source = ranks.together(lambda: assembly.load_source(settings, device))  # bad input leaves no half-made run
        begin = run.joined_by if goes_on else partial(run.start, settings, fresh)
        ranks.on_first(lambda: begin(launchers))
        console = _of_rank(console, ranks)
        try:
            trainer, validator = _trainer(settings, run, source, device, stack, ranks)
        except (InputError, OSError):
            if ranks.first and not goes_on:
                run.discard()
            raise
        console.print("run directory", Text(str(run.path), "bold"))
        return _continue(trainer, validator, console, stop)


@in_one_line
def resume(path: Path, console: Console, stop: Path | None = None) -> int:
    """Continue an unfinished run from its newest checkpoint; the exit code. ``stop`` as for :func:`train`."""
    run = RunDirectory(path)
    settings = run.settings()
    if _over(run, console):  # which may be told of a run that cannot be written
        return 0
    with _launched(settings) as (ranks, device), ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(run.locked(restart.patience())))
        settings = ranks.together(run.settings)  # what is read before the lock may be another process's to change
        if ranks.together(lambda: _over(run, _of_rank(console, ranks))):
            return 0
        source = ranks.together(lambda: assembly.load_source(settings, device))
        trainer, validator = _trainer(settings, run, source, device, stack, ranks)
        return _continue(trainer, validator, _of_rank(console, ranks), stop)


def _over(run: RunDirectory, console: Console) -> bool:
    """Whether the run has ended; says so."""
    if (result := run.result) is None:
        return False
    console.print(f"{run.path} has {result['status']} after {result['step']} steps; nothing to resume")
    return True


@contextmanager
def _launched(settings: RunConfig) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that train together, as torchrun has started them, and this one's device."""
    device = mesh.local_device(assembly.machine_of(settings))
    assembly.check_options(settings, device)
    if mesh.world_size() == 1:
        yield ALONE, device
        return
    from twinrl.fsdp.sharded import Sharded, check_equal_shares
    from twinrl.fsdp.watchdog import Progress, watching

    check_equal_shares(allocate(settings.branches, settings.train.batch), mesh.world_size())
    if settings.train.precision == "float64":
        raise InputError("train.precision=float64 is for one process", fix="use float32, or start without torchrun")
    low = torch.bfloat16 if settings.train.precision == "bf16" else None
    progress = Progress()
    with mesh.process_group(device), watching(settings.fsdp.watchdog, progress):
        backend = settings.machine.compile
        yield Sharded(settings.fsdp, device, low_precision=low, progress=progress, backend=backend), device


def _ended(run: RunDirectory, console: Console) -> int:
    """Of a launcher that has restarted a run when it was over: the exit code as before."""
    result = run.result
    assert result is not None
    console.print(f"{run.path} has {result['status']} after {result['step']} steps")
    return FAILED if result["status"] == "diverged" else 0


def _of_rank(console: Console, ranks: Ranks) -> Console:
    return console if ranks.first else Console(quiet=True)


def _trainer(
    settings: RunConfig, run: RunDirectory, source: Data, device: torch.device, stack: ExitStack, ranks: Ranks
) -> tuple[Trainer, pictures.Validator]:
    """The trainer in the state of the newest checkpoint, or at the start, of which it draws; and who draws its run.

    Every process takes part in making samples; what other than the first one draws of them is thrown away.
    """
    shown = run if ranks.first else _scratch(stack)
    validator = pictures.Validator(assembly.provider_of(settings, source, device, ranks), shown)
    trainer = Trainer(settings, run, source, device, validator, ranks=ranks)
    trainer.resume()
    if trainer.step == 0:
        _take_start(trainer, validator)
        validator.save_snapshot(trainer.objective.teacher.best, 0)
        figures.save_times(trainer.times(), shown.samples / "times.png")
        if (renoise := trainer.settings.renoise) is not None:
            times = trainer.feed.renoise_times(trainer.settings.seed)
            figures.save_renoise(times, renoise.placement, shown.samples / "renoise.png")
    return trainer, validator


def _take_start(trainer: Trainer, validator: pictures.Validator) -> None:
    """Have the start weights evaluated, or what they were evaluated to before, and the run measured against that."""
    network = trainer.objective.teacher.best
    start = starts.evaluated(
        trainer.settings, trainer.source.content_hash,
        lambda: validator.protocol.evaluate(validator.judged(network)), trainer.ranks,
    )  # fmt: skip
    if start is not None:
        trainer.begin(start)
        trainer.ranks.on_first(lambda: trainer.run.keep_start(start))


def _scratch(stack: ExitStack) -> RunDirectory:
    scratch = RunDirectory(Path(stack.enter_context(tempfile.TemporaryDirectory())))
    scratch.samples.mkdir()
    return scratch


def _continue(trainer: Trainer, validator: pictures.Validator, console: Console, stop: Path | None) -> int:
    view = _view(trainer.settings, trainer.run) if trainer.ranks.first else None
    if stop is not None:
        trainer.asked_to_stop = stop.exists
    try:
        outcome = _train(trainer, view, console)
        return _conclude(trainer, validator, outcome, view, console)
    except KeyboardInterrupt:
        return _broken_off(trainer, console)


def _broken_off(trainer: Trainer, console: Console) -> int:
    """After a second Ctrl-C: say what is on disk; the exit code tells whether it is all."""
    path, newest = trainer.run.path, layout.newest(trainer.run.checkpoints)
    whole = trainer.saver.newest == trainer.iteration and trainer.saver.pending is None
    kept = "the start" if newest is None else f"the checkpoint of step {layout.step_of(newest)}"
    lost = "" if whole else f"; what came after {kept} is lost"
    console.print(f"stopped at once, at step {trainer.step}{lost}; continue with: {program()} resume {path}")
    return INTERRUPTED if whole else FAILED


def _view(settings: RunConfig, run: RunDirectory) -> MLflowView | None:
    if not settings.tracking.mlflow:
        return None
    tags = {"config_hash": settings.hash, "seed": settings.seed}
    return MLflowView(run.path, settings.tracking.uri, experiment=settings.tracking.experiment, tags=tags)


def _train(trainer: Trainer, view: MLflowView | None, console: Console) -> Outcome:
    """The loop under a progress bar; Ctrl-C and SIGTERM end it at the next step, with a checkpoint."""
    if trainer.step:
        console.print(f"resuming at step {trainer.step}")
    with asking(lambda: setattr(trainer, "interrupted", True)), ExitStack() as stack:
        if trainer.ranks.first:
            shown = ConsoleObserver(console, trainer.settings.train.steps, trainer.step)
            trainer.observers.append(stack.enter_context(shown))
        if view is not None:
            trainer.observers.append(MLflowObserver(view))
        return trainer.train()


def _conclude(
    trainer: Trainer, validator: pictures.Validator, outcome: Outcome, view: MLflowView | None, console: Console
) -> int:
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
        with ExitStack() as stack:
            folder = run.samples if trainer.ranks.first else _scratch(stack).samples
            best = trainer.objective.teacher.best
            with judging(console):
                judged = OpenedRun.trained(run, trainer.provider, best, folder).judge()
        console.print(*judged.rich())
        result["table"] = judged.table.as_dict()
    if trainer.ranks.first:
        validator.save_course(layout.read_rows(run.path), layout.read_events(run.path))
        layout.write_metrics(run.path)
        run.finish(result)
    if view is not None and view.close("FAILED" if outcome.status == "diverged" else "FINISHED"):
        console.print(f"curves and grids: {program()} ui {run.path.parent}")
    failure = trainer.monitor.divergence.outcome
    if outcome.status != "diverged" and failure is not None:
        console.print(Text("failed:", "bold red"), f"{failure.message}{'; it recovered' if failure.recovered else ''}")
    if outcome.status == "diverged":
        console.print(Text("diverged:", "bold red"), f"{outcome.message}; see {run.events}")
        return FAILED
    return 0
