"""``twinrl evaluate RUN --prompts FILE``: a run, two runs, a run and a pipeline; resumed, compared, refused."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest

from tests.backends.families import tiny
from tests.fake_source import register, small
from tests.training.trainers import finish
from twinrl import cli


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    register(monkeypatch)
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a dark picture\na bright picture\n")


def made(name: str, *overrides: str) -> Path:
    return finish(small(Path(name), "train.steps=2", "checkpoint.every=2", *overrides)).run.path


def evaluated(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["twinrl", "evaluate", *map(str, arguments), "--prompts", "prompts.txt"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_run_is_judged_by_what_its_data_hold_out(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("runs")
    assert evaluated(monkeypatch, run, "--seeds", 2, "--nfe", 1) == 0
    folder = run / "evaluation" / "prompts-prompts"
    rows = list(csv.DictReader((folder / "scores.csv").open()))
    assert {(row["prompt"], row["seed"], row["judge"]) for row in rows} == {
        (f"0000{i}", str(seed), "brightness") for i in (0, 1) for seed in (0, 1)
    }
    assert len(list(folder.rglob("*.png"))) == 4
    assert "a dark picture" in (folder / "index.html").read_text()


def test_two_runs_from_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run against a copy of itself: every image is equal, so nobody wins."""
    first = made("runs")
    again = finish(small(Path("other"), "train.steps=2", "checkpoint.every=2")).run.path
    assert evaluated(monkeypatch, first, "--against", again, "--out", "both", "--judge", "brightness") == 0
    found = json.loads(Path("both/summary.json").read_text())["brightness"]
    assert found["difference"]["value"] == 0
    assert found["wins"] == 0.5


def test_the_same_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    run = made("runs")
    assert evaluated(monkeypatch, run, "--out", "out") == 0
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}
    assert evaluated(monkeypatch, run, "--out", "out") == 0
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")} == before


@pytest.mark.slow
def test_a_pipeline_beside_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny.build("sd3").save_pretrained(tmp_path / "pipeline")
    given = ("--pipeline", tmp_path / "pipeline", "--nfe", 1, "--seeds", 1, "--judge", "brightness")
    assert evaluated(monkeypatch, made("runs"), *given, "--out", "out") == 0
    assert {path.name for path in Path("out").iterdir() if path.is_dir()} >= {"pipeline"}
    assert set(json.loads(Path("out/summary.json").read_text())["brightness"]["mean"]) >= {"pipeline"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one model is evaluated, or two are compared"),
        (("--against", "x"), "no run|cannot|not there|x"),
        (("--pipeline", "nothing"), "no folder nothing"),
        (("--pipeline", "nothing", "--judge", "applause"), "applause"),
        (("--pipeline", "nothing", "--judge", "{kind: "), "--judge cannot be read"),
    ],
)
def test_refused_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert evaluated(monkeypatch, *arguments, "--out", "out") == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list(Path().rglob("*.png"))


def test_options_of_prompts_without_prompts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["twinrl", "evaluate", "run", "--pipeline", "x"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "--pipeline is of an evaluation on prompts" in capsys.readouterr().err
