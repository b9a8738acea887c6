"""The ledger of an ablation study as lines of a study's table."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from twinrl.errors import InputError
from twinrl.tracking import runlog

FORMAT = "twinrl-ledger/1"
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
        for record in runlog.rows(file):
            if record.get("format") != FORMAT:
                raise InputError(f"{file} is no ledger", got=record.get("format"), expected=FORMAT,
                                 fix="name another program's columns with --column")  # fmt: skip
            mine = belongs(record["config_hash"], record["fingerprint"])
            if mine and record["status"] in (*ENDED, "pruned"):
                found[record["config_hash"], record["seed"]] = _from_record(record)
    return list(found.values())


def _from_record(record: Mapping[str, Any]) -> dict[str, Any]:
    divergence = record.get("diverged") or {}
    step = int(record["step"])
    return {
        "seed": record["seed"],
        "config_hash": record["config_hash"],
        "status": record["status"],
        "step": step,
        "planned": None,
        "diverged": bool(divergence),
        "time": float(max(1, divergence.get("step", step))),
        "kind": str(divergence.get("series") or divergence.get("kind") or ""),
        "seconds": float(record.get("seconds", math.nan)),
        "directory": str(record.get("where", {}).get("directory", "")),
    } | {name: float(runlog.decode(value)) for name, value in record["metrics"].items()}  # type: ignore[arg-type]
