"""Files and folders appear whole or not at all; a lock has one holder, and waits for it as long as it is told."""

import threading
from pathlib import Path

import pytest

from twinrl.machine import files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def make(path: Path, content: str) -> None:
    with files.publishing(path) as new:
        new.mkdir()
        (new / content).write_text(content)
        assert not (path / content).exists()
        if content == "no":
            raise OSError("the disk is full")


def test_a_folder_is_replaced_at_once_and_kept_where_writing_fails(tmp_path: Path) -> None:
    made = tmp_path / "made"
    make(made, "a")
    make(made, "b")
    with pytest.raises(OSError, match="full"):
        make(made, "no")
    assert names(tmp_path) == ["made"]
    assert names(made) == ["b"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "made", "a")

    def refuse(path: Path, target: Path) -> Path:
        raise OSError(f"{target} is out of reach")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="out of reach"):
        make(tmp_path / "made", "b")
    assert names(tmp_path) == ["made"]
    assert names(tmp_path / "made") == ["a"]


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    refusal = TimeoutError("it is held")
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        files.lock(first, refusal)
        with pytest.raises(TimeoutError, match="held"):
            files.lock(second, refusal)
        threading.Timer(2 * files.POLL_SECONDS, first.close).start()
        files.lock(second, refusal, patience=60)
