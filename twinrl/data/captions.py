"""Pairs of image and caption from what people have: folders, metadata, tables, tars, data sets, prompt lists.

A reader yields one :class:`Example` for each usable-looking pair and one :class:`Problem` for each that is not; it
never fails on a single file, as the ``datasets`` package does on a tar of which one caption is missing or unreadable.
Image bytes are read later, one at a time.

| format | what it is |
|---|---|
| ``text`` | ``a.png`` with its caption in ``a.txt``, ``a.caption`` or ``a.png.txt`` beside it, in any subfolder |
| ``metadata`` | ``metadata.jsonl`` of ``{"file_name": …, "text" or "caption": …}`` lines (Hugging Face imagefolder) |
| ``parquet`` | tables with an image column (bytes, Hugging Face's struct, or a path) and a caption column |
| ``webdataset`` | uncompressed tars of ``key.png|jpg|webp`` with ``key.txt`` or ``key.json`` |
| ``huggingface`` | a data set saved by, or loaded through, the ``datasets`` package |
| ``prompts`` | a text file with one prompt per line, no images |

Text is UTF-8, or UTF-16 with a byte order mark; suffixes are taken in any case. Of a list of captions the first counts.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.data import listing
from twinrl.data.images import SUFFIXES
from twinrl.data.problems import (
    BAD_CAPTION,
    BAD_ROW,
    EMPTY_CAPTION,
    NO_CAPTION,
    NO_IMAGE,
    NOT_AN_IMAGE,
    SECOND_CAPTION,
    Problem,
    UnusableError,
)
from twinrl.machine import text

Read: TypeAlias = Callable[[], bytes]


@dataclass(frozen=True)
class Example:
    """One pair.

    Attributes:
        name: where it comes from, for reports; what cannot be printed is escaped.
        caption: not empty.
        read: gives the image file's bytes; None in a prompt list. Raises OSError or UnusableError.
        label: what ``read.label_column`` says; empty where that is not set, or says nothing.
    """

    name: str
    caption: str
    read: Read | None
    label: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", text.printable(self.name))


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
    label_column: str | None = Field(
        None, description="column or JSON key of a class's name; of use to `twinrl lab build --label` alone"
    )


CaptionReader: TypeAlias = Callable[[Path, ReadConfig], Iterator[Found]]


def caption_in(row: Mapping[str, Any], column: str | None) -> str:
    """The caption of a table's or JSON file's row. Raises UnusableError where there is none."""
    keys = [column] if column else ["text", "caption"]
    key = next((key for key in keys if key in row), None)
    if key is None:
        raise UnusableError(NO_CAPTION, f"no {' or '.join(keys)} among {', '.join(map(str, row))}")
    value = row[key]
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = decode_text(value)
    if value is not None and not isinstance(value, str):
        raise UnusableError(BAD_CAPTION, f"{key} is of type {type(value).__name__}")
    return clean(value or "")


def label_in(row: Mapping[str, Any], column: str | None) -> str:
    """The name of a row's class; empty where there is none."""
    value = row.get(column) if column else None
    if isinstance(value, bytes):
        value = decode_text(value)
    return "" if value is None else str(value).strip()


def clean(caption: str) -> str:
    """The caption without surrounding white space.

    Raises:
        UnusableError: nothing is left, or characters were lost before.
    """
    if not caption.strip():
        raise UnusableError(EMPTY_CAPTION)
    if flaw := text.flaw(caption):
        raise UnusableError(BAD_CAPTION, flaw)
    return caption.strip()


def decode_text(data: bytes, reason: str = BAD_CAPTION) -> str:
    """The text of a file or line. Raises UnusableError for ``reason`` where its encoding is not known for sure."""
    try:
        return text.decode(data)
    except ValueError as error:
        raise UnusableError(reason, str(error)) from error


def decode_json(data: bytes, reason: str) -> dict[str, Any]:
    """A JSON object. Raises UnusableError for ``reason`` where it is something else."""
    try:
        value = json.loads(decode_text(data, reason))
    except (ValueError, RecursionError) as error:
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


