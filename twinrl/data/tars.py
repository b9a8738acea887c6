"""Reader of WebDataset tars: members that share everything up to the first dot of their name are one sample."""

import os
import tarfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from twinrl.config.errors import InputError
from twinrl.data import listing
from twinrl.data.captions import (
    CAPTION_SUFFIXES,
    Example,
    Found,
    ReadConfig,
    attempt,
    caption_in,
    clean,
    decode_json,
    decode_text,
    label_in,
)
from twinrl.data.images import SUFFIXES
from twinrl.data.problems import BAD_CAPTION, BAD_ROW, NO_CAPTION, NO_IMAGE, Problem, UnusableError


class ArchiveMember(NamedTuple):
    """A file inside an uncompressed tar."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes. Raises UnusableError: the tar ends before; memory for all that a header says may not be there."""
        with self.tar.open("rb") as file:
            if self.offset + self.size > os.fstat(file.fileno()).st_size:
                raise UnusableError(BAD_ROW, f"the tar ends before {self.size:,} bytes of it")
            file.seek(self.offset)
            return file.read(self.size)


def read_webdataset(path: Path, config: ReadConfig) -> Iterator[Found]:
    """``webdataset``: one tar or all under a folder."""
    tars, problems = listing.ending_in(path, [".tar"])
    if not tars:
        raise InputError(f"{path} has no .tar file", fix="unpack compressed tars: they cannot be read at random")
    yield from problems
    for tar in tars:
        place = tar.name if tar == path else tar.relative_to(path).as_posix()
        samples, damage = _index(tar)
        for key, members in samples.items():
            name = f"{place}/{key}"
            yield attempt(name, partial(_sample, name, members, config))
        if damage:
            yield Problem(place, BAD_ROW, damage)


def _index(tar: Path) -> tuple[dict[str, dict[str, ArchiveMember]], str]:
    """Sample key → suffix → member, and what is wrong with the tar; what comes before the damage is kept."""
    samples: dict[str, dict[str, ArchiveMember]] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                if info.isfile() and stem and not listing.hidden(PurePosixPath(info.name)):
                    key = f"{folder}/{stem}" if folder else stem
                    samples.setdefault(key, {})[f".{suffix.lower()}"] = ArchiveMember(tar, info.offset_data, info.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        return samples, f"the tar is damaged or compressed: {error}"
    return samples, ""


def _sample(name: str, members: Mapping[str, ArchiveMember], config: ReadConfig) -> Example:
    suffix, image = next(((suffix, member) for suffix, member in members.items() if suffix in SUFFIXES), ("", None))
    if image is None:
        raise UnusableError(NO_IMAGE, f"members {', '.join(sorted(members))}")
    label = _label(members, config)
    texts = [members[end] for ends in CAPTION_SUFFIXES for end in (suffix + ends, ends) if end in members]
    if texts and config.caption_column is None:
        return Example(name, clean(decode_text(texts[0].read())), image.read, label)
    if ".json" not in members:
        raise UnusableError(NO_CAPTION, f"members {', '.join(sorted(members))}")
    row = decode_json(members[".json"].read(), BAD_CAPTION)
    return Example(name, caption_in(row, config.caption_column), image.read, label)


def _label(members: Mapping[str, ArchiveMember], config: ReadConfig) -> str:
    """The name of the sample's class, in its JSON."""
    if config.label_column is None or ".json" not in members:
        return ""
    return label_in(decode_json(members[".json"].read(), BAD_CAPTION), config.label_column)
