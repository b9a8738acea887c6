"""JSON files that the program has written itself: read strictly, for disks, copies and people damage them."""

from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from twinrl.config.errors import InputError
from twinrl.config.loading import one_line


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


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
