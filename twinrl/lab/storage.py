"""Files of built artefacts: content hashes, atomic publication under a lock, errors that name the file."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors import SafetensorError
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine import tensors as safetensors

SILENT_SECONDS = 5.0
"""A longer wait for another process is said."""


def content_hash(tensors: Mapping[str, Mapping[str, Tensor]], texts: object) -> str:
    """SHA-256 of named groups of tensors (names, dtypes, shapes, bytes) and of a JSON-able ``texts``.

    A function of the content alone: the order of names, the device and the memory layout do not matter.
    """
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode())
    for group in sorted(tensors):
        for name in sorted(tensors[group]):
            value = tensors[group][name].detach().cpu().contiguous()
            digest.update(f"{group}/{name}/{value.dtype}/{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def publish(path: Path, write: Callable[[Path], object]) -> None:
    """Make ``path``, a file or folder, by ``write(temporary path)`` unless it exists; all or nothing.

    Processes that want the same path wait for the first one, whose lock dies with it.

    Raises:
        InputError: the folder cannot be written.
    """
    if os.path.exists(path):
        return
    with _locking(path) as file:
        try:
            files.lock(file, TimeoutError(path), SILENT_SECONDS)
        except TimeoutError:
            logging.getLogger(__name__).warning("another process makes %s: waiting for it", path)
            files.lock(file, TimeoutError(path), patience=math.inf)
        if not path.exists():
            with files.publishing(path) as new:
                write(new)


def _locking(path: Path) -> IO[str]:
    """The file that those who want ``path`` lock, open."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return (path.parent / f".{path.name}.lock").open("a")
    except OSError as error:
        raise InputError(
            f"the folder {path.parent} cannot be written", got=error.strerror,
            fix="set TWINRL_CACHE, or data.root or --to where that lies in it, to a writable folder",
        ) from error  # fmt: skip


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    safetensors.write(path, tensors)


def load_tensors(path: Path, delete: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Arguments:
        path: the file.
        delete: what the error message advises to delete.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        return safetensors.load(path)
    except (*files.GONE, SafetensorError) as error:
        raise damaged(path, delete, str(error)) from error


def load_json(path: Path, delete: Path) -> dict[str, object]:
    """Read a JSON object; errors as ``load_tensors``."""
    try:
        files.check_plain(path)
        return json.loads(path.read_text())
    except (*files.GONE, ValueError, RecursionError) as error:
        raise damaged(path, delete, str(error)) from error


def damaged(path: Path, delete: Path, why: str) -> InputError:
    """The error for a cached file that cannot be used."""
    return InputError(
        f"the cached file {path} is damaged: {why}",
        fix=f"delete {delete}; what twinrl builds by itself comes back on next use",
    )
