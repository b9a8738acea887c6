"""A launcher's restart goes on; a second start by hand does not."""

import json
import os
from pathlib import Path

import pytest

from tests.fake_source import small
from twinrl.fsdp import restart
from twinrl.run.layout import ENVIRONMENT
from twinrl.training.runs import RunDirectory


def begun(folder: Path, *launchers: str) -> RunDirectory:
    settings = small(folder)
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False, launchers=launchers)
    return run


def test_without_a_launcher_nothing_is_a_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert restart.launch() == ""
    assert not begun(tmp_path, "").begun_by([restart.launch()])


def test_a_launcher_is_told_by_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    name = restart.launch()
    assert name == restart.launch()
    parent = os.getppid()
    assert f":{parent}:" in name
    monkeypatch.setattr("os.getppid", lambda: parent + 1)
    assert restart.launch() != name


def test_a_restart_is_one_of_a_launcher_that_began_the_run(tmp_path: Path) -> None:
    run = begun(tmp_path, "a:1:7", "b:1:7")
    assert run.begun_by(["c:1:9", "b:1:7"])  # the machine a was lost, c has come in its place
    assert not run.begun_by(["a:1:8"])
    assert not run.begun_by(["c:1:9"])
    run.joined_by(["c:1:9", "b:1:7"])
    assert run.begun_by(["c:1:9", "d:1:9"])  # and b was lost as well
    assert "python" in (run.path / ENVIRONMENT).read_text()


def test_what_a_kill_has_left_half_written_is_no_beginning(tmp_path: Path) -> None:
    run = begun(tmp_path, "a:1:7")
    (run.path / ENVIRONMENT).write_text(json.dumps({"launchers": ["a:1:7"]})[:10])
    assert not run.begun_by(["a:1:7"])
