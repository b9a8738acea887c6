"""What the system says of a file is one line: the file, its words, the likely fix."""

import errno
import os

import pytest

from twinrl.config.errors import InputError, of_system, of_threads


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "; fix: make room on its disk"),
        (errno.EROFS, "; fix: write elsewhere, or mount its disk for writing"),
        (errno.EACCES, "; fix: mend its rights, or be its owner"),
        (errno.EISDIR, ""),
    ],
)
def test_one_line(number: int, fix: str) -> None:
    said = os.strerror(number)
    assert of_system(OSError(number, said, "runs/a\nb")) == f"runs/a b cannot be used; got {said}{fix}"
    assert of_system(OSError(number, said)) == f"a file cannot be used; got {said}{fix}"
    assert of_system(OSError(number, said, b"a", None, "b")).startswith("b cannot be used")


def test_no_more_processes_or_threads() -> None:
    """Neither names a file that could not be used."""
    said = of_system(BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"))
    assert said.startswith("no more threads or processes can be started; got Resource temporarily unavailable; fix: ")
    assert "`ulimit -u`" in str(of_threads(RuntimeError("can't start new thread")))
    assert of_threads(RuntimeError("size mismatch")) is None


def test_what_was_found_is_told_in_a_line_that_people_read() -> None:
    told = str(InputError("it cannot be loaded", got="x" * 5000, fix="mend it"))
    assert len(told) < 1200
    assert told.endswith("x… (of 5000 characters); fix: mend it")


def test_no_message_holds_a_password_of_an_address() -> None:
    """Whatever library it comes from, and wherever in it the address is."""
    uri = "postgresql://me:pw-handed@host/db"
    said = str(InputError(f"{uri} is away", got=OSError(f"no {uri}"), expected=uri, fix=f"use {uri}"))
    assert "pw-handed" not in said
    assert said.count("postgresql://me:***@host/db") == 4
