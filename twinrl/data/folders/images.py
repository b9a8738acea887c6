"""Images as training wants them: upright, RGB, 8 bits, complete; whatever is not so raises one kind of error."""

import struct
import zlib
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from twinrl.data.folders.buckets import Fit
from twinrl.data.folders.problems import CORRUPT, UnusableError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".jfif"})
"""File names that promise an image."""

DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error,
    zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on files that are cut off, mangled or of another kind."""

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) after the EXIF rotation, from the header alone.

    Raises:
        UnusableError: the header is not an image's.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            width, height = image.size
            return (height, width) if image.getexif().get(ORIENTATION) in SIDEWAYS else (width, height)
    except DAMAGE as error:
        raise UnusableError(CORRUPT, _describe(error)) from error


def decode(data: bytes) -> Image.Image:
    """The whole image, upright and in RGB.

    EXIF rotation is applied, transparency is laid on white, 16 bits a channel become 8, of an animation the first
    frame is taken; colour profiles are ignored.

    Raises:
        UnusableError: the file is damaged or cut off, or its pixels have no known range.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except DAMAGE as error:
        raise UnusableError(CORRUPT, _describe(error)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnusableError(CORRUPT, "floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise UnusableError(CORRUPT, f"integer pixels beyond 16 bits: {values.min()} to {values.max()}")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def pixels(image: Image.Image, fit: Fit) -> Tensor:
    """(3, H, W) float32 in [−1, 1]: the fitted part of an RGB image at its bucket's size (Lanczos, antialiased)."""
    resized = image.resize((fit.bucket.width, fit.bucket.height), Image.Resampling.LANCZOS, box=fit.box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return type(error).__name__ if not text or "BytesIO" in text else text[:200]
