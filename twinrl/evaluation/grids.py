"""Sample grids for people: labelled rows, fixed noise in the columns, small images enlarged without blur."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from twinrl.machine import files, tensors
from twinrl.machine.pixels import as_uint8
from twinrl.run import layout

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

INK, FAINT, PAPER = (32, 33, 36), (110, 114, 120), (255, 255, 255)
_log = logging.getLogger(__name__)

GAP, MARGIN, TEXT, TITLE = 4, 16, 14, 17
TARGET = 72  # least side of an image on the page, in page pixels


def save(picture: "Image", path: Path) -> None:
    """Write a picture, whole or not at all; the format is the suffix's. A PNG says where its images begin."""
    from PIL.PngImagePlugin import PngInfo

    notes = PngInfo()
    if layout.GRID_ORIGIN in picture.info:
        notes.add_text(layout.GRID_ORIGIN, picture.info[layout.GRID_ORIGIN])
    with files.publishing(path) as new:
        picture.save(new, pnginfo=notes)


@dataclass(frozen=True)
class _Layout:
    """Where things are on the page, in page pixels."""

    rows: int
    columns: int
    cell: tuple[int, int]  # width, height
    left: int
    top: int
    foot: int

    @property
    def size(self) -> tuple[int, int]:
        width, height = self.corner(self.rows, self.columns)
        return width - GAP + MARGIN, height - GAP + MARGIN + self.foot

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Upper left corner of an image."""
        return self.left + column * (self.cell[0] + GAP), self.top + row * (self.cell[1] + GAP)


def sample_grid(
    images: Tensor,
    row_labels: Sequence[str],
    column_labels: Sequence[str] | None = None,
    *,
    title: str | None = None,
    note: str | None = None,
    scale: int | None = None,
) -> "Image":
    """Images in rows with a label in words at the left of each, as a picture to look at.

    Arguments:
        images: (R, K, C, H, W) pixels in [−1, 1] (clamped); non-finite pixels are drawn magenta.
        row_labels: R labels, e.g. prompts. column_labels: K short labels above the columns.
        title: above all. note: below all, small.
        scale: whole-number enlargement; by default so that images are at least 72 page pixels wide.

    Returns:
        A PIL image; ``.save(path)`` writes it.
    """
    if images.dim() != 5 or len(images) != len(row_labels):
        raise ValueError(f"expected images (R, K, C, H, W) and R labels, got {tuple(images.shape)}, {len(row_labels)}")
    rows, columns, _, height, width = images.shape
    scale = scale or max(1, -(-TARGET // width))
    left = MARGIN + (max(map(_text_width, row_labels)) + MARGIN // 2 if any(row_labels) else 0)
    top = MARGIN + (TITLE + MARGIN if title else 0) + (TEXT + GAP + 2 if column_labels else 0)
    places = _Layout(rows, columns, (width * scale, height * scale), left, top, TEXT + MARGIN // 2 if note else 0)
    page = _paste(as_uint8(images), places, min_width=MARGIN * 2 + _text_width(title or "", TITLE))
    _annotate(page, places, row_labels, column_labels or (), title, note)
    page.info[layout.GRID_ORIGIN] = f"{left} {top}"
    return page


def _paste(images: np.ndarray, layout: _Layout, min_width: int) -> "Image":
    """The page with the images (R, K, H, W, 3) on it."""
    from PIL import Image

    width, height = layout.size
    page = Image.new("RGB", (max(width, min_width), height), PAPER)
    for row in range(layout.rows):
        for column in range(layout.columns):
            picture = Image.fromarray(images[row, column])
            page.paste(picture.resize(layout.cell, Image.Resampling.NEAREST), layout.corner(row, column))
    return page


def _annotate(
    page: "Image",
    layout: _Layout,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str | None,
    note: str | None,
) -> None:
    from PIL import ImageDraw

    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, _font(TITLE))
    for row, label in enumerate(rows):
        x, y = layout.corner(row, 0)
        draw.text((x - MARGIN // 2, y + layout.cell[1] / 2), label, INK, _font(TEXT), anchor="rm")
    for column, label in enumerate(columns):
        x, y = layout.corner(0, column)
        draw.text((x + layout.cell[0] / 2, y - GAP - 2), label, FAINT, _font(TEXT - 2), anchor="ms")
    if note:
        draw.text((MARGIN, page.height - MARGIN // 2), note, FAINT, _font(TEXT - 2), anchor="lb")


@functools.cache
def _font(size: int) -> "FreeTypeFont":
    """DejaVu Sans, which comes with matplotlib and knows more characters than Pillow's own font."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _text_width(text: str, size: int = TEXT) -> int:
    return int(_font(size).getlength(text)) + 1


def training_grid(
    snapshots: Sequence[Tensor],
    steps: Sequence[int],
    column_labels: Sequence[str] | None = None,
    *,
    title: str | None = None,
) -> "Image":
    """The same noise and prompts over training: one row per evaluation step, so that columns show progress.

    Arguments:
        snapshots: for each step (K, C, H, W) pixels in [−1, 1], equal K and noise throughout.
        steps: training step of each snapshot. column_labels: what each of the K columns was asked for.
    """
    labels = [f"step {step:,}" for step in steps]
    return sample_grid(torch.stack(list(snapshots)), labels, column_labels, title=title or "Same noise over training")


def save_over_training(samples: Path, classes: Sequence[str], path: Path, most: int = 10) -> None:
    """One sample of each class at up to ``most`` of the validations that a run keeps in ``samples``, noise fixed.

    Damaged ones are left out with a warning.
    """
    saved = sorted(samples.glob(f"{layout.STEP}*.safetensors"))
    last = max(1, min(most, len(saved)) - 1)
    chosen = [saved[round(i * (len(saved) - 1) / last)] for i in range(min(most, len(saved)))]
    found = {file: pixels for file in chosen if (pixels := _snapshot(file, len(classes))) is not None}
    for file in chosen:
        if file not in found:
            _log.warning("%s is damaged; %s goes without it", file, path.name)
    if found:
        snapshots = [pixels.float() / 127.5 - 1 for pixels in found.values()]
        save(training_grid(snapshots, [layout.step_of(file) for file in found], classes), path)


def _snapshot(file: Path, rows: int) -> Tensor | None:
    """The samples of a validation, bytes (rows, C, H, W); None where the file is damaged."""
    try:
        pixels = tensors.load(file)["pixels"] if file.is_file() else torch.zeros(0)
    except (OSError, SafetensorError, KeyError):
        return None
    return pixels if pixels.dtype == torch.uint8 and pixels.ndim == 4 and len(pixels) == rows else None


def diversity_grid(images: Tensor, prompt: str, *, nfe: int = 1, columns: int = 10) -> "Image":
    """One prompt, other noise: whether a few-step generator still varies.

    Arguments:
        images: (N, C, H, W) pixels in [−1, 1]; N is cut to whole rows of ``columns``.
        prompt: what all of them were asked for. nfe: network evaluations behind each.
    """
    columns = min(columns, len(images))
    rows = len(images) // columns
    grid = images[: rows * columns].unflatten(0, (rows, columns))
    pixels = grid.flatten(2).double()
    spread = pixels.flatten(0, 1).std(0).mean().item()
    note = f"every image from other noise; mean standard deviation of a pixel {spread:.3f} (range −1 to 1)"
    return sample_grid(grid, [""] * rows, title=f"“{prompt}”, {nfe} NFE", note=note)
