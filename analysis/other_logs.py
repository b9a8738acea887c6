"""Logs of other programs as rows of a run log: CSV, JSON (lines), W&B exports, TensorBoard event files.

A mapping says which of their columns is which of ours, e.g. ``{"step": "global_step", "grad/total/norm_raw":
"train/grad_norm"}``. ``step`` is needed; the rest is up to what shall be analyzed.
"""

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from analysis import tfevents
from twinrl.config.errors import InputError
from twinrl.machine import files, text


class Log(NamedTuple):
    """What was read.

    Attributes:
        rows: in our names, one for each step, sorted.
        replaced: values that another one of the same step and column came after; the last counts.
    """

    rows: list[dict[str, Any]]
    replaced: int


def read(path: Path, mapping: Mapping[str, str]) -> Log:
    """The log at ``path``; values of one step are joined into one row, rows without a step are passed over.

    Arguments:
        path: ``*.csv``; ``*.json`` or ``*.jsonl``, records of a W&B history or any list of objects; or a
            TensorBoard event file or its folder.
        mapping: our name → theirs.

    Raises:
        InputError: the format or encoding is unknown, a mapped column is missing, a mapped cell holds text that is no
            number (``1,000``), or a step is not whole.
    """
    if "step" not in mapping:
        raise InputError("the mapping does not say which column is the step", fix="add e.g. step=global_step")
    joined: dict[int, dict[str, Any]] = {}
    found: set[str] = set()
    replaced = 0
    for record in _records(path):
        found |= set(record)
        numbers = {ours: _number(record.get(theirs), theirs, path) for ours, theirs in mapping.items()}
        step = numbers.pop("step")
        if step is None or math.isnan(step):
            continue
        if not step.is_integer():
            raise InputError(
                f"{path}: the step {record[mapping['step']]!r:.80} is no whole number",
                fix=f"map another column than {mapping['step']}, or count the steps",
            )
        row = joined.setdefault(int(step), {"iteration": int(step), "step": int(step)})
        values = {name: value for name, value in numbers.items() if value is not None}
        replaced += sum(name in row and row[name] != value for name, value in values.items())
        row |= values
    if missing := [theirs for theirs in mapping.values() if theirs not in found]:
        raise InputError(f"{path} has no column {missing[0]}", expected=f"one of {', '.join(sorted(found)[:20])}")
    return Log([joined[step] for step in sorted(joined)], replaced)


def kind_of(path: Path) -> str:
    """What a log of another program is, in words; empty for a run, a study or a ledger."""
    if path.is_dir():
        return "a folder of TensorBoard events" if any(path.glob("*tfevents*")) else ""
    if path.suffix.lower() in (".csv", ".json"):
        return f"a {path.suffix[1:].upper()} file"
    return "a TensorBoard event file" if "tfevents" in path.name else ""


EMPTY_CELLS = frozenset({"", "na", "n/a", "null", "none", "-"})
"""How cells say that they hold nothing, in lower case."""

NUMBER = re.compile(r"[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)", re.IGNORECASE | re.ASCII)


def _number(value: object, column: str, path: Path) -> float | None:
    """A number, also one spelled as text (``NaN``, ``Infinity``); None for empty cells, flags, pictures and the like.

    Raises:
        InputError: text that is no number (``1,000`` may be a thousand or one), or digits beyond every float.
    """
    if value is None or isinstance(value, bool | dict | list):
        return None
    if isinstance(value, str):
        if value.strip().lower() in EMPTY_CELLS:
            return None
        if not NUMBER.fullmatch(value.strip()) or ("inf" not in value.lower() and math.isinf(float(value))):
            raise InputError(
                f"{path} has {value!r:.80} in the column {column}", expected="a number below 1.8e308",
                fix="write it without separators and units, with a decimal point",
            )  # fmt: skip
    return float(value)  # type: ignore[arg-type]


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.exists():
        raise InputError(f"no log at {path}")
    if path.suffix.lower() == ".csv":
        return _csv(path)
    if path.suffix.lower() in (".json", ".jsonl"):
        return _json(path)
    if path.is_dir() or "tfevents" in path.name:
        return _tensorboard(path)
    raise InputError(f"{path} has an unknown format", expected="csv, json, jsonl or TensorBoard events")


def _text(path: Path) -> str:
    try:
        files.check_plain(path)
        return text.decode(path.read_bytes(), torn=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read", got=error.strerror) from error
    except ValueError as error:
        raise InputError(
            f"{path} cannot be read", got=error, expected="UTF-8, or UTF-16 with a byte order mark",
            fix="convert it, e.g. with iconv",
        ) from error  # fmt: skip


def _csv(path: Path) -> Iterator[Mapping[str, Any]]:
    """The rows under the header; a last one that was cut off while it was written is left out."""
    content = _text(path)
    try:
        rows = [row for row in csv.reader(io.StringIO(content, newline="")) if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise InputError(f"{path} is no CSV", got=error) from error
    header = [name.strip() for name in rows[0]] if rows else []
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise InputError(f"{path} has two columns {twice[0]}", fix="rename one")
    if rows and len(rows[-1]) < len(header) and not content.endswith(("\n", "\r")):
        rows.pop()
    for number, row in enumerate(rows[1:], 1):
        if any(row[len(header) :]):
            raise InputError(
                f"{path} has {len(row)} cells in row {number} below the header", expected=f"{len(header)}",
                fix="quote cells with a comma, write numbers without separators",
            )  # fmt: skip
        yield dict(zip(header, row, strict=False))


def _json(path: Path) -> Iterator[Mapping[str, Any]]:
    """A list of objects, or one object a line; Python's JSON reader also takes NaN and Infinity.

    The last line is left out where it was cut off while it was written.
    """
    content = _text(path)
    if content.lstrip().startswith("["):
        yield from _parsed(content, path, "")
        return
    *lines, last = content.split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield from _parsed(f"[{line}]", path, f" in line {number}")
    with suppress(InputError) if lines else nullcontext():
        yield from _parsed(f"[{last}]", path, "")


def _spelled(digits: str) -> float | str:
    """A number; as it is written where no float holds it."""
    return digits if math.isinf(number := float(digits)) else number


def _parsed(content: str, path: Path, where: str) -> list[Mapping[str, Any]]:
    try:
        records = json.loads(content, parse_int=_spelled, parse_float=_spelled)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is not JSON{where}", got=error, expected="a list of objects, or one a line"
        ) from error
    if not all(isinstance(record, dict) for record in records):
        raise InputError(
            f"{path} holds something else than objects{where}", expected="a list of objects, or one a line"
        )
    return records


def _tensorboard(path: Path) -> Iterator[Mapping[str, Any]]:
    """Scalars as ``{"step": …, tag: value}``; map ``step=step``."""
    found = False
    for step, tag, value in tfevents.scalars(path):
        found = True
        yield {"step": step, tag: value}
    if not found:
        raise InputError(f"{path} holds no scalars", expected="TensorBoard event files (*tfevents*)")
