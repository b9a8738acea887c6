"""What tests read of a run directory."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from twinrl.run import checkpoints
from twinrl.training.runs import RunDirectory


def rows(run: RunDirectory | Path) -> list[dict[str, Any]]:
    """The log's rows as written (non-finite values are strings, so equal rows are equal), without what a clock says."""
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in _lines(_of(run).log)]


def events(run: RunDirectory | Path) -> list[dict[str, Any]]:
    """The events as written."""
    return _lines(_of(run).events)


def tensors(run: RunDirectory | Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint, whole, as part/name."""
    found = checkpoints.load(_of(run).newest_checkpoint())
    return {f"{part}/{name}": value for part, values in found.tensors.items() for name, value in values.items()}


def the_run(folder: Path) -> RunDirectory | None:
    """The only run directory in ``folder``; None before it is there."""
    found = list(folder.glob("*-s*"))
    assert len(found) <= 1, found
    return RunDirectory(found[0]) if found else None


def _of(run: RunDirectory | Path) -> RunDirectory:
    return RunDirectory(run) if isinstance(run, Path) else run


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
