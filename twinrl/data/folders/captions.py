"""Pairs of image and caption from what people have: folders, metadata, tables, tars, data sets, prompt lists.

A reader yields one :class:`Example` for each usable-looking pair and one :class:`Problem` for each that is not; it
never fails on a single file, as the ``datasets`` package does on a tar of which one caption is missing or unreadable.
Image bytes are read later, one at a time.

| format | what it is |
|---|---|
| ``text`` | ``a.png`` with its caption in ``a.txt`` beside it, in any depth of subfolders |
| ``metadata`` | ``metadata.jsonl`` of ``{"file_name": …, "text" or "caption": …}`` lines (Hugging Face imagefolder) |
| ``parquet`` | tables with an image column (bytes, Hugging Face's struct, or a path) and a caption column |
| ``webdataset`` | uncompressed tars of ``key.png|jpg|webp`` with ``key.txt`` or ``key.json`` |
| ``huggingface`` | a data set saved by, or loaded through, the ``datasets`` package |
| ``prompts`` | a text file with one prompt per line, no images |
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from twinrl.config import Settings
from twinrl.data.folders.images import SUFFIXES
from twinrl.data.folders.problems import (
    BAD_CAPTION,
    BAD_ROW,
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_IMAGE,
    NOT_AN_IMAGE,
    Problem,
    UnusableError,
)
from twinrl.errors import InputError

Read: TypeAlias = Callable[[], bytes]


@dataclass(frozen=True)
class Example:
    """One pair.

    Attributes:
        name: where it comes from, for reports.
        caption: not empty.
        read: gives the image file's bytes; None in a prompt list. Raises OSError or UnusableError.
    """

    name: str
    caption: str
    read: Read | None


Found: TypeAlias = Example | Problem


class ReadConfig(Settings):
    """Where pairs are found in the data."""

    format: Literal["auto", "text", "metadata", "parquet", "webdataset", "huggingface", "prompts"] = Field(
        "auto", description="how captions come with images; auto looks at what is there"
    )
    image_column: str = Field("image", description="parquet and huggingface: the column of images")
    caption_column: str | None = Field(
        None, description="column or JSON key of captions; null = `text`, or `caption` where there is no `text`"
    )
    split: str = Field("train", description="huggingface: the split to take")


Reader: TypeAlias = Callable[[Path, ReadConfig], Iterator[Found]]


def caption_in(row: Mapping[str, Any], column: str | None) -> str:
    """The caption of a table's or JSON file's row. Raises UnusableError where there is none."""
    keys = [column] if column else ["text", "caption"]
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise UnusableError(NO_CAPTION, f"no {' or '.join(keys)} among {', '.join(map(str, row))}")
    if row[key] is not None and not isinstance(row[key], str):
        raise UnusableError(BAD_CAPTION, f"{key} is of type {type(row[key]).__name__}")
    return clean(row[key] or "")


def clean(text: str) -> str:
    """The caption without surrounding white space. Raises UnusableError where nothing is left."""
    if not text.strip():
        raise UnusableError(EMPTY_CAPTION)
    return text.strip()


def decode_text(data: bytes) -> str:
    """UTF-8 text, with or without a byte order mark. Raises UnusableError where it is something else."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnusableError(BAD_CAPTION, f"not UTF-8: byte {error.start}") from error


