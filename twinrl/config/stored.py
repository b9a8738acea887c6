"""JSON files that the program has written itself: read strictly, for disks, copies and people damage them."""

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from twinrl.config.errors import InputError
from twinrl.config.loading import one_line

T = TypeVar("T")


def read(path: Path, kind: Any, fix: str) -> Any:
    """The content of a JSON file.

    Arguments:
        path: of the file.
        kind: what it holds, as pydantic knows it and strictly: a model, a dataclass, ``dict[str, float]``, …
        fix: the remedy to name.

    Raises:
        FileNotFoundError: there is none.
        InputError: it cannot be read, or holds something else; names the file, the key and the remedy.
    """
    return parse(read_bytes(path), kind, str(path), fix)


def read_bytes(path: Path) -> bytes:
    """The bytes of a plain file; whoever opens a pipe would wait for ever. Raises as :func:`read`."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is no file", fix="put the file back, or delete what is in its place")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read", got=error.strerror) from error


def parse(content: bytes, kind: Any, what: str, fix: str) -> Any:
    """JSON as ``kind``; ``what`` it is of is said where it is not that. Raises InputError."""
    try:
        return _adapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        raise InputError(f"{what} is damaged", got=one_line(error.errors()), fix=fix) from error


# --- plain values of a state that was saved ---------------------------------------------------------------


def made(kind: type[T], plain: Mapping[str, object]) -> T:
    """A dataclass from plain values, its fields' types taken strictly. Raises ValueError: they do not fit."""
    try:
        return cast(T, _adapter(cast(Any, kind)).validate_json(json.dumps(plain), strict=True))
    except ValidationError as error:
        raise ValueError(one_line(error.errors())) from error


def count(value: object) -> int:
    """A number of steps or rows, ≥ 0. Raises ValueError: something else."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def number(value: object) -> float:
    """A number; one that is not finite may be a string, as strict JSON has it. Raises ValueError: something else."""
    if type(value) not in (int, float) and value not in ("nan", "inf", "-inf"):
        raise ValueError(f"{value!r:.40} is no number")
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError as error:  # of a whole number
        raise ValueError(f"{value!r:.40} is no number") from error


def finite(value: object) -> float:
    """A finite number. Raises ValueError: something else."""
    if not math.isfinite(found := number(value)):
        raise ValueError(f"{value!r:.40} is not finite")
    return found


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
