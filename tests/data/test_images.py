"""Every kind of picture comes out upright, RGB and in range; every kind of damage is one kind of error."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.tiny import encoded, picture
from twinrl.data.buckets import Bucket, BucketFit
from twinrl.data.images import decode, pixels, upright_size
from twinrl.data.problems import CORRUPT, UnusableError

WHOLE = (0.0, 0.0, 40.0, 20.0)


def values(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "LA", "RGBA", "PA"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    format = "TIFF" if mode in ("CMYK", "PA") else "PNG"
    image = picture(40, 20, mode="RGB").convert(mode.replace("PA", "P"))
    assert values(encoded(image, format)).shape == (20, 40, 3)


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 128))
    found = values(encoded(image))
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[0, 1].tolist() == [255, 127, 127]
    assert found[3, 3].tolist() == [255, 255, 255]
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 255])
    assert values(encoded(palette, transparency=0))[0, 0].tolist() == [255, 255, 255]


def test_16_bits_become_8() -> None:
    ramp = np.linspace(0, 65535, 40 * 20).reshape(20, 40).astype(np.uint16)
    found = values(encoded(Image.fromarray(ramp)))
    assert np.abs(found[..., 0] - ramp / 257).max() <= 0.5
    assert found.min() == 0
    assert found.max() == 255
    clear = values(encoded(Image.fromarray(ramp), transparency=int(ramp[0, 3])))
    assert clear[0, :5, 0].tolist() == [*found[0, :3, 0], 255, found[0, 4, 0]]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_known_from_the_header(orientation: int, format: str) -> None:
    image = picture(40, 20)
    image.paste((255, 0, 0), (0, 0, 10, 10))  # the marked corner
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, format, exif=exif, quality=95)
    found = values(data)
    assert found.shape[1::-1] == upright_size(data) == ((40, 20) if orientation < 5 else (20, 40))
    corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    red, green, blue = found[corner[orientation]]
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"])
def test_truncated_files_are_damaged(format: str) -> None:
    data = encoded(picture(64, 64), format)
    decode(data)
    for part in (0.0, 0.1, 0.5, 0.9):
        with pytest.raises(UnusableError) as error:
            decode(data[: int(part * len(data))])
        assert error.value.reason == CORRUPT


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_mangled_files_never_raise_anything_else() -> None:
    generator = np.random.default_rng(0)
    outcomes = {"whole": 0, "damaged": 0}
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "AVIF"):
        clean = encoded(picture(32, 32), format)
        for _ in range(60):
            data = bytearray(clean)
            for at in generator.integers(0, min(200, len(data)), 4):
                data[at] = generator.integers(256)
            try:
                upright_size(bytes(data))
                decode(bytes(data))
                outcomes["whole"] += 1
            except UnusableError:
                outcomes["damaged"] += 1
    assert min(outcomes.values()) > 20


@pytest.mark.parametrize("data", [b"", b"just text", b"%PDF-1.4 something"])
def test_other_files_are_no_images(data: bytes) -> None:
    for read in (upright_size, decode):
        with pytest.raises(UnusableError, match="corrupt image"):
            read(data)


def test_formats_that_pillow_lacks_are_named() -> None:
    if "HEIF" not in Image.OPEN:  # its plug-in is not installed
        with pytest.raises(UnusableError, match="HEIF, which Pillow cannot read here: pip install pillow-heif"):
            decode(b"\0\0\0\x18ftypheic" + bytes(100))
    with pytest.raises(UnusableError, match="unknown format"):
        decode(encoded(picture(8, 8), "EPS"))  # Pillow would start another program


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    red, green, blue = values(encoded(first, format, save_all=True, append_images=[second]))[4, 4]
    assert red > 240
    assert max(green, blue) < 15


def test_pixels_of_unknown_range_are_refused() -> None:
    for image in (Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 1_000_000)):
        with pytest.raises(UnusableError):
            decode(encoded(image, "TIFF"))


def test_pixels_are_in_range_and_the_box_is_what_is_seen() -> None:
    image = Image.new("RGB", (40, 20), (0, 0, 0))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    whole = pixels(image, BucketFit(Bucket(20, 10), WHOLE))
    assert whole.shape == (3, 10, 20)
    assert whole.dtype == torch.float32
    assert (whole.min(), whole.max()) == (-1, 1)
    assert bool((pixels(image, BucketFit(Bucket(10, 10), (30.0, 0.0, 40.0, 20.0))) == 1).all())
    assert bool((pixels(image, BucketFit(Bucket(10, 10), (0.0, 0.0, 10.0, 20.0))) == -1).all())
