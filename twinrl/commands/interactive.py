"""Runs from Python: what the commands do, as one object. ``twinrl.train`` and ``twinrl.load`` are these."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from twinrl.commands import inspect, processes
from twinrl.config.errors import InputError
from twinrl.machine import consoles
from twinrl.machine.pixels import as_uint8
from twinrl.run import layout
from twinrl.sampling import few_step
from twinrl.stability.events import Event
from twinrl.training import schema
from twinrl.training.opened import Judged, OpenedRun, open_run

if TYPE_CHECKING:
    import pandas as pd
    from PIL.Image import Image


@dataclass(frozen=True)
class Run:
    """A run directory, one that ``twinrl train`` or ``twinrl.watch`` has written.

    Attributes:
        path: of the directory.
        step: of a checkpoint instead of the newest.
    """

    path: Path
    step: int | None = None

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration, as plain nested values."""
        return layout.read_config(self.path)

    @property
    def log(self) -> "pd.DataFrame":
        """One row a step, a column for each metric; nan where it was not measured. Read anew each time."""
        import pandas as pd

        return pd.DataFrame.from_records(layout.read_rows(self.path))

    @property
    def events(self) -> list[Event]:
        """What went wrong, in order."""
        return [Event.from_dict(line) for line in layout.read_events(self.path)]

    @property
    def status(self) -> str:
        """finished, stopped, diverged, or unfinished."""
        return str((layout.read_result(self.path) or {}).get("status", "unfinished"))

    @cached_property
    def opened(self) -> OpenedRun:
        """Checkpoint, data and models, read when they are first needed. Raises InputError."""
        return open_run(self.path, self.step)

    def samples(self, prompt: str, n: int = 10, nfe: int = 1, seed: int = 0, best: bool = False) -> "list[Image]":
        """``n`` pictures of a prompt, each from its own noise.

        Arguments:
            prompt: what to draw. nfe: network evaluations a picture. seed: of the noise.
            best: by the sampler that ``twinrl sampler`` has found.

        Raises:
            InputError: the run has no checkpoint or no such data, or no sampler was searched.
        """
        from PIL import Image

        sampler = self.opened.sampler(nfe) if best else few_step(nfe)
        ((_, pixels),) = self.opened.sample([prompt], n, sampler, seed)
        return [Image.fromarray(picture) for picture in as_uint8(pixels)]

    def sample(self, prompt: str, nfe: int = 1, seed: int = 0, best: bool = False) -> "Image":
        """One picture of a prompt; arguments and errors as for :meth:`samples`."""
        return self.samples(prompt, 1, nfe, seed, best)[0]

    def evaluate(self, console: Console | None = None) -> Judged:
        """Judge the run's samples, as ``twinrl evaluate`` does: the table, written beside its pictures.

        Raises:
            InputError: the run has no checkpoint or no such data, or cannot be written.
        """
        return inspect.judge(self.opened, console or consoles.Console())


def load(run: "str | PathLike[str]", step: int | None = None) -> Run:
    """The run in a directory.

    Arguments:
        run: the directory. step: of a checkpoint instead of the newest.

    Raises:
        InputError: there is none.
    """
    path = Path(run)
    if not layout.is_run(path):
        raise InputError(f"{path} is not a run directory", expected=f"a folder with {layout.CONFIG}")
    return Run(path, step)


def train(
    config: str, settings: Mapping[str, Any] | None = None, *, seed: int | None = None, fresh: bool = False
) -> Run:
    """Train a new run to its end, as ``twinrl train`` does, with a progress bar. Ctrl-C writes a checkpoint first.

    Arguments:
        config: a preset or a YAML file.
        settings: key.path → value, such as ``{"train.steps": 500}``.
        seed: of the run; None: the configuration's.
        fresh: an older run of these settings goes.

    Raises:
        InputError: the configuration is wrong, or the run exists.
        RuntimeError: something from outside has ended it; what, is printed.
    """
    given = dict(settings or {}) | ({} if seed is None else {"seed": seed})
    made = schema.load(config, [f"{key}={json.dumps(value)}" for key, value in given.items()])
    code = processes.train(made, fresh, consoles.Console())
    run = Run(made.directory)
    if code and not layout.newest(made.directory / layout.CHECKPOINTS) and run.status == "unfinished":
        raise RuntimeError(f"training of {made.directory} has failed; the reason is printed above")
    return run
