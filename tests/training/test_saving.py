"""Checkpoints in the background, and what becomes of a run whose disk fails."""

from pathlib import Path

import pytest
import torch

from tests.states import STATE
from twinrl.machine import tensors
from twinrl.run import checkpoints
from twinrl.run.checkpoints import Checkpoint, SaveError


def checkpoint(step: int, value: torch.Tensor) -> Checkpoint:
    state = STATE | {"step": step, "parts": ["student"]}
    return Checkpoint({"student": {"weight": value}}, state)


def test_the_background_writes_what_was_there_when_it_was_asked(tmp_path: Path) -> None:
    value = torch.ones(200_000)
    future = checkpoints.save_later(tmp_path, 3, checkpoint(3, value), keep=1)
    value.zero_()
    future.result()
    stored = checkpoints.load(tmp_path / "step-00000003")
    assert bool((stored.part("student")["weight"] == 1).all())


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "checkpoints"
    for save in (checkpoints.save, lambda *given: checkpoints.save_later(*given).result()):
        with pytest.raises(SaveError, match=r"no checkpoint can be written to .*those before are whole") as found:
            save(folder, 1, checkpoint(1, torch.ones(3)), 1)
        assert "\n" not in str(found.value)


def test_a_failure_leaves_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save(tmp_path, 1, checkpoint(1, torch.ones(3)), keep=1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "save_file", full)
    with pytest.raises(SaveError, match="No space left on device"):
        checkpoints.save(tmp_path, 2, checkpoint(2, torch.ones(3)), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
