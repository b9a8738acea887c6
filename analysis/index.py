"""``study.json``: what a study is called, its arms and their levels, and where its runs are.

``twinrl ablate run`` writes one into ``<root>/studies/<study>/``; people write them by hand, too.
"""

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from twinrl.config import stored

STUDY_FILE = "study.json"


class _Entry(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Arm(_Entry):
    name: str
    config_hash: str
    levels: dict[str, str | int | float | bool | None] = {}
    steps: NonNegativeInt | None = None
    fingerprint: str | None = None


class _Bracket(_Entry):
    arm: str
    seed: NonNegativeInt
    healthy: float | None
    diverged: float | None


class _Index(_Entry):
    """The keys that :func:`analysis.frames.load_study` takes; others are for people."""

    name: str | None = None
    question: str = ""
    note: str = ""
    metric: str = ""
    base: str | None = None
    runs: str = ""
    seeds: list[NonNegativeInt] = []
    arms: list[_Arm] = []
    critical: list[_Bracket] = []


def located(path: Path) -> tuple[Path, dict[str, Any]]:
    """Where the trials of a study are, and its index; an empty one where there is no ``study.json``.

    Raises:
        InputError: the index is damaged.
    """
    folder = path if path.is_dir() else path.parent
    beside = list(folder.glob(f"studies/*/{STUDY_FILE}"))
    file = beside[0] if len(beside) == 1 and not (folder / STUDY_FILE).is_file() else folder / STUDY_FILE
    if not file.is_file():
        return path, {}
    read: _Index = stored.read(file, _Index, "mend it, or make it again with `twinrl ablate report`")
    index = read.model_dump(exclude_unset=True)
    if file.parent != folder or "runs" not in index:
        return path, index
    return Path(os.path.normpath(folder / index["runs"])), index
