"""The ledger of an ablation study as lines of a study's table."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from twinrl.config import one_line
from twinrl.config.errors import InputError
from twinrl.run import runlog, trial_lines
from twinrl.run.trial_lines import LEDGER_FORMAT

ENDED = ("finished", "stopped", "diverged")
"""How a run ends by its own rules."""


def read(path: Path, belongs: Callable[[str, str], bool]) -> list[dict[str, Any]]:
    """The final records in the ledgers in or at ``path``, one line a trial.

    Arguments:
        belongs: whether a trial of this configuration's hash and fingerprint is wanted.

    Raises:
        InputError: a file is no ledger.
    """
    files = sorted(path.glob("*.jsonl")) + sorted(path.glob("ledger/*.jsonl")) if path.is_dir() else [path]
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for file in files:
        for number, line in enumerate(runlog.rows(file), 1):
            if line.get("format") != LEDGER_FORMAT:
                raise InputError(f"{file} is no ledger", got=line.get("format"), expected=LEDGER_FORMAT,
                                 fix="name another program's columns with --column")  # fmt: skip
            record = _checked(line, file, number)
            mine = belongs(record["config_hash"], record["fingerprint"])
            if mine and record["status"] in (*ENDED, "pruned"):
                found[record["config_hash"], record["seed"]] = _from_record(record)
    return list(found.values())


def _checked(line: Mapping[str, Any], file: Path, number: int) -> dict[str, Any]:
    try:
        return trial_lines.checked(line)
    except ValidationError as error:
        raise InputError(
            f"{file}, line {number}, is not a ledger's", got=one_line(error.errors()),
            fix="restore the line, or delete it",
        ) from error  # fmt: skip


def failed(failure: Mapping[str, Any] | None, made: int) -> dict[str, Any]:
    """The columns of a study's table that say whether a run of ``made`` steps failed, and how."""
    found = failure or {}
    return {
        "diverged": failure is not None,
        "time": float(max(1, found.get("step", made))),
        "after": float(found.get("after", math.nan)),
        "kind": str(found.get("kind", "")),
        "recovered": bool(found.get("recovered", False)),
    }


def _from_record(record: Mapping[str, Any]) -> dict[str, Any]:
    step = record.get("step", 0)
    return {
        "seed": record["seed"],
        "config_hash": record["config_hash"],
        "status": record["status"],
        "step": step,
        "planned": None,
        **failed(record.get("diverged"), step),
        "seconds": float(record.get("seconds", math.nan)),
        "directory": str(record.get("where", {}).get("directory", "")),
    } | {name: float(value) for name, value in record.get("metrics", {}).items()}
