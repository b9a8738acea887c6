"""``twinrl train`` and ``twinrl resume``: in this process, or in those that ``launch.workers`` asks for."""

from pathlib import Path

from rich.console import Console

from twinrl.commands import beforehand
from twinrl.commands import train as process
from twinrl.commands.failures import in_one_line
from twinrl.commands.launch import launch
from twinrl.fsdp import mesh
from twinrl.training.runs import RunDirectory, note_named
from twinrl.training.schema import RunConfig


@in_one_line
def train(settings: RunConfig, fresh: bool, console: Console) -> int:
    """Start a new run and train it to its end; the exit code. ``fresh`` deletes an older one first."""
    beforehand.check(settings)
    note_named(settings)
    if _launched_from_here(settings):
        return launch(settings, RunDirectory(settings.directory), fresh, console)
    return process.train(settings, fresh, console)


@in_one_line
def resume(path: Path, console: Console) -> int:
    """Continue an unfinished run from its newest checkpoint; the exit code."""
    run = RunDirectory(path)
    settings, goes_on = run.settings(), run.result is None
    if goes_on and mesh.process_rank() == 0:
        run.check_own(settings)
    if _launched_from_here(settings) and goes_on:
        return launch(settings, run, None, console)
    return process.resume(path, console)


def _launched_from_here(settings: RunConfig) -> bool:
    return settings.launch.wanted and not mesh.launched()
