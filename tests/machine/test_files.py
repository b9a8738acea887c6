"""Files and folders appear whole or not at all; a lock has one holder, and waits for it as long as it is told."""

import os
import threading
from pathlib import Path

import pytest

from twinrl.config.errors import InputError
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


def test_a_link_in_the_place_of_what_is_written_leads_nowhere(tmp_path: Path) -> None:
    precious, path = tmp_path / "precious", tmp_path / "made"
    make(precious, "a")
    files.unfinished(path).symlink_to(precious)
    make(path, "b")
    assert names(path) == ["b"]
    assert names(precious) == ["a"]


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(IsADirectoryError, match="lock"), files.locked(tmp_path / "lock", TimeoutError()):
        pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    refusal = TimeoutError("it is held")
    with (tmp_path / "lock").open("w") as first, (tmp_path / "lock").open("w") as second:
        files.lock(first, refusal)
        with pytest.raises(TimeoutError, match="held"):
            files.lock(second, refusal)
        threading.Timer(2 * files.POLL_SECONDS, first.close).start()
        files.lock(second, refusal, patience=60)


def test_a_folder_that_can_be_written_is_found_out_without_a_trace(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "deep", "it", "no fix")
    files.check_writable(tmp_path, "it", "no fix")
    assert names(tmp_path) == []


@pytest.mark.parametrize("folder", ["file", "file/new", "/proc/new/deep", "n" * 300])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"the report cannot be written; got [A-Z][a-z ]+; fix: name another"):
        files.check_writable(tmp_path / folder, "the report", "name another")
    assert names(tmp_path) == ["file"]
