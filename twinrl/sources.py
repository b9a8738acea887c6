"""Data sources by name. A source is one function here; what it loads is imported when it is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from twinrl.backends.families.family import Family
    from twinrl.data.folders.training import FolderSource
    from twinrl.data.source import Source


def _digits(root: Path | None) -> "Source":
    from twinrl.lab import load_lab

    return load_lab()


def _mnist(root: Path | None) -> "Source":
    from twinrl.data.mnist import MNISTSource

    return MNISTSource(root)


def _folder(root: Path | None, family: "Family") -> "FolderSource":
    from twinrl.data.folders.training import FolderSource

    return FolderSource(root, family)


def _prompts(root: Path | None, family: "Family") -> "FolderSource":
    from twinrl.data.folders.training import FolderSource

    return FolderSource(root, family, images=False)


SOURCES: dict[str, Callable[[Path | None], "Source"]] = {"digits": _digits, "mnist": _mnist}
"""``data.source`` → function of ``data.root`` that loads it (building what is not cached, with a progress bar)."""

FAMILY_SOURCES: dict[str, Callable[[Path | None, "Family"], "FolderSource"]] = {"folder": _folder, "prompts": _prompts}
"""``data.source`` of a run with ``model.family`` → function of ``data.root`` and the family."""
