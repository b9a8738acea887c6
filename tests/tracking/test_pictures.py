"""Figures among a run's charts: there once, however often the report is made."""

import shutil
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from twinrl.config.errors import InputError
from twinrl.tracking import pictures, store


@pytest.mark.parametrize("content", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n%%EndComments\n"])
def test_what_is_no_png_is_not_opened(content: bytes, tmp_path: Path) -> None:
    """Of EPS Pillow would start Ghostscript."""
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.png is no whole PNG; got cannot identify"):
        pictures.opened(tmp_path / "a.png")


def test_a_picture_that_is_cut_off_or_too_large_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.effect_noise((64, 64), 50).save(path)
    whole = path.read_bytes()
    assert pictures.opened(path).size == (64, 64)
    path.write_bytes(whole[:1000])
    with pytest.raises(InputError, match="is no whole PNG"):
        pictures.opened(path)
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + whole[24:29]
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    with pytest.raises(InputError, match="decompression bomb"):
        pictures.opened(path)


@pytest.mark.slow
def test_a_picture_takes_the_place_of_the_one_before(tmp_path: Path, empty_store: Path) -> None:
    shutil.copy(empty_store, tmp_path)
    client = store.connect(store.default_uri(tmp_path))
    experiment = client.create_experiment("e", (tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    pictures.show(client, run, [], "report")
    assert pictures.SHOWN_TAG not in client.get_run(run).data.tags
    for shade, size in (("red", (100, 50)), ("blue", (3000, 1500))):
        Image.new("RGB", size, shade).save(tmp_path / "norms.png")
        pictures.show(client, run, [tmp_path / "norms.png"], "report")
    (preview, whole) = sorted(Path(file.path).name for file in client.list_artifacts(run, "images"))
    assert whole.startswith("report~norms+step+0+timestamp+0+")
    kept = tmp_path / "artifacts" / run / "artifacts" / "images"
    with Image.open(kept / whole) as image, Image.open(kept / preview) as small:
        assert (image.size, image.convert("RGB").getpixel((0, 0))) == ((3000, 1500), (0, 0, 255))
        assert small.size == (1400, 700)
    assert client.get_run(run).data.tags[pictures.SHOWN_TAG] == "True"
