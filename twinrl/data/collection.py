"""A folder of captioned pictures as the material of a laboratory: all of one size, in memory, each content once.

What cannot be used is left out and counted. What no laboratory can be built from is refused in one line.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.data import images, readers
from twinrl.data.buckets import Bucket, BucketFit
from twinrl.data.captions import Example, Found, ReadConfig
from twinrl.data.identity import digest, of_bytes
from twinrl.data.parallel import ahead, groups_of
from twinrl.data.prepare import count_reasons
from twinrl.data.problems import TOO_SMALL, Problem, UnusableError
from twinrl.data.verify import image_bytes
from twinrl.flow.source import Split
from twinrl.lab import pictures
from twinrl.lab.build import as_pixels
from twinrl.lab.clip import words_of
from twinrl.lab.material import Material

LEAST, MOST = 200, 50_000
"""Pictures of a laboratory."""
LEAST_CAPTIONS = 5
"""Different captions of a laboratory."""
FLAT = 2.0
"""Standard deviation of a channel's bytes up to which a picture is of one colour."""
SAME = "same picture twice"
WORKERS = 4


class Picture(NamedTuple):
    """A picture at its size.

    Attributes:
        name: where it comes from.
        levels: (3, side, side) bytes.
        caption, label: as read.
        identity: of pixels, caption and label: the order of a collection.
    """

    name: str
    levels: Tensor
    caption: str
    label: str
    identity: str


@dataclass(frozen=True)
class Collection:
    """What a folder holds.

    Attributes:
        format: how it was read.
        pictures: usable ones, in an order that depends on their content alone.
        problems: what was left out.
    """

    format: str
    pictures: Sequence[Picture]
    problems: Sequence[Problem]


def collect(path: Path, config: ReadConfig, side: int, watch: Callable[[int], object]) -> Collection:
    """Read every picture, cut to the square in its middle, at ``side``×``side`` pixels.

    Arguments:
        path: folder or file, as for ``twinrl data prepare``.
        config: how it is read.
        side: in pixels; pictures of less than half of it are left out.
        watch: told how many were looked at.

    Raises:
        InputError: the path or a column is wrong, or there are more than :data:`MOST`.
    """
    name, found = readers.read(path, config)
    if name == "prompts":
        raise InputError(f"{path} holds prompts and no pictures", expected="a folder of pictures with captions")
    if name == "text" and config.label_column:
        raise InputError(
            f"{path} has captions in text files, and no column {config.label_column}",
            fix="write a metadata.jsonl with that key, or leave --label out",
        )
    known: dict[str, Picture] = {}
    problems: list[Problem] = []
    for done, result in enumerate(_read(found, side), 1):
        watch(done)
        if isinstance(result, Picture):
            content = of_bytes(result.levels.numpy().tobytes())
            if content in known:
                result = Problem(result.name, SAME, known[content].name)
            else:
                known[content] = result
        if isinstance(result, Problem):
            problems.append(result)
        if len(known) > MOST:
            raise InputError(f"{path} has too many pictures", expected=f"at most {MOST:,}", fix="take a part of them")
    return Collection(name, sorted(known.values(), key=lambda picture: picture.identity), problems)


def _read(found: Iterator[Found], side: int) -> Iterator[Picture | Problem]:
    with ThreadPoolExecutor(WORKERS) as pool:
        yield from chain.from_iterable(ahead(pool, partial(_picture, side=side), groups_of(found, 16 * WORKERS)))


def _picture(found: Found, side: int) -> Picture | Problem:
    if isinstance(found, Problem):
        return found
    try:
        return _decoded(found, image_bytes(found), side)
    except UnusableError as error:
        return error.of(found.name)


def _decoded(example: Example, data: bytes, side: int) -> Picture:
    width, height = images.upright_size(data)
    if min(width, height) < side / 2:
        raise UnusableError(TOO_SMALL, f"{width}×{height}")
    image = images.decode(data, least=2 * side)
    square = min(image.size)
    left, top = (image.width - square) / 2, (image.height - square) / 2
    fit = BucketFit(Bucket(side, side), (left, top, left + square, top + square))
    levels = ((images.pixels(image, fit) + 1) * 127.5).round().to(torch.uint8)
    identity = digest(of_bytes(levels.numpy().tobytes()), example.caption, example.label)
    return Picture(example.name, levels, example.caption, example.label, identity)


