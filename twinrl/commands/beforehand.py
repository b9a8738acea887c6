"""What a run needs of the disk, looked at before minutes are spent: its folder, its start, files that are named."""

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.training.runs import start_of
from twinrl.training.schema import RunConfig

READ = ("evaluation", "reward", "judges")
"""Sections whose paths are of files that are there already."""


def check(settings: RunConfig) -> None:
    """Raises InputError where the run's folder cannot be written, or what it starts from or reads is not there."""
    folder = settings.directory
    files.check_writable(folder, f"the run directory {folder}", "set run.dir to a writable folder")
    if settings.train.init not in ("teacher", "random"):
        start_of(settings.train.init).newest_checkpoint()
    for section in READ:
        for key, path in paths(getattr(settings, section), section):
            if not os.path.exists(path):
                raise InputError(f"{key} is not there", got=path, expected="a file or folder that is")


def paths(value: object, key: str) -> Iterator[tuple[str, Path]]:
    """Dotted key and value of every path in settings, in whatever they hold."""
    if isinstance(value, Path):
        yield key, value
    elif isinstance(value, BaseModel | dict):
        for name, each in dict(value).items():
            yield from paths(each, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from paths(each, f"{key}.{i}")
