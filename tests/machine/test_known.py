"""Servers that this user has named are known again; a file that others could have put there names none."""

import os
import stat
from pathlib import Path

import pytest

from twinrl.machine import known

PLACE = known.place


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "place", PLACE)
    return PLACE()


def test_an_address_is_known_once_it_is_noted(file: Path) -> None:
    assert not known.has("http://a:1")
    known.note("http://a:1")
    known.note("http://a:1")
    known.note("head:6379")
    assert known.has("http://a:1")
    assert known.has("head:6379")
    assert not known.has("http://a")
    assert file.read_text() == "http://a:1\nhead:6379\n"
    assert not file.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def test_no_password_is_kept(file: Path) -> None:
    known.note("http://me:pw-handed@a:1")
    assert known.has("http://me:another@a:1")
    assert "pw-handed" not in file.read_text()


def test_a_cache_that_cannot_be_written_or_read_knows_nothing(file: Path) -> None:
    file.parent.parent.joinpath("cache").write_text("")
    known.note("http://a:1")
    assert not known.has("http://a:1")


def test_a_file_of_another_user_s_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known.note("http://a:1")
    monkeypatch.setattr(os, "getuid", lambda: file.stat().st_uid + 1)
    monkeypatch.setattr(known, "place", lambda: file)
    assert not known.has("http://a:1")
