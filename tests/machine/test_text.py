"""Text is read as what it surely is, and refused otherwise."""

from pathlib import Path

import pytest

from twinrl.machine import text

SHOWN = "un café 写真"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_that_say_what_they_are(encoding: str, tmp_path: Path) -> None:
    assert text.decode(SHOWN.encode(encoding)) == SHOWN
    (tmp_path / "x").write_bytes(f"{SHOWN}\r\none\u2028line\n".encode(encoding))
    assert [text.decode(line).rstrip() for line in text.lines(tmp_path / "x")] == [SHOWN, "one\u2028line"]


def test_big_endian_marks() -> None:
    assert text.decode(b"\xfe\xff" + SHOWN.encode("utf-16-be")) == SHOWN
    assert text.decode(b"\0\0\xfe\xff" + SHOWN.encode("utf-32-be")) == SHOWN


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("café".encode("latin-1"), "not UTF-8: byte 3 is 0xe9"),
        (b"\xef\xbb\xbfcaf\xe9 ", "not UTF-8: byte 6 is 0xe9"),
        ("kite".encode("utf-16-le"), "character 1 is NUL"),
        ("kite".encode("utf-16")[:-1], "not UTF-16"),
    ],
)
def test_other_encodings_are_not_guessed(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        text.decode(data)


def test_a_file_that_ends_inside_a_character() -> None:
    assert text.decode("ab é".encode()[:-1], torn=True) == "ab "
    with pytest.raises(ValueError, match="not UTF-8"):
        text.decode(b"a\xe9 b", torn=True)


def test_a_line_of_another_encoding_spoils_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"one\n" + "zwö\n".encode("latin-1") + b"three\n")
    first, second, third = text.lines(tmp_path / "x")
    assert (text.decode(first), text.decode(third)) == ("one\n", "three\n")
    with pytest.raises(ValueError, match="byte 2 is 0xf6"):
        text.decode(second)


@pytest.mark.parametrize(("wrong", "code"), [("\0", "0000"), ("\ufffd", "FFFD"), ("\ud83d", "D83D")])
def test_lost_characters_are_seen(wrong: str, code: str) -> None:
    assert text.flaw(f"ab{wrong}c") == f"character 2 is U+{code}"
    assert text.flaw(SHOWN) == ""


def test_names_can_be_printed() -> None:
    assert text.printable("写真 é[/b].png") == "写真 é[/b].png"
    assert text.printable("caf\udce9\n\x1b[1m\ud83d") == r"caf\xe9\n\x1b[1m\ud83d"
