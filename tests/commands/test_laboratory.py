"""``twinrl lab build`` from the folder to the report, and a run on what it has built."""

import json
import warnings

import pytest
from PIL import Image
from rich.console import Console

from tests.lab import made
from twinrl.commands import laboratory
from twinrl.commands.train import train
from twinrl.config.errors import InputError
from twinrl.evaluation import figures as drawn
from twinrl.lab import open_lab
from twinrl.run import layout
from twinrl.training import schema

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(laboratory, "for_pictures", lambda side, minutes: made.TINY)


def build(*, to=None, label="shape", overrides=()):
    """Exit code and output."""
    console = Console(record=True, width=500, force_terminal=False)
    code = laboratory.build(laboratory.Path("pictures"), to, 32, label, None, list(overrides), console)
    return code, console.export_text()


def test_a_folder_becomes_a_laboratory_with_a_report_on_which_one_trains(tmp_path, monkeypatch):
    made.write(tmp_path / "pictures")
    Image.new("RGB", (40, 40)).save(tmp_path / "pictures" / "0.png")  # another content under a known caption
    (tmp_path / "pictures" / "1.png").write_bytes(b"no picture")
    code, out = build()
    assert code == 0
    assert "239 pictures read as format metadata, left out: 1 × corrupt image; classes from column shape" in out
    folder = tmp_path / "cache" / "labs" / "pictures"
    assert Image.open(folder / laboratory.PICTURE).width > 12 * made.TINY.form.side
    page, values = (folder / laboratory.PAGE).read_text(), json.loads((folder / laboratory.VALUES).read_text())
    assert values["round_trip"] > 0
    assert all(line in out for line in values["lines"])
    assert "too weak" in page
    assert open_lab("pictures").test.captions[0]

    code, out = build()
    assert code == 0
    assert "was built before" in out

    for name in ("save_times", "save_curves", "save_norms"):
        monkeypatch.setattr(drawn, name, lambda *arguments: None)
    settings = schema.load(
        "recommended",
        [
            "data={source: lab, lab: pictures}", "train.steps=4", "train.batch=16", "checkpoint.every=2",
            "evaluation={every: 2, n: 20, nfe: [1], teacher_steps: 2, velocity_rows: 5, grid_samples: 1}",
            "tracking.mlflow=false", "machine.threads=1",
        ],
    )  # fmt: skip
    assert settings.model.network.kind == "unet"
    assert train(settings, False, Console(quiet=True)) == 0
    rows = [json.loads(line) for line in (settings.directory / layout.LOG).read_text().splitlines()]
    assert any("val/held_out_score/lab_judge_1nfe" in row for row in rows)
    assert any(f"val/accuracy/{kind}_1nfe" in row for row in rows for kind in made.SHAPES)


def test_what_is_no_laboratory_is_not_replaced(tmp_path):
    made.write(tmp_path / "pictures", 210)
    (tmp_path / "mine").mkdir()
    with warnings.catch_warnings(), pytest.raises(InputError, match="there is no laboratory mine"):
        build(to="./mine")
    with pytest.raises(InputError, match=r"unknown key read\.captions"):
        build(overrides=["read.captions=x"])