def decode_json(data: bytes | str, reason: str) -> dict[str, Any]:
    """A JSON object. Raises UnusableError for ``reason`` where it is something else."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UnusableError(reason, f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnusableError(reason, f"not a JSON object but {type(value).__name__}")
    return value


def attempt(name: str, make: Callable[[], Example]) -> Found:
    """What ``make`` gives, or the problem that it meets."""
    try:
        return make()
    except UnusableError as error:
        return error.of(name)


# --- files in folders -------------------------------------------------------------------------------------


def read_text(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``text``: images with ``.txt`` files beside them; other files are problems, hidden ones are passed over."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    images = {file.with_suffix("") for file in files if file.suffix.lower() in SUFFIXES}
    for file in files:
        name = file.relative_to(path).as_posix()
        if file.suffix.lower() in SUFFIXES:
            yield attempt(name, partial(_beside, file, name))
        elif file.suffix.lower() != ".txt":
            yield Problem(name, NOT_AN_IMAGE, f"suffix {file.suffix or 'missing'}")
        elif file.with_suffix("") not in images:
            yield Problem(name, NO_IMAGE, "a caption without an image beside it")


def _beside(file: Path, name: str) -> Example:
    caption = file.with_suffix(".txt")
    try:
        data = caption.read_bytes()
    except FileNotFoundError:
        raise UnusableError(NO_CAPTION, f"no {caption.name} beside it") from None
    except OSError as error:
        raise UnusableError(BAD_CAPTION, str(error)) from error
    return Example(name, clean(decode_text(data)), file.read_bytes)


def _hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def read_metadata(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``metadata``: every ``metadata.jsonl`` under the folder; ``file_name`` is relative to its own folder."""
    files = [path] if path.is_file() else sorted(path.rglob("metadata.jsonl"))
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    name = f"{file.name}:{number}"
                    yield attempt(name, partial(_listed, file, line, name, config))


def _listed(file: Path, line: bytes, name: str, config: ReadConfig) -> Example:
    row = decode_json(line.decode("utf-8", "replace"), BAD_ROW)
    if not isinstance(row.get("file_name"), str):
        raise UnusableError(BAD_ROW, "no file_name")
    image = file.parent / row["file_name"]
    caption = caption_in(row, config.caption_column)
    if not image.is_file():
        raise UnusableError(NO_IMAGE, row["file_name"])
    return Example(f"{name} {row['file_name']}", caption, image.read_bytes)


def read_prompts(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``prompts``: one prompt per line; there is nothing to read beside them."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            name = f"{path.name}:{number}"
            yield attempt(name, partial(_prompt, name, line))


def _prompt(name: str, line: bytes) -> Example:
    return Example(name, clean(decode_text(line)), None)


# --- which format ---------------------------------------------------------------------------------------------


def detect(path: Path) -> str:
    """The format of what lies at ``path``.

    Raises:
        InputError: there is nothing, nothing known, or more than one format.
    """
    if path.is_file():
        return _format_of_file(path)
    if not path.is_dir():
        raise InputError(
            f"no file or folder {path}", fix="check the path; a data set's name needs read.format=huggingface"
        )
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "huggingface"
    suffixes = {file.suffix.lower() for file in path.rglob("*") if not _hidden(file.relative_to(path))}
    found = [name for name, suffix in (("webdataset", ".tar"), ("parquet", ".parquet")) if suffix in suffixes]
    if any(path.rglob("metadata.jsonl")):
        found.append("metadata")
    elif suffixes & SUFFIXES:
        found.append("text")
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(f"{path} can be read in several ways", got=", ".join(found), fix=f"add read.format={found[0]}")
    shown = ", ".join(sorted(suffixes - {""})[:6]) or "no files"
    raise InputError(f"{path} has no images", got=shown, expected="images, metadata.jsonl, *.parquet or *.tar")


def _format_of_file(path: Path) -> str:
    formats = {".txt": "prompts", ".jsonl": "metadata", ".parquet": "parquet", ".tar": "webdataset"}
    suffix = path.suffix.lower()
    if suffix not in formats:
        raise InputError(f"{path} is of no known format", got=suffix or "no suffix", expected=", ".join(formats))
    return formats[suffix]


def check_is(path: Path, format: str) -> None:
    """Raises InputError where ``path`` is not what its format is read from."""
    wanted = {"text": "a folder", "prompts": "a text file"}.get(format)
    fits = {"a folder": path.is_dir(), "a text file": path.is_file()}.get(wanted or "", path.exists())
    if not fits:
        raise InputError(f"format {format} cannot be read from {path}", expected=wanted or "a file or folder")
