"""A launcher's restart goes on; a second start by hand does not."""

from pathlib import Path

import pytest

from tests.fake_source import small
from twinrl.fsdp import restart
from twinrl.runs import RunDirectory


def test_without_a_launcher_nothing_is_a_restart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    run = begun(tmp_path)
    assert not restart.is_restart()
    assert not run.begun_by(restart.launch())


def test_a_restart_knows_its_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run = begun(tmp_path)
    assert not restart.is_restart()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert restart.is_restart()
    assert run.begun_by(restart.launch())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not run.begun_by(restart.launch())


def test_a_launcher_without_a_name_is_told_by_its_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    name = restart.launch()
    assert name == restart.launch()
    assert begun(tmp_path).begun_by(name)
    monkeypatch.setattr("os.getppid", lambda: 1)
    assert restart.launch() != name


def begun(folder: Path) -> RunDirectory:
    settings = small(folder)
    run = RunDirectory(settings.directory)
    run.start(settings, fresh=False, launch=restart.launch())
    return run
