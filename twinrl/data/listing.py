"""The files of a folder as people have them: hidden ones are passed over, links to folders are followed once."""

import os
from collections.abc import Collection
from pathlib import Path, PurePath

from twinrl.config.errors import InputError
from twinrl.data.problems import UNREADABLE, Problem


def below(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Every file in a folder and its subfolders, sorted, and what could not be entered.

    A folder that is reached in several ways, or that links back to one above it, is entered once: by its own path
    where it lies in ``folder``, else by the first link to it. Names that begin with a dot are passed over, as Finder's
    ``._*`` and ``.DS_Store``.

    Raises:
        InputError: ``folder`` itself cannot be read.
    """
    files: list[Path] = []
    problems: list[Problem] = []
    entered: set[tuple[int, int]] = set()
    coming: list[Path] = [folder]
    links: list[Path] = []
    while coming or links:
        here = coming.pop() if coming else links.pop(0)
        try:
            if (identity := _identity(here)) in entered:
                continue
            entered.add(identity)
            entries = [here / name for name in sorted(os.listdir(here)) if not hidden(name)]
        except OSError as error:
            if here == folder:
                raise InputError(f"{folder} cannot be read", got=error.strerror, fix="check its rights") from error
            problems.append(Problem(here.relative_to(folder).as_posix(), UNREADABLE, error.strerror or ""))
            continue
        for entry in entries:
            if os.path.isdir(entry):
                (links if entry.is_symlink() else coming).append(entry)
            elif os.path.isfile(entry):
                files.append(entry)
            else:
                kind = "a broken link" if entry.is_symlink() else "no regular file"
                problems.append(Problem(entry.relative_to(folder).as_posix(), UNREADABLE, kind))
    return sorted(files), problems


def ending_in(path: Path, suffixes: Collection[str]) -> tuple[list[Path], list[Problem]]:
    """The files below ``path`` with one of these suffixes in any case, or ``path`` alone where it is a file."""
    if os.path.isfile(path):
        return [path], []
    files, problems = below(path)
    return [file for file in files if file.suffix.lower() in suffixes], problems


def hidden(name: str | PurePath) -> bool:
    """Whether a name, or a part of a relative path, begins with a dot."""
    return any(part.startswith(".") and part not in (".", "..") for part in PurePath(name).parts)


def _identity(folder: Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
