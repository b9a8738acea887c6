"""Folders of pictures as the material of a laboratory: what is taken, and what is refused before time is spent."""

import io
import json
import struct
import zlib

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from tests.lab import made
from twinrl.config.errors import InputError
from twinrl.data import images
from twinrl.data.captions import ReadConfig
from twinrl.data.collection import LEAST, check, collect, material_of

N = LEAST + 4
CONTEXT = 24


def write(folder, pictures, captions, **more):
    """PNG files and a metadata.jsonl; ``more`` has further columns."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        name = f"{number:04}.png"
        if isinstance(picture, bytes):
            (folder / name).write_bytes(picture)
        else:
            picture.save(folder / name, "TIFF" if picture.mode == "CMYK" else "PNG")
        line = {"file_name": name, **{key: values[number] for key, values in more.items()}}
        lines.append(json.dumps(line if caption is None else line | {"text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def noise(seed, side=40, mode="RGB"):
    """A picture like no other."""
    bands = {"L": (), "RGB": (3,), "CMYK": (4,), "I;16": ()}[mode]
    dtype = np.uint16 if mode == "I;16" else np.uint8
    levels = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, (side, side, *bands), dtype)
    return Image.frombytes(mode, (side, side), levels.tobytes())


def animated(seed):
    buffer = io.BytesIO()
    noise(seed).save(buffer, "GIF", save_all=True, append_images=[noise(seed + 1000)])
    return buffer.getvalue()


def huge():
    """The header of a PNG of 200 megapixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def taken(folder, label=None, side=32):
    found = collect(folder, ReadConfig(label_column=label), side, lambda done: None)
    check(folder, found, CONTEXT)
    return found, material_of(folder, found, "made", label)[0]


@pytest.mark.parametrize("make", [noise, animated, lambda i: noise(i, mode="CMYK"), lambda i: noise(i, mode="I;16")])
def test_what_a_picture_can_be(tmp_path, make):
    found, material = taken(write(tmp_path / "p", map(make, range(N)), [f"picture {i % 9}" for i in range(N)]))
    assert len(found.pictures) == N
    assert not found.problems
    assert material.splits["train"].pixels.shape == (N - 52, 3, 32, 32)


def test_the_square_in_the_middle_is_taken_at_the_size(tmp_path):
    wide = [Image.new("RGB", (120, 40), "white") for _ in range(N)]
    for number, page in enumerate(wide):
        page.paste(noise(number), (40, 0))
    found, _ = taken(write(tmp_path / "p", wide, [f"picture {i % 9}" for i in range(N)]), side=40)
    whole, _ = taken(write(tmp_path / "q", map(noise, range(N)), [f"picture {i % 9}" for i in range(N)]), side=40)
    assert [p.levels.tolist() for p in found.pictures] == [p.levels.tolist() for p in whole.pictures]


def test_a_large_jpeg_is_read_at_a_smaller_size(tmp_path):
    """The scene at a sixteenth of its size, whichever way it comes there."""
    scene = noise(0, side=8).resize((2048, 1536), Image.Resampling.BICUBIC)
    scene.save(tmp_path / "large.jpg", quality=95)
    data = (tmp_path / "large.jpg").read_bytes()
    small = images.decode(data, least=64)
    assert small.size == (256, 192) or small.size == (512, 384)
    wanted = np.asarray(scene.resize(small.size, Image.Resampling.BOX), float)
    assert np.abs(np.asarray(small, float) - wanted).mean() < 3  # of 255; JPEG at this quality: about 1
    assert images.decode(data).size == (2048, 1536)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda i: noise(0), "1 usable pictures.*same picture twice"),
        (lambda i: noise(i, side=3), "0 usable pictures.*too small.*3×3"),
        (lambda i: Image.new("RGB", (40, 40), (i, 255 - i, 7)), "of one colour"),
        (lambda i: huge(), "0 usable pictures.*corrupt image"),
        (lambda i: b"no picture", "0 usable pictures.*corrupt image"),
        (lambda i: b"", "0 usable pictures.*corrupt image"),
    ],
)
def test_pictures_that_teach_nothing_are_refused_in_one_line(tmp_path, make, message):
    folder = write(tmp_path / "p", map(make, range(N)), [f"picture {i % 9}" for i in range(N)])
    with pytest.raises(InputError, match=message) as caught:
        taken(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (lambda i: "always the same", "hardly differ"),
        (lambda i: "word " * 2000 + str(i), "hardly differ in their first 22 words"),
        (lambda i: "   ", "empty caption"),
        (lambda i: None, "no caption"),
    ],
)
def test_captions_that_teach_nothing_are_refused_in_one_line(tmp_path, caption, message):
    with pytest.raises(InputError, match=message) as caught:
        taken(write(tmp_path / "p", map(noise, range(N)), map(caption, range(N))))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_long_captions_that_differ_at_once_are_taken(tmp_path):
    found, _ = taken(write(tmp_path / "p", map(noise, range(N)), [f"{i} " + "word " * 2000 for i in range(N)]))
    assert len(found.pictures) == N


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (lambda i: i, "has 1 classes of 16 pictures or more"),
        (lambda i: "all", "has 1 classes"),
        (lambda i: None, "has no column kind"),
    ],
)
def test_columns_that_name_no_classes_are_refused(tmp_path, values, message):
    captions = [f"picture {i % 9}" for i in range(N)]
    folder = write(tmp_path / "p", map(noise, range(N)), captions, kind=[values(i) for i in range(N)])
    with pytest.raises(InputError, match=message):
        taken(folder, "kind")


def test_prompts_alone_and_an_empty_folder_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    with pytest.raises(InputError, match="no pictures"):
        taken(tmp_path / "prompts.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no images"):
        taken(tmp_path / "empty")
    with pytest.raises(InputError, match="no file or folder"):
        taken(tmp_path / "nowhere")


def test_a_folder_of_text_files_has_no_column(tmp_path):
    for number in range(N):
        noise(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"picture {number % 9}")
    assert len(taken(tmp_path)[0].pictures) == N
    with pytest.raises(InputError, match="no column kind"):
        taken(tmp_path, "kind")


def test_classes_of_a_table(tmp_path):
    rows = [made.drawn(number) for number in range(N)]
    cells = []
    for page, _, _ in rows:
        buffer = io.BytesIO()
        page.save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    table = {"image": cells, "text": [row[1] for row in rows], "shape": [row[2] for row in rows]}
    parquet.write_table(pyarrow.table(table), tmp_path / "p.parquet")
    _, material = taken(tmp_path / "p.parquet", "shape")
    assert material.classes == ("circle", "letter", "square")
    with pytest.raises(InputError, match=r"has no column kind.*label_column"):
        taken(tmp_path / "p.parquet", "kind")
