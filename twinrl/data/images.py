"""Images as training wants them: upright, RGB, 8 bits, complete; whatever is not so raises one kind of error."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import import_module
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from twinrl.data.buckets import BucketFit
from twinrl.data.problems import CORRUPT, UnusableError

SUFFIXES = frozenset({
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif",
    ".hif", ".jp2", ".jxl",
})  # fmt: skip
"""File names that promise an image."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "HEIF", "JPEG2000", "JXL", "PPM")
"""Pillow's names of what is read, whatever a file is called: none of them starts another program, as EPS does."""

PLUGINS = {"AVIF": "pillow>=11.3", "HEIF": "pillow-heif", "JXL": "pillow-jxl-plugin"}
"""Formats that not every Pillow reads → what to install."""

BRANDS = {b"avi": "AVIF", b"hei": "HEIF", b"hev": "HEIF", b"mif": "HEIF", b"msf": "HEIF"}  # what follows "ftyp"

DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
    struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on files that are cut off, mangled or of another kind."""

ORIENTATION, SIDEWAYS = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
TURNED = ("HEIF", "JXL")  # formats with an orientation of their own, which decoders apply; that of EXIF is void there


@cache
def _formats() -> tuple[str, ...]:
    """Those of FORMATS that Pillow reads here, with its plug-ins."""
    Image.init()
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")  # registers itself
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The image in a file; what goes wrong inside is an UnusableError."""
    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UnusableError(CORRUPT, _unknown(data)) from error
    except DAMAGE as error:
        raise UnusableError(CORRUPT, _describe(error)) from error


def _unknown(data: bytes) -> str:
    """What a file is that Pillow does not know."""
    jxl = data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL "))
    name = "JXL" if jxl else BRANDS.get(data[8:11], "") if data[4:8] == b"ftyp" else ""
    if not name or name in _formats():
        return f"damaged {name}" if name else "no image, or of an unknown format"
    return f"{name}, which Pillow cannot read here: pip install {PLUGINS[name]}, or convert it"


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) after the EXIF rotation, from the header alone but for TIFF, which Pillow turns by itself.

    Raises:
        UnusableError: the header is not an image's.
    """
    with _opened(data) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":
        return _upright(image).size
    width, height = image.size
    sideways = image.format not in TURNED and image.getexif().get(ORIENTATION) in SIDEWAYS
    return (height, width) if sideways else (width, height)


def _upright(image: Image.Image) -> Image.Image:
    return image if image.format in TURNED else ImageOps.exif_transpose(image)


def decode(data: bytes, least: int | None = None) -> Image.Image:
    """The whole image, upright and in RGB; of a large JPEG a smaller copy, where ``least`` pixels a side are enough.

    EXIF rotation is applied, transparency is laid on white, 16 bits a channel become 8, of an animation the first
    frame is taken; colour profiles are ignored.

    Raises:
        UnusableError: the file is damaged or cut off, its header says another size, or its pixels have no known range.
    """
    with _opened(data) as image:
        if least is not None and image.format == "JPEG":
            image.draft(None, (least, least))
        expected = _upright_size(image)
        image.load()
        upright = _to_rgb(_upright(image))
    if upright.size != expected:
        raise UnusableError(CORRUPT, f"the header says {expected} and the pixels are {upright.size}")
    return upright


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
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if (clear := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def pixels(image: Image.Image, fit: BucketFit) -> Tensor:
    """(3, H, W) float32 in [−1, 1]: the fitted part of an RGB image at its bucket's size (Lanczos, antialiased)."""
    resized = image.resize((fit.bucket.width, fit.bucket.height), Image.Resampling.LANCZOS, box=fit.box)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 127.5 - 1


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return type(error).__name__ if not text or "BytesIO" in text else text[:200]
