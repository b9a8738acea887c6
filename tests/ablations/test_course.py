"""One bar over the parts of ``ablate run``, and plain lines where there is no terminal."""

from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from ablations import course as courses
from ablations import study as studies
from ablations.course import BUILD, BUILT, CLOSING, Course
from ablations.display import BESIDES
from tests.ablations.tiny import write
from twinrl.lab.progress import show, stages

STEPS, TRIALS = 20, 4


def begun(tmp_path: Path, terminal: bool = False) -> Course:
    console = Console(file=StringIO(), width=100, force_terminal=terminal, force_interactive=terminal)
    return Course(studies.load(write(tmp_path / "study.yaml")), console)


def shown(course: Course) -> str:
    console = Console(file=StringIO(), width=100)
    console.print(course)
    return console.file.getvalue()  # type: ignore[attr-defined]


def build(course: Course, steps: int, of: int = 4) -> None:
    with course.data(Path()), stages("building", of) as stage:
        tick = stage("codec", 1)
        for _ in range(steps):
            tick()


def test_a_build_is_a_part_of_the_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    course = begun(tmp_path)
    whole = BUILD + TRIALS * (STEPS + BESIDES) + CLOSING
    with course, course.data(tmp_path), stages("building", 4) as stage:
        tick = stage("codec", 1)
        tick()
        assert course.made() == BUILD / 4
        assert f"{BUILD / 4 / whole:.0%}" in shown(course)
        assert "building: codec" in shown(course)
    assert course.made() == BUILD  # now that the data are there
    assert capfd.readouterr().err == ""  # a bar of its own would be there


def test_data_that_are_there_cost_nothing(tmp_path: Path) -> None:
    course = begun(tmp_path)
    with course, course.data(tmp_path):
        pass
    assert course.made() == 0


def test_a_build_shows_its_data_before_it_has_ended(tmp_path: Path) -> None:
    course, folder = begun(tmp_path), tmp_path / "studies" / "mine"
    with course, course.data(folder), stages("building", 4):
        show("the data", {"digit": torch.zeros(10, 3, 32, 32), "decoded": torch.ones(10, 3, 32, 32)})
        said = course.console.file.getvalue()  # type: ignore[attr-defined]
        assert said == f"the data: {folder / BUILT}\n"
        with Image.open(folder / BUILT) as picture:
            assert {(128, 128, 128), (255, 255, 255)} < {colour for _, colour in picture.getcolors(1 << 16)}


def test_a_build_goes_on_where_its_picture_cannot_be_written(tmp_path: Path) -> None:
    course = begun(tmp_path)
    with course, course.data(tmp_path / "study.yaml" / "below a file"), stages("building", 4):
        show("the data", {"digit": torch.zeros(1, 3, 8, 8)})
    assert course.console.file.getvalue() == ""  # type: ignore[attr-defined]


def test_plain_lines_tell_a_build_by_tenths(tmp_path: Path) -> None:
    course = begun(tmp_path)
    with course:
        build(course, 100, of=100)
    assert course.console.file.getvalue().split() == [  # type: ignore[attr-defined]
        word for share in range(0, 101, 10) for word in ("building:", "codec", f"{share}%")
    ]  # fmt: skip


def test_time_left_is_told_by_the_pace_of_this_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(courses.time, "monotonic", lambda: clock[0])
    course = begun(tmp_path)
    course.trained.share = course.trained.before = 0.5  # made by an earlier command, in no time of this one
    assert course.left() == ""
    clock[0], course.trained.share = 60.0, 0.75
    quarter = course.trained.work / 4
    assert course.left() == f"{courses.duration(60 / quarter * (quarter + CLOSING))} left"


def test_the_bar_fits_a_narrow_terminal(tmp_path: Path) -> None:
    course = begun(tmp_path)
    course.what = "building the digits lab: " + ", ".join(["preference judge"] * 6)
    console = Console(file=StringIO(), width=60)
    console.print(course)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 1
    assert len(lines[0]) <= 60
