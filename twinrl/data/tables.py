"""Readers of tables: parquet files and Hugging Face data sets."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from twinrl.config.errors import InputError
from twinrl.data import listing
from twinrl.data.captions import Example, Found, ReadConfig, attempt, caption_in, label_in
from twinrl.data.problems import BAD_ROW, NO_IMAGE, Problem, UnusableError
from twinrl.machine import files


def read_parquet(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``parquet``: one file or all under a folder."""
    found, problems = listing.ending_in(path, [".parquet"])
    if not found:
        raise InputError(f"{path} has no parquet file")
    yield from problems
    for file in found:
        yield from _rows(_Table(file, config), file.name if file == path else file.relative_to(path).as_posix())


class _Table:
    """One parquet file, read a row group at a time; the present group of images stays in memory."""

    def __init__(self, file: Path, config: ReadConfig):
        self.folder, self.image_column = file.parent, config.image_column
        try:
            self.file = parquet.ParquetFile(file)
        except (OSError, ValueError, pyarrow.ArrowException) as error:  # ValueError: its name is no UTF-8
            raise InputError(f"{file} is not a parquet file", got=error, fix="remove or replace it") from error
        columns = self.file.schema_arrow.names
        self.caption_column = config.caption_column or ("text" if "text" in columns else "caption")
        self.label_column = config.label_column
        named = (self.image_column, self.caption_column, self.label_column)
        for key, column in zip(("image_column", "caption_column", "label_column"), named, strict=True):
            if column is not None and column not in columns:
                raise InputError(
                    f"{file} has no column {column}", got=f"columns {', '.join(columns)}", fix=f"set read.{key}"
                )
        self._lock = threading.Lock()
        self._images = lru_cache(maxsize=1)(self._read_images)

    def captions(self, group: int) -> list[Any]:
        return self._texts(group, self.caption_column)

    def labels(self, group: int) -> list[Any] | None:
        """The names of classes; None where no column has them."""
        return self._texts(group, self.label_column) if self.label_column else None

    def _texts(self, group: int, name: str) -> list[Any]:
        column = self.file.read_row_group(group, columns=[name])[name]
        if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
            column = column.cast(pyarrow.large_binary())  # one that is not UTF-8 spoils itself alone
        return column.to_pylist()

    def _read_images(self, group: int) -> Any:
        return self.file.read_row_group(group, columns=[self.image_column])[self.image_column]

    def image(self, group: int, row: int) -> bytes:
        """The image file's bytes."""
        try:
            with self._lock:  # readers share the file's position
                cell = self._images(group)[row].as_py()
        except (OSError, pyarrow.ArrowException) as error:
            raise UnusableError(BAD_ROW, str(error)) from error
        return image_bytes(cell, self.folder)


def _rows(table: _Table, name: str) -> Iterator[Found]:
    number = 0
    for group in range(table.file.num_row_groups):
        try:
            captions = table.captions(group)
            labels = table.labels(group) or [None] * len(captions)
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            yield Problem(f"{name}[{number}…]", BAD_ROW, str(error))
            captions, labels = [], []
        for row, found in enumerate(zip(captions, labels, strict=True)):
            values = dict(zip(("text", "label"), found, strict=True))
            yield _example(f"{name}[{number}]", values, "text", "label", partial(table.image, group, row))
            number += 1


def _example(name: str, row: Mapping[str, Any], column: str | None, label: str | None, read: Any) -> Found:
    return attempt(name, lambda: Example(name, caption_in(row, column), read, label_in(row, label)))


def image_bytes(cell: Any, folder: Path) -> bytes:
    """An image column's cell as a file's bytes: bytes, ``{"bytes": …, "path": …}``, or a path relative to ``folder``.

    Raises:
        UnusableError: the cell is empty or of another kind.
    """
    if isinstance(cell, Mapping):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return cell
    if not isinstance(cell, str) or not cell:
        raise UnusableError(NO_IMAGE, f"the image cell is {type(cell).__name__}")
    try:
        files.check_plain(folder / cell)
        return (folder / cell).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise UnusableError(NO_IMAGE, f"{cell}: {getattr(error, 'strerror', error)}") from error


def read_huggingface(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``huggingface``: a folder made by ``save_to_disk``, or a data set's name on the hub.

    Raises:
        InputError: the ``datasets`` package is missing, or it finds no such data set, split or column.
    """
    table = _load(path, config)
    wanted = [config.image_column, *filter(None, (config.caption_column, config.label_column))]
    missing = [column for column in wanted if column not in table.column_names]
    if missing:
        raise InputError(f"{path} has no column {missing[0]}", got=f"columns {', '.join(table.column_names)}")
    import datasets

    images = table.select_columns([config.image_column]).cast_column(config.image_column, datasets.Image(decode=False))
    for number, row in enumerate(table.remove_columns([config.image_column])):
        read = partial(_hf_image, images, number, config.image_column, path)
        yield _example(f"{config.split}[{number}]", row, config.caption_column, config.label_column, read)


def _hf_image(images: Any, number: int, column: str, path: Path) -> bytes:
    return image_bytes(images[number][column], path)


@contextmanager
def _without_retries_told() -> Iterator[None]:
    """The hub's client reports each of its attempts; what comes of the last one is the message."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _load(path: Path, config: ReadConfig) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "format huggingface needs the datasets package", fix="pip install datasets, or export to parquet"
        ) from error
    try:
        if not os.path.isdir(path):
            with _without_retries_told():
                return datasets.load_dataset(path.as_posix(), split=config.split)
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, ConnectionError) as error:
        raise InputError(
            f"the data set {path} cannot be loaded", got=error,
            fix="check its name and the network, or save it with save_to_disk and give the folder",
        ) from error  # fmt: skip
    if not isinstance(found, datasets.DatasetDict):
        return found
    if config.split not in found:
        raise InputError(f"{path} has no split {config.split}", got=f"splits {', '.join(found)}", fix="set read.split")
    return found[config.split]