# --- what no laboratory can be built from ---------------------------------------------------------------------------


def check(path: Path, found: Collection, context: int) -> None:
    """Raises InputError, in one line, where a laboratory of these pictures could teach nothing.

    Arguments:
        path: where they come from. found: the pictures. context: tokens of a caption, start and end among them.
    """
    n = len(found.pictures)
    if n < LEAST:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in count_reasons(found.problems).items())
        raise InputError(
            f"{path} has {n} usable pictures", got=f"left out: {reasons}" if reasons else None,
            expected=f"{LEAST} to {MOST:,} different ones with captions", fix=_remedy(found.problems),
        )  # fmt: skip
    flat = sum(bool(picture.levels.float().flatten(1).std(1).max() <= FLAT) for picture in found.pictures)
    if flat > n / 2:
        raise InputError(f"{flat} of the {n} pictures in {path} are of one colour", expected="pictures of something")
    captions = Counter(tuple(words_of(picture.caption)[: context - 2]) for picture in found.pictures)
    if len(captions) < LEAST_CAPTIONS:
        (commonest, _), *_ = captions.most_common(1)
        raise InputError(
            f"the captions in {path} hardly differ in their first {context - 2} words",
            got=f"{len(captions)} of them, as '{' '.join(commonest)[:80]}'", expected=f"{LEAST_CAPTIONS} or more",
            fix="give captions that say what is to be seen",
        )  # fmt: skip


def _remedy(problems: Sequence[Problem]) -> str | None:
    reasons = count_reasons(problems)
    if not reasons:
        return "add pictures"
    worst = next(iter(reasons))
    example = next(problem for problem in problems if problem.reason == worst)
    return f"see to '{worst}', as in {example.name}" + (f" ({example.detail})" if example.detail else "")


def material_of(path: Path, found: Collection, name: str, label: str | None) -> tuple[Material, dict[str, Any]]:
    """What a laboratory is built from, and what is told of it.

    Arguments:
        path: where the pictures come from. found: they are checked. name: of the laboratory.
        label: column of the classes' names; None has them found in clusters.

    Raises:
        InputError: the column names no classes.
    """
    names = [picture.label for picture in found.pictures]
    labels, classes = torch.zeros(len(names), dtype=torch.long), tuple[str, ...]()
    if label is not None:
        labels, classes = _classes(path, names, label)
    parts = pictures.split_rows(labels)
    splits = {split: _split(found.pictures, rows, labels) for split, rows in parts.items()}
    made = pictures.material(name, splits, classes)
    about = {
        "from": str(path.resolve()) if path.exists() else str(path),
        "format": found.format,
        "label": label,
        "left_out": count_reasons(found.problems),
    }
    return made, about


def _classes(path: Path, names: Sequence[str], label: str) -> tuple[Tensor, tuple[str, ...]]:
    if not any(names):
        raise InputError(f"{path} has no column {label}", fix="name a column of classes, or leave --label out")
    labels, classes = pictures.classes_of(names)
    if len(classes) < 2:
        raise InputError(
            f"column {label} has {len(classes)} classes of {pictures.LEAST} pictures or more",
            got=f"{len(set(names))} different values", expected="2 or more",
            fix="name another column, or leave --label out: classes are then found in clusters",
        )  # fmt: skip
    if len(classes) > pictures.MOST_CLASSES:
        raise InputError(
            f"column {label} has {len(classes)} classes", expected=f"at most {pictures.MOST_CLASSES}",
            fix="name a coarser column, or leave --label out: classes are then found in clusters",
        )  # fmt: skip
    return labels, classes


def _split(found: Sequence[Picture], rows: Tensor, labels: Tensor) -> Split:
    chosen = [found[row] for row in rows.tolist()]
    levels = torch.stack([picture.levels for picture in chosen])
    return Split(as_pixels(levels), labels[rows], [picture.caption for picture in chosen])
