"""Reader of WebDataset tars: members that share everything up to the first dot of their name are one sample."""

import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from twinrl.data.folders.captions import (
    Example,
    Found,
    ReadConfig,
    attempt,
    caption_in,
    clean,
    decode_json,
    decode_text,
)
from twinrl.data.folders.images import SUFFIXES
from twinrl.data.folders.problems import BAD_CAPTION, BAD_ROW, NO_CAPTION, NO_IMAGE, Problem, UnusableError
from twinrl.errors import InputError


class Member(NamedTuple):
    """A file inside an uncompressed tar."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes."""
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_webdataset(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``webdataset``: one tar or all under a folder."""
    tars = [path] if path.is_file() else sorted(path.rglob("*.tar"))
    if not tars:
        raise InputError(f"{path} has no .tar file", fix="unpack compressed tars: they cannot be read at random")
    for tar in tars:
        samples, damage = _index(tar)
        for key, members in samples.items():
            name = f"{tar.name}/{key}"
            yield attempt(name, partial(_sample, name, members, config))
        if damage:
            yield Problem(tar.name, BAD_ROW, damage)


def _index(tar: Path) -> tuple[dict[str, dict[str, Member]], str]:
    """Sample key → suffix → member, and what is wrong with the tar; what comes before the damage is kept."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if info.isfile() and stem:
                    key = f"{folder}/{stem}" if folder else stem
                    samples.setdefault(key, {})[f".{suffix.lower()}"] = Member(tar, info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        return samples, f"the tar is damaged or compressed: {error}"
    return samples, ""


def _sample(name: str, members: Mapping[str, Member], config: ReadConfig) -> Example:
    image = next((member for suffix, member in members.items() if suffix in SUFFIXES), None)
    if image is None:
        raise UnusableError(NO_IMAGE, f"members {', '.join(sorted(members))}")
    if ".txt" in members and config.caption_column is None:
        return Example(name, clean(decode_text(members[".txt"].read())), image.read)
    if ".json" not in members:
        raise UnusableError(NO_CAPTION, f"members {', '.join(sorted(members))}")
    row = decode_json(decode_text(members[".json"].read()), BAD_CAPTION)
    return Example(name, caption_in(row, config.caption_column), image.read)
