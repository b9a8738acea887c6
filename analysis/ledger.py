"""The ledger of an ablation study as lines of a study's table."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from twinrl.config.errors import InputError
from twinrl.machine import memory
from twinrl.run import runlog

LEDGER_FORMAT = "twinrl-ledger/1"
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
    with memory.uncollected():
        for file in files:
            for record in runlog.rows(file):
                if record.get("format") != LEDGER_FORMAT:
                    raise InputError(f"{file} is no ledger", got=record.get("format"), expected=LEDGER_FORMAT,
                                     fix="name another program's columns with --column")  # fmt: skip
                mine = belongs(record["config_hash"], record["fingerprint"])
                if mine and record["status"] in (*ENDED, "pruned"):
                    found[record["config_hash"], record["seed"]] = _from_record(record)
    return list(found.values())


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
    step = int(record["step"])
    return {
        "seed": record["seed"],
        "config_hash": record["config_hash"],
        "status": record["status"],
        "step": step,
        "planned": None,
        **failed(record.get("diverged"), step),
        "seconds": float(record.get("seconds", math.nan)),
        "directory": str(record.get("where", {}).get("directory", "")),
        "rollbacks": math.nan,
    } | {name: float(runlog.decode(value)) for name, value in record["metrics"].items()}  # type: ignore[arg-type]