CAPTION_SUFFIXES = (".txt", ".caption")
"""Names of captions beside images, the first that is there first."""


def read_text(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``text``: images with captions beside them; other files are problems, hidden ones are passed over."""
    found, problems = listing.below(path)
    yield from problems
    captions: dict[Path, list[Path]] = {}  # what a caption's name begins with → such files
    for suffix in CAPTION_SUFFIXES:
        for file in found:
            if file.suffix.lower() == suffix:
                captions.setdefault(file.with_suffix(""), []).append(file)
    taken = set()
    for file in found:
        name = file.relative_to(path).as_posix()
        if file.suffix.lower() in SUFFIXES:
            beside = captions.get(file, []) + captions.get(file.with_suffix(""), [])
            taken |= set(beside[:1])
            yield attempt(name, partial(_beside, file, beside, name))
        elif file.suffix.lower() not in CAPTION_SUFFIXES:
            yield Problem(name, NOT_AN_IMAGE, f"suffix {file.suffix or 'missing'}")
    images = {base for file in found if file.suffix.lower() in SUFFIXES for base in (file, file.with_suffix(""))}
    for base, beside in captions.items():
        reason, detail = (SECOND_CAPTION, "the image has another") if base in images else (NO_IMAGE, "none beside it")
        for file in beside:
            if file not in taken:
                yield Problem(file.relative_to(path).as_posix(), reason, detail)


def _beside(file: Path, captions: list[Path], name: str) -> Example:
    if not captions:
        raise UnusableError(NO_CAPTION, f"no {file.stem}.txt beside it")
    try:
        data = captions[0].read_bytes()
    except OSError as error:
        raise UnusableError(BAD_CAPTION, str(error.strerror)) from error
    return Example(name, clean(decode_text(data)), file.read_bytes)


METADATA = "metadata.jsonl"


def read_metadata(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``metadata``: every ``metadata.jsonl`` under the folder; ``file_name`` is relative to its own folder."""
    found, problems = listing.ending_in(path, [".jsonl"])
    yield from problems
    for file in found if found == [path] else [file for file in found if file.name.lower() == METADATA]:
        name = file.name if file == path else file.relative_to(path).as_posix()
        for number, line in numbered(file):
            if line.strip():
                yield attempt(f"{name}:{number}", partial(_listed, file, line, f"{name}:{number}", config))


def numbered(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file, from 1 on. Raises InputError where it cannot be read."""
    try:
        yield from enumerate(text.lines(file), 1)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read", got=error) from error


def _listed(file: Path, line: bytes, name: str, config: ReadConfig) -> Example:
    row = decode_json(line, BAD_ROW)
    if not isinstance(row.get("file_name"), str):
        raise UnusableError(BAD_ROW, "no file_name")
    image = file.parent / row["file_name"]
    caption = caption_in(row, config.caption_column)
    if not os.path.isfile(image):  # also where the name is too long, or none
        raise UnusableError(NO_IMAGE, row["file_name"])
    return Example(f"{name} {row['file_name']}", caption, image.read_bytes, label_in(row, config.label_column))


def read_prompts(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``prompts``: one prompt per line; there is nothing to read beside them."""
    for number, line in numbered(path):
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
    if os.path.isfile(path):
        return _format_of_file(path)
    if not os.path.isdir(path):
        raise InputError(
            f"no file or folder {path}", fix="check the path; a data set's name needs read.format=huggingface"
        )
    if any((path / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "huggingface"
    names = {file.name.lower() for file in listing.below(path)[0]}
    suffixes = {Path(name).suffix for name in names}
    found = [name for name, suffix in (("webdataset", ".tar"), ("parquet", ".parquet")) if suffix in suffixes]
    if METADATA in names:
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
    fits = {"a folder": os.path.isdir, "a text file": os.path.isfile}.get(wanted or "", os.path.exists)(path)
    if not fits:
        raise InputError(f"format {format} cannot be read from {path}", expected=wanted or "a file or folder")
