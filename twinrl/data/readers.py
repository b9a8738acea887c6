"""The formats by name, and the one way to read any of them."""

from collections.abc import Iterator
from pathlib import Path

from twinrl.data.captions import (
    CaptionReader,
    Found,
    ReadConfig,
    check_is,
    detect,
    read_metadata,
    read_prompts,
    read_text,
)
from twinrl.data.tables import read_huggingface, read_parquet
from twinrl.data.tars import read_webdataset

READERS: dict[str, CaptionReader] = {
    "text": read_text,
    "metadata": read_metadata,
    "parquet": read_parquet,
    "webdataset": read_webdataset,
    "huggingface": read_huggingface,
    "prompts": read_prompts,
}


def read(path: Path, config: ReadConfig) -> tuple[str, Iterator[Found]]:
    """The format of ``path`` and its pairs, in an order that depends on the data alone.

    Raises:
        InputError: there is nothing to read, or it is not what ``config`` says; some only on iteration.
    """
    name = detect(path) if config.format == "auto" else config.format
    if name != "huggingface":  # may be a name on the hub
        check_is(path, name)
    return name, READERS[name](path, config)
