"""Data sources by name."""

from collections.abc import Callable
from pathlib import Path

from twinrl.data.source import Source


def _digits(root: Path | None) -> Source:
    from twinrl.lab import load_lab

    return load_lab()


def _mnist(root: Path | None) -> Source:
    from twinrl.data.mnist import MNISTSource

    return MNISTSource(root)


SOURCES: dict[str, Callable[[Path | None], Source]] = {"digits": _digits, "mnist": _mnist}
"""``data.source`` → function of ``data.root`` that loads it (building what is not cached, with a progress bar)."""
