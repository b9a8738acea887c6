"""MNIST (LeCun, Cortes, Burges): 28×28 digits, ten classes, the flow in pixel space.

The files are the four idx files in torchvision's layout, ``ROOT/MNIST/raw/t10k-images-idx3-ubyte[.gz]`` and
so on, plain or gzip. All 70,000 digits are used where they are there, the 10,000 of t10k where only those are,
and a download fills an empty folder. The network is told a class label; captions are words about that label,
so that ``--prompt "a handwritten three"`` and preference models of text both work.
"""

import gzip
import hashlib
import http.client
import logging
import os
import re
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from twinrl import draws
from twinrl.conditions import Condition
from twinrl.data.source import Judge, Scorer, Split, cache_dir
from twinrl.errors import InputError

logger = logging.getLogger(__name__)

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NULL_LABEL = len(CLASSES)
"""Index of the empty condition ∅; networks for MNIST embed ``len(CLASSES) + 1`` labels."""

TEMPLATES = ("a handwritten {}", "the digit {}", "a white {} on black", "the number {}, written by hand")
HELD_OUT_TEMPLATES = ("a pen stroke forming {}", "someone wrote {}")

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/")
MD5 = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""md5 of the gzip files, as torchvision checks them."""


# --- files ------------------------------------------------------------------------------------------------


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
        raise InputError(f"cannot read {path}", got=error, fix="delete it, or replace it by the original") from error
    if payload[:3] != b"\0\0\x08":
        raise InputError(f"{path} is no idx file", got=f"first bytes {payload[:4]!r}", expected=r"b'\x00\x00\x08…'")
    header = 4 + 4 * payload[3]
    shape = np.frombuffer(payload[4:header], dtype=">u4")
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(payload) < header or len(payload) != expected:
        fault = "is truncated" if len(payload) < expected else "has bytes after its end"
        size = f"{len(payload)} bytes (unpacked)"
        raise InputError(f"{path} {fault}", got=size, expected=max(expected, header), fix="delete it and fetch it again")
    return np.frombuffer(payload, dtype=np.uint8, offset=header).reshape(shape)


def _unpacked(payload: bytes) -> bytes:
    """``payload`` itself, or what is left of it behind gzip (a cut file gives its beginning, no exception)."""
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
        f"MNIST file {name}[.gz] is missing and could not be downloaded",
        got=", ".join(failures),
        expected=f"it in {folder} or {folder.parents[1]}",
        fix="copy the idx files there, point data.root at a folder that has them, or go online once",
    )


def _store(payload: bytes, path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, lambda part: part.write_bytes(payload))
    except OSError as error:
        raise InputError(f"cannot write {path}", got=error, fix="point data.root at a writable folder") from error
    logger.info("downloaded %s (%d bytes)", path, len(payload))
    return path


def _write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """``write`` fills a file beside ``path`` that then takes its name: readers never see half a file."""
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    os.close(handle)
    try:
        write(Path(part))
        os.replace(part, path)
    finally:
        Path(part).unlink(missing_ok=True)


def _read_pair(root: Path, part: str) -> Split:
    """The digits of ``part`` ("train" or "t10k") with their labels, downloaded where a file is missing."""
    names = f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"
    images_path, labels_path = (_find(root, name) or download(name, _folders(root)[0]) for name in names)
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.shape[1:] != (28, 28):
        raise InputError(f"{images_path} holds no MNIST digits", got=f"shape {images.shape}", expected="(N, 28, 28)")
    if labels.shape != images.shape[:1]:
        got = f"{labels.shape[0]} labels, shape {labels.shape}"
        raise InputError(f"{labels_path} does not belong to {images_path}", got=got, expected=f"{len(images)} labels")
    if labels.max(initial=0) >= len(CLASSES):
        raise InputError(f"{labels_path} holds no digit labels", got=f"label {labels.max()}", expected="0 to 9")
    pixels = torch.from_numpy(images.astype(np.float32)).div_(127.5).sub_(1).unsqueeze(1)
    return Split(pixels, torch.from_numpy(labels.astype(np.int64)))


# --- splits -----------------------------------------------------------------------------------------------


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


# --- captions ---------------------------------------------------------------------------------------------


def parse_label(prompt: str) -> int:
    """The label that a caption speaks of: a number word or a digit; the empty caption is ∅ (index 10).

    Raises:
        InputError: the caption names no digit, or several.
    """
    if not prompt.strip():
        return NULL_LABEL
    words = re.findall(r"[a-z]+|[0-9]+", prompt.lower())
    labels = {label for label, word in enumerate(CLASSES) if word in words or str(label) in words}
    if len(labels) == 1:
        return labels.pop()
    raise InputError(
        f"MNIST does not understand the prompt {prompt!r}",
        got=f"{len(labels)} digits in it",
        expected=f"exactly one of {', '.join(CLASSES)} (or 0 to 9), as in '{TEMPLATES[0].format('three')}'",
    )


# --- judge ------------------------------------------------------------------------------------------------


class DigitJudge(nn.Module):
    """A small convolutional classifier, frozen, whose 64 features define the quality metrics."""

    steps = 700
    batch = 128

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten()),
            *(nn.Linear(32 * 7 * 7, 64), nn.ReLU()),
        )
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 1, 28, 28) pixels in [−1, 1] → (B, 10) logits."""
        return self.head(self.body(pixels))

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 1, 28, 28) pixels in [−1, 1] → (B, 64) features, non-negative."""
        return torch.cat([self.body(chunk) for chunk in pixels.split(1000)])

    def logits(self, pixels: Tensor) -> Tensor:
        """(B, 1, 28, 28) pixels in [−1, 1] → (B, 10) class logits."""
        return self.head(self.features(pixels))

    @torch.no_grad()
    def accuracy(self, digits: Split) -> float:
        """Share of ``digits`` classified rightly."""
        return (self.logits(digits.pixels).argmax(1) == digits.labels).double().mean().item()

    def freeze(self) -> "DigitJudge":
        """No gradients to the weights, running statistics fixed; gradients to the pixels still flow."""
        return self.eval().requires_grad_(False)


def train_judge(digits: Split) -> DigitJudge:
    """A judge trained on ``digits`` from a fixed start (Adam, one cycle, shifts of up to 2 pixels).

    One thread is used, so that the weights do not depend on how many there are.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            judge = DigitJudge()
        optimizer = torch.optim.Adam(judge.parameters(), lr=4e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=judge.steps)
        for step in _progress(judge.steps, "training the MNIST judge"):
            rows = draws.shuffled_rows(len(digits), judge.batch, seed=0, step=step, purpose="mnist judge")
            loss = functional.cross_entropy(judge(_shifted(digits.pixels[rows], step)), digits.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    finally:
        torch.set_num_threads(threads)
    return judge.freeze()


def _shifted(pixels: Tensor, step: int) -> Tensor:
    """The batch moved by up to 2 pixels each way, background (−1) filling in; one shift for each half batch."""
    padded = functional.pad(pixels, (2, 2, 2, 2), value=-1.0)
    offsets = torch.randint(5, (4, 2), generator=draws.generator(0, "mnist judge shift", step)).tolist()
    parts = zip(padded.chunk(4), offsets, strict=False)
    return torch.cat([part[:, :, top : top + 28, left : left + 28] for part, (top, left) in parts])


def _progress(steps: int, what: str) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    yield from track(range(steps), what, console=Console(stderr=True), transient=True)


def _cached_judge(train: Split, train_hash: str) -> DigitJudge:
    """The judge of these training digits from the cache, else trained and put there; the first writer wins."""
    path = cache_dir() / f"mnist-judge-{train_hash[:16]}.pt"
    if not path.exists():
        judge = train_judge(train)
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _write_atomically(path, lambda part: torch.save(judge.state_dict(), part))
    judge = DigitJudge()
    judge.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return judge.freeze()


# --- the source -------------------------------------------------------------------------------------------


class MNISTSource:
    """MNIST as a :class:`twinrl.data.source.Source`: pixel space, class labels, one held-out scorer.

    Arguments:
        train, validation, test: digits, pixels (N, 1, 28, 28) in [−1, 1].

    *When to use*: the public tutorial's experiment (``data.source=mnist``). Build it with :meth:`load`.
    The judge is trained when first asked for (half a minute) and cached.
    """

    name: str = "mnist"
    latent_shape: tuple[int, int, int] = (1, 28, 28)
    classes: tuple[str, ...] = CLASSES
    held_out: frozenset[str] = frozenset({"judge_logprob"})

    def __init__(self, train: Split, validation: Split, test: Split):
        self.train, self.validation, self.test = train, validation, test
        self.device = torch.device("cpu")

    @classmethod
    def load(cls, root: str | Path | None = None) -> "MNISTSource":
        """The digits under ``root`` (default: ``mnist`` in the cache folder), downloaded if there are none.

        Raises:
            InputError: files are missing and cannot be downloaded, damaged, or not MNIST's.
        """
        return cls(*read_splits(Path(root).expanduser() if root else cache_dir() / "mnist"))
