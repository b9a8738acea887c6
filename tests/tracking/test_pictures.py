"""Figures among a run's charts: there once, however often the report is made."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from twinrl.tracking import pictures, store


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
