"""Several runs in one process: each begun, resumed or left alone as its directory says, with batched network calls."""

import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console

from twinrl import assembly
from twinrl.commands import train as single
from twinrl.commands.interrupt import asking
from twinrl.data.source import Data
from twinrl.errors import InputError
from twinrl.packed import Abandoned, Member, Networks, check_packed
from twinrl.runs import RunDirectory
from twinrl.schema import RunConfig


@dataclass
class Stop:
    """An observer of every run: once it is asked for, each ends after its present step, with a checkpoint."""

    asked: bool = False

    def watching(self, trainer: Any) -> "StopOne":
        """The observer for one trainer."""
        return StopOne(self, trainer)


@dataclass
class StopOne:
    """Hands a request to stop on to its trainer."""

    stop: Stop
    trainer: Any

    def after_step(self, row: object) -> None:
        """Look for the request."""
        self.trainer.interrupted |= self.stop.asked

    def after_checkpoint(self, offset: int) -> None:
        """Nothing to do."""

    def after_event(self, event: object) -> None:
        """Nothing to do."""


def train(runs: Sequence[RunConfig], consoles: Sequence[Console]) -> list[int]:
    """Train runs to their ends; each one's exit code, as of ``twinrl train`` or ``resume``.

    Arguments:
        runs: their configurations, with different directories and equal networks; normally seeds of one arm.
        consoles: where each one says what it does, and why it failed.

    Raises:
        InputError: these runs can't be packed. What is wrong with one of them is that one's, and on its console.
    """
    for settings in runs:
        check_packed(settings)
    _check_shared(runs)
    device = single._device(runs[0])
    source = assembly.load_source(runs[0], device)
    networks, stop = Networks(len(runs)), Stop()
    bodies = [
        partial(_run, settings, source, device, Member(networks, number), console, stop)
        for number, (settings, console) in enumerate(zip(runs, consoles, strict=True))
    ]
    with asking(lambda: setattr(stop, "asked", True)):
        ended = networks.rendezvous.run(bodies)
    return [single.FAILED if one.value is None else one.value for one in ended]


def train_seeds(settings: RunConfig, number: int, fresh: bool, console: Console) -> int:
    """``twinrl train --seeds``: begin or go on with seeds ``seed`` … ``seed + number − 1``; the first bad exit code.

    What each one prints goes into ``<run directory>.txt``.

    Raises:
        InputError: they can't be packed, or are to start afresh.
    """
    if fresh:
        raise InputError(
            "--fresh and --seeds don't go together", got=f"--seeds {number}",
            fix="the same command goes on with what is unfinished; delete run directories by hand",
        )  # fmt: skip
    runs = [settings.model_copy(update={"seed": settings.seed + i}) for i in range(number)]
    outputs = [run.directory.with_name(f"{run.directory.name}.txt") for run in runs]
    with ExitStack() as stack:
        for path in outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
        files = [stack.enter_context(path.open("a", buffering=1)) for path in outputs]
        console.print(f"{number} seeds in one process; their outputs: {outputs[0]}, …")
        codes = train(runs, [Console(file=file, soft_wrap=True) for file in files])
    for run, code, path in zip(runs, codes, outputs, strict=True):
        found = RunDirectory(run.directory).result
        ended = f"{found['status']} after {found['step']} steps" if found else f"unfinished, exit code {code}"
        console.print(f"seed {run.seed}: {ended}; {path}")
    return next((code for code in codes if code), 0)


def _check_shared(runs: Sequence[RunConfig]) -> None:
    """Raises InputError where runs differ in what they share: the data, the device and its threads."""
    for settings in runs:
        if (settings.data, settings.machine) != (runs[0].data, runs[0].machine):
            raise InputError(
                "packed runs share their data and device", got=f"{settings.name} with another data or machine",
                fix="pack seeds of one configuration",
            )  # fmt: skip


def _run(settings: RunConfig, source: Data, device: torch.device, member: Member, console: Console, stop: Stop) -> int:
    """One run in its own thread."""
    try:
        return _go_on(settings, source, device, member, console, stop)
    except InputError as error:
        console.print(f"twinrl: {error}", markup=False)
        return 2
    except Abandoned:
        raise
    except Exception:  # noqa: BLE001 - the other runs go on
        console.print(traceback.format_exc(), markup=False)
        return single.FAILED


def _go_on(
    settings: RunConfig, source: Data, device: torch.device, member: Member, console: Console, stop: Stop
) -> int:
    run = RunDirectory(settings.directory)
    if run.result is not None:
        return single._ended(run, console)
    with ExitStack() as stack:
        begun = run.exists
        if not begun:
            run.start(settings, fresh=False)
        stack.enter_context(run.locked())
        try:
            trainer = single._trainer(settings, run, source, device, stack, member)
        except InputError:
            if not begun:
                run.discard()
            raise
        console.print(f"run directory [bold]{run.path}[/]")
        trainer.observers.append(stop.watching(trainer))
        return single._continue(trainer, console, None)
