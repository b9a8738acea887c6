"""Safetensors files say what the system says of them, and have the rights that the umask gives."""

import os
from pathlib import Path

import pytest
import torch

from tests.disk import another_user, files_of_at_most, open_folder
from twinrl.machine import files, tensors


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tensors.write(tmp_path / "x", {"a": torch.arange(6.0).view(2, 3).T})
    assert tensors.load(tmp_path / "x")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tensors.write(tmp_path / "none" / "x", {"a": torch.ones(3)})
    with pytest.raises(FileNotFoundError):
        tensors.load(tmp_path / "none")


def test_a_full_disk(tmp_path: Path) -> None:
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        tensors.write(tmp_path / "x", {"a": torch.ones(1000)})


def test_a_file_that_may_not_be_read() -> None:
    """The library alone says that it is not there."""
    with open_folder() as folder:
        tensors.write(folder / "x", {"a": torch.ones(3)})
        (folder / "x").chmod(0)
        with another_user(), pytest.raises(PermissionError):
            tensors.load(folder / "x")


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    monkeypatch.setattr(files, "MASK", 0o027)
    try:
        with files.publishing(tmp_path / "made") as new:
            new.mkdir()
            tensors.write(new / "x", {"a": torch.ones(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "made" / "x").stat().st_mode & 0o777 == 0o640
