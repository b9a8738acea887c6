"""Every file of a folder is found once, whatever it is called and however it is reached."""

import os
from pathlib import Path

import pytest

from twinrl.config.errors import InputError
from twinrl.data.listing import below, ending_in, hidden
from twinrl.data.problems import UNREADABLE


def made(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(folder: Path) -> tuple[list[str], dict[str, str]]:
    files, problems = below(folder)
    assert {problem.reason for problem in problems} <= {UNREADABLE}
    return [file.relative_to(folder).as_posix() for file in files], {p.name: p.detail for p in problems}


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / ".kept"  # what is asked for by name may be hidden itself
    made(folder, "a.png", "b/c.TXT", "._a.png", ".trash/a.png", "b/.DS_Store")
    assert found(folder) == (["a.png", "b/c.TXT"], {})
    assert ending_in(folder, [".txt"]) == ([folder / "b" / "c.TXT"], [])
    assert ending_in(folder / "a.png", [".txt"]) == ([folder / "a.png"], [])
    assert [hidden(name) for name in ("./a/b.png", "a/.b/c", "../a")] == [False, True, False]


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    made(folder, "real/a.png")
    made(elsewhere, "b.png", "deep/c.png")
    links = {"also": "real", "more": "../elsewhere", "more2": "../elsewhere", "real/up": "..", "one.png": "real/a.png"}
    for link, target in links.items():
        (folder / link).symlink_to(target)
    assert found(folder) == (["more/b.png", "more/deep/c.png", "one.png", "real/a.png"], {})


def test_what_cannot_be_opened_is_listed(tmp_path: Path) -> None:
    made(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "self").symlink_to("self")
    os.mkfifo(tmp_path / "pipe.png")
    files, problems = found(tmp_path)
    assert files == ["a.png"]
    assert problems == {"gone.png": "a broken link", "self": "a broken link", "pipe.png": "no regular file"}
    with pytest.raises(InputError, match="nowhere cannot be read; got No such file"):
        below(tmp_path / "nowhere")
