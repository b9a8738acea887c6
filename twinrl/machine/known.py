"""Addresses of servers and clusters that this user has named, kept in the cache, as ssh keeps hosts.

A run of somebody else's may name others. A server is sent this user's token; a cluster also runs what it likes here.
"""

import os
from contextlib import suppress
from pathlib import Path

from twinrl.config.secrets import shown
from twinrl.machine import files


def note(address: str) -> None:
    """Remember an address, without its password; where the cache cannot be written, it is asked for again."""
    with suppress(OSError):
        if not has(address) and "\n" not in address:
            place().parent.mkdir(parents=True, exist_ok=True)
            with open(place(), "a", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                file.write(f"{shown(address)}\n")


def has(address: str) -> bool:
    """Whether this user has named an address before. In a cache of several, others' files do not count."""
    with suppress(OSError, UnicodeDecodeError):
        return place().stat().st_uid == os.getuid() and shown(address) in place().read_text().splitlines()
    return False


def place() -> Path:
    """The file with an address a line. Several users may share a cache."""
    return files.cache_dir() / f"servers-{os.getuid()}"
