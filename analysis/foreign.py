"""Logs of other programs as rows of a run log: CSV, JSON (lines), W&B exports, TensorBoard event files.

A mapping says which of their columns is which of ours, e.g. ``{"step": "global_step", "grad/total/norm_raw":
"train/grad_norm"}``. ``step`` is needed; the rest is up to what shall be analyzed.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from analysis import tfevents
from twinrl.errors import InputError
from twinrl.tracking import runlog

Rows = list[dict[str, Any]]


def read(path: Path, mapping: Mapping[str, str]) -> Rows:
    """The log at ``path`` in our names, sorted by step; values of one step are joined into one row.

    Arguments:
        path: ``*.csv``; ``*.json`` or ``*.jsonl``, records of a W&B history or any list of objects; or a
            TensorBoard event file or its folder.
        mapping: our name → theirs.

    Raises:
        InputError: the format is unknown, or a mapped column is missing.
    """
    if "step" not in mapping:
        raise InputError("the mapping does not say which column is the step", fix="add e.g. step=global_step")
    joined: dict[int, dict[str, Any]] = {}
    found: set[str] = set()
    for record in _records(path):
        found |= set(record)
        step = _number(record.get(mapping["step"]))
        if step is None or not math.isfinite(step):
            continue
        values = {ours: _number(record.get(theirs)) for ours, theirs in mapping.items() if ours != "step"}
        row = joined.setdefault(int(step), {"iteration": int(step), "step": int(step)})
        row |= {name: value for name, value in values.items() if value is not None}
    if missing := [theirs for theirs in mapping.values() if theirs not in found]:
        raise InputError(f"{path} has no column {missing[0]}", expected=f"one of {', '.join(sorted(found)[:20])}")
    return [joined[step] for step in sorted(joined)]


def kind_of(path: Path) -> str:
    """What a log of another program is, in words; empty for a run, a study or a ledger."""
    if path.is_dir():
        return "a folder of TensorBoard events" if any(path.glob("*tfevents*")) else ""
    if path.suffix in (".csv", ".json"):
        return f"a {path.suffix[1:].upper()} file"
    return "a TensorBoard event file" if "tfevents" in path.name else ""


def _number(value: object) -> float | None:
    """A number, also one spelled as text (``NaN``, ``Infinity``); None for empty cells and other things."""
    if value is None or value == "" or isinstance(value, bool | dict | list):
        return None
    try:
        return float(runlog.decode(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.exists():
        raise InputError(f"no log at {path}")
    if path.suffix == ".csv":
        return _csv(path)
    if path.suffix in (".json", ".jsonl"):
        return _json(path)
    if path.is_dir() or "tfevents" in path.name:
        return _tensorboard(path)
    raise InputError(f"{path} has an unknown format", expected="csv, json, jsonl or TensorBoard events")


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    import csv

    with path.open(newline="") as file:
        yield from csv.DictReader(file)


def _json(path: Path) -> Iterator[Mapping[str, Any]]:
    """A list of objects, or one object a line; Python's JSON reader also takes NaN and Infinity."""
    text = path.read_text()
    try:
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(s) for s in text.splitlines() if s]
    except ValueError as error:
        raise InputError(f"{path} is not JSON", got=error, expected="a list of objects, or one a line") from error
    if not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path} holds something else than objects", expected="a list of objects, or one a line")
    yield from records


def _tensorboard(path: Path) -> Iterator[Mapping[str, Any]]:
    """Scalars as ``{"step": …, tag: value}``; map ``step=step``."""
    found = False
    for step, tag, value in tfevents.scalars(path):
        found = True
        yield {"step": step, tag: value}
    if not found:
        raise InputError(f"{path} holds no scalars", expected="TensorBoard event files (*tfevents*)")
