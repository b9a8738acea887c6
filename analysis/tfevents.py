"""Scalars of TensorBoard event files, read without TensorBoard.

An event file is a sequence of records ``length (8 bytes), checksum (4), message, checksum (4)``, each message an
``Event`` in protobuf's wire format (tensorflow/core/util/event.proto and framework/summary.proto): field 2 the step,
field 5 the summary with values of a tag (1) and a number, either a float (2) or a tensor of one element (8).
Checksums are not compared: a record that is cut off ends the file, as it does while its writer is still alive.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from twinrl.config.errors import InputError

Field = tuple[int, int, bytes | int]
FLOAT, DOUBLE = 1, 2
"""Types of a tensor's elements."""


def scalars(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) of an event file, or of all in a folder and below it that are not hidden.

    Raises:
        InputError: a file cannot be read, or a record is none of TensorBoard's.
    """
    found = path.rglob("*tfevents*") if path.is_dir() else [path]
    for file in sorted(file for file in found if file.is_file() and not file.name.startswith(".")):
        try:
            for message in _records(file.read_bytes()):
                yield from _of_event(message)
        except OSError as error:
            raise InputError(f"{file} cannot be read", got=error.strerror) from error
        except (ValueError, struct.error) as error:
            raise InputError(f"{file} is damaged, or no file of TensorBoard's", got=error) from error


def _records(content: bytes) -> Iterator[bytes]:
    at = 0
    while at + 12 <= len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        if at + 16 + length > len(content):
            return
        yield content[at + 12 : at + 12 + length]
        at += 16 + length


def _of_event(message: bytes) -> Iterator[tuple[int, str, float]]:
    fields = list(_fields(message))
    step = next((int(value) for number, _, value in fields if number == 2 and isinstance(value, int)), 0)
    step -= (step >> 63) << 64  # a signed integer of 64 bits
    for number, _, summary in fields:
        for inner, _, value in _fields(summary) if number == 5 and isinstance(summary, bytes) else ():
            if inner == 1 and isinstance(value, bytes) and (found := _of_value(value)) is not None:
                yield step, *found


def _of_value(message: bytes) -> tuple[str, float] | None:
    """Tag and number of one ``Summary.Value``; None for pictures, histograms and texts."""
    tag, number = "", None
    for field, kind, value in _fields(message):
        if not isinstance(value, bytes):
            continue
        if field == 1:
            tag = value.decode(errors="replace")
        elif field == 2 and kind == 5:
            number = float(struct.unpack("<f", value)[0])
        elif field == 8:
            number = _of_tensor(value)
    return None if number is None else (tag, number)


def _of_tensor(message: bytes) -> float | None:
    """The element of a ``TensorProto`` that holds one float or double."""
    code, content = "", b""
    for field, _, value in _fields(message):
        if field == 1 and isinstance(value, int):
            code = {FLOAT: "<f", DOUBLE: "<d"}.get(value, "")
        elif field in (4, 5, 6) and isinstance(value, bytes):  # as bytes, floats or doubles
            content = value
    if not code or len(content) != struct.calcsize(code):
        return None
    return float(struct.unpack(code, content)[0])


def _fields(message: bytes) -> Iterator[Field]:
    """Number, wire type and raw value of every field; variable-length integers as such."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        value: bytes | int
        if kind == 0:
            value, at = _varint(message, at)
        else:
            length, at = (8, at) if kind == 1 else (4, at) if kind == 5 else _varint(message, at)
            value, at = message[at : at + length], at + length
        yield number, kind, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The variable-length integer at ``at``, and where it ends. Raises ValueError where it has more than 64 bits."""
    value = shift = 0
    while at < len(message):
        if shift > 63:
            raise ValueError("an integer beyond 64 bits")
        byte, at = message[at], at + 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            break
    return value, at
