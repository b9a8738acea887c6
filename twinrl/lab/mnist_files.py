"""The MNIST files: found, fetched where missing, checked, and cut into splits.

Four idx files in torchvision's layout, ``ROOT/MNIST/raw/t10k-images-idx3-ubyte[.gz]`` and so on, plain
or gzip; or directly in ``ROOT``.
"""

import hashlib
import http.client
import logging
import math
import struct
import urllib.request
import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.flow.source import Split
from twinrl.lab.storage import publish

logger = logging.getLogger(__name__)

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""md5 of the gzip files, as torchvision checks them."""


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, plain or gzip (told apart by content, not by suffix).

    The format: two zero bytes, the type (8 = unsigned byte), the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the values.

    Raises:
        InputError: the file is unreadable, of another format, or not as long as its header says.
    """
    try:
        payload = _unpacked(path.read_bytes())
    except (OSError, zlib.error) as error:
        raise InputError(f"cannot read {path}", got=error, fix="replace it by the original") from error
    if not b"\0\0\x08".startswith(payload[:3]):
        found = f"first bytes {payload[:4]!r}"
        raise InputError(f"{path} is no idx file of bytes", got=found, expected=r"b'\x00\x00\x08…'")
    dimensions = payload[3] if len(payload) > 3 else 0
    start = 4 + 4 * dimensions
    _check_length(path, payload, start, at_least=True)
    shape = struct.unpack(f">{dimensions}I", payload[4:start])
    _check_length(path, payload, start + math.prod(shape))
    return np.frombuffer(payload, dtype=np.uint8, offset=start).reshape(shape)


def _check_length(path: Path, payload: bytes, expected: int, at_least: bool = False) -> None:
    if len(payload) == expected or (at_least and len(payload) > expected):
        return
    raise InputError(
        f"{path} {'is truncated' if len(payload) < expected else 'is longer than its header says'}",
        got=f"{len(payload)} bytes (unpacked)",
        expected=f"{expected} bytes",
        fix="delete the file and fetch it again",
    )


def _unpacked(payload: bytes) -> bytes:
    """``payload`` itself, or what it holds if it is gzip; a cut file gives its beginning and no exception."""
    if payload[:2] != b"\x1f\x8b":
        return payload
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(payload)


def _folders(root: Path) -> tuple[Path, Path]:
    """Where files are looked for: torchvision's layout first, then the folder itself."""
    return root / "MNIST" / "raw", root


def _find(root: Path, name: str) -> Path | None:
    """The plain or gzip file called ``name`` under ``root``, if it is there."""
    candidates = (folder / (name + suffix) for folder in _folders(root) for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def download(name: str, folder: Path) -> Path:
    """Fetch one idx file (gzip) into ``folder`` from the first mirror whose copy has the known md5.

    Raises:
        InputError: no mirror could be reached or none had the right file, or ``folder`` cannot be written.
    """
    failures = []
    for mirror in MIRRORS:
        try:
            with urllib.request.urlopen(f"{mirror}{name}.gz", timeout=20) as reply:
                payload = reply.read()
        except (OSError, http.client.HTTPException) as error:
            failures.append(f"{mirror}: {error}")
            continue
        if (digest := hashlib.md5(payload, usedforsecurity=False).hexdigest()) == MD5[name]:
            return _store(payload, folder / f"{name}.gz")
        failures.append(f"{mirror}: md5 {digest} in place of {MD5[name]}")
    raise InputError(
        f"MNIST file {name}[.gz] is neither in {folder} nor in {folder.parents[1]}, nor could it be fetched",
        got=", ".join(failures),
        fix="copy the idx files there, point data.root at a folder that has them, or go online once",
    )


def _store(payload: bytes, path: Path) -> Path:
    def write(part: Path) -> None:
        part.write_bytes(payload)

    try:
        publish(path, write)
    except OSError as error:
        raise InputError(f"cannot write {path}", got=error, fix="point data.root at a writable folder") from error
    logger.info("downloaded %s (%d bytes)", path, len(payload))
    return path


def _read_pair(root: Path, part: str) -> Split:
    """The digits of ``part`` ("train" or "t10k") with their labels, downloaded where a file is missing."""
    names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    images_path, labels_path = (_find(root, name) or download(name, _folders(root)[0]) for name in names)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if not len(images) or images.shape[1:] != (28, 28):
        _refuse(f"{images_path} holds no MNIST digits", f"an array {images.shape}", "(N, 28, 28)")
    if labels.shape != images.shape[:1]:
        _refuse(f"{labels_path} does not belong to {images_path}", f"{labels.size} labels", f"{len(images)}")
    if labels.max() > 9:
        _refuse(f"{labels_path} holds no digit labels", f"label {labels.max()}", "0 to 9")
    pixels = torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1).unsqueeze(1)
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


def _refuse(what: str, got: str, expected: str) -> NoReturn:
    raise InputError(what, got=got, expected=expected, fix="replace it by the original file")


def read_splits(root: Path) -> tuple[Split, Split, Split]:
    """Train, validation and test digits from the idx files under ``root``; the same rows every time.

    Full set: 55,000 / 5,000 of the training file and the 10,000 of t10k. Only the t10k files there:
    8,000 / 1,000 / 1,000 of them. Both cuts are stratified by label. Nothing there: downloaded.
    """
    if not _find(root, "t10k-images-idx3-ubyte") or any(_find(root, n) for n in MD5 if n.startswith("train")):
        train, validation = _cut(_read_pair(root, "train"), 12, 1)
        return train, validation, _read_pair(root, "t10k")
    logger.warning("MNIST under %s: only the 10,000 t10k digits, cut into 8,000 / 1,000 / 1,000", root)
    train, validation, test = _cut(_read_pair(root, "t10k"), 10, 2)
    return train, validation, test


def _cut(digits: Split, parts: int, held_out: int) -> list[Split]:
    """All but ``held_out`` of ``parts`` equal, stratified parts, then each held-out part."""
    shuffled = torch.randperm(len(digits), generator=draws.generator(0, "mnist split"))
    dealt = torch.empty(len(digits), dtype=torch.int64)
    dealt[shuffled[digits.labels[shuffled].argsort(stable=True)]] = torch.arange(len(digits)) % parts
    chosen = [dealt >= held_out, *(dealt == part for part in range(held_out))]
    return [Split(digits.pixels[rows], digits.labels[rows]) for rows in chosen]
