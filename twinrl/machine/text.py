"""Text as people have it: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 with one. Nothing is guessed."""

import codecs
import re
from collections.abc import Iterator
from pathlib import Path

WIDE = {  # the first that fits: the mark of UTF-16 begins that of UTF-32
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
"""Byte order mark → encoding, of those whose characters are wider than a byte."""

WRONG = re.compile("[\0\ufffd\ud800-\udfff]")  # NUL, the replacement character, halves of pairs

STEERING = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, commands a terminal, turns the direction of what follows, or cannot be written as UTF-8."""


def decode(data: bytes, torn: bool = False) -> str:
    """The text of a whole file, without its byte order mark.

    Arguments:
        torn: whether the file may end inside a character, which is left out: its writer was interrupted.

    Raises:
        ValueError: it is in another encoding; says which byte shows it.
    """
    encoding = _wide(data) or "UTF-8"
    try:
        decoder = codecs.getincrementaldecoder("utf-8-sig" if encoding == "UTF-8" else encoding)()
        text = decoder.decode(data, final=not torn)
    except UnicodeDecodeError as error:
        at = error.start + len(data) - len(error.object)  # which lacks the mark
        raise ValueError(f"not {encoding}: byte {at} is {data[at]:#04x}") from error
    if "\0" in text:
        raise ValueError(f"not {encoding}: character {text.index(chr(0))} is NUL, as in UTF-16 without a mark")
    return text


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, each for :func:`decode`, so that one of another encoding spoils itself alone.

    Raises:
        OSError: it cannot be read.
        ValueError: its mark promises what it is not.
    """
    with path.open("rb") as file:
        if _wide(file.peek(4)):
            yield from decode(file.read()).encode().splitlines()
        else:
            yield from file


def flaw(text: str) -> str:
    """What shows that ``text`` was once decoded wrongly, or cannot be encoded again; empty where nothing does."""
    found = WRONG.search(text)
    return f"character {found.start()} is U+{ord(found[0]):04X}" if found else ""


def harmless(text: str) -> str:
    r"""A text of many lines whose characters do nothing but show: others are escaped, as ``\x1b``."""
    return STEERING.sub(lambda found: _escaped(found[0]), text)


def printable(name: str) -> str:
    r"""A file's name for people: what is no character (``\xe9``) or would move a cursor (``\n``) is escaped."""
    return "".join(c if c.isprintable() else _escaped(c) for c in name)


def _escaped(c: str) -> str:
    if "\udc80" <= c <= "\udcff":  # a byte that is no UTF-8, as Python keeps it in a name
        return f"\\x{ord(c) - 0xDC00:02x}"
    return c.encode("unicode_escape").decode()


def _wide(data: bytes) -> str | None:
    return next((encoding for mark, encoding in WIDE.items() if data.startswith(mark)), None)
