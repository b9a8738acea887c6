"""The cache on disk: records of tensors in numbered safetensors shards that never change once they are there.

A record is one image's latents or one prompt's embeddings under the digest of what it was made from. A shard is
written beside its place, synced and renamed: a kill at any moment loses the shard in the making and nothing else.
There is no index to fall out of step with the shards; their headers are it.

Prompt embeddings differ in length. A condition's tensor ``<name>_mask`` (B, L) marks the real positions of
``<name>`` (B, L, …), and ``mask`` those of every (B, L, D) tensor of that length without a mask of its own. What lies
behind the last real position is not stored (:func:`trim`); reading fills up with zeros, to the length of the data
set's longest prompt (:func:`longest`, :func:`pad`), so that any two conditions of a data set can be joined.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.machine import files, tensors

CacheRecord = Mapping[str, Tensor]


class ShardStore:
    """A growing set of records. Reading is memory-mapped; a process opens each shard once.

    Arguments:
        folder: of the shards; need not exist.

    Raises:
        InputError: a shard is damaged.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._shards: list[Any] = []
        self._where: dict[str, tuple[int, list[str]]] = {}  # record → (shard, its tensors' names)
        self._next = 0
        for path in sorted(folder.glob("shard-*.safetensors")):
            self._open(path)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def _open(self, path: Path) -> None:
        number = re.fullmatch(r"shard-(\d+)\.safetensors", path.name)
        try:
            files.check_plain(path)
            path.open("rb").close()  # the library says of a file that it may not read that it is not there
            shard = safe_open(path, framework="pt")
        except (*files.GONE, SafetensorError) as error:
            raise _damaged(path, error) from error
        for full_name in shard.keys():  # noqa: SIM118 (not a mapping)
            key, _, _ = full_name.partition("/")
            self._where.setdefault(key, (len(self._shards), []))[1].append(full_name)
        self._shards.append(shard)
        self._next = max(self._next, int(number[1]) + 1 if number else 0)

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        """The tensors of a record by name."""
        shard, full_names = self._where[key]
        return {name.partition("/")[2]: self._shards[shard].get_tensor(name) for name in full_names}

    def damaged(self, key: str, why: str) -> InputError:
        """The error for a record that is not what it should be."""
        return _damaged(sorted(self.folder.glob("shard-*.safetensors"))[self._where[key][0]], f"{key}: {why}")

    def append(self, records: Mapping[str, CacheRecord]) -> None:
        """Publish records, if any, as one new shard; returns when they are on disk."""
        if not records:
            return
        flat = {f"{key}/{name}": value for key, record in records.items() for name, value in record.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"shard-{self._next:06d}.safetensors"
        with files.publishing(path) as new:
            tensors.write(new, flat)
        self._open(path)


def _damaged(path: Path, why: object) -> InputError:
    return InputError(f"the shard {path} is damaged", got=why, fix="delete it and run `twinrl data prepare` again")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a file of one JSON object per line, all or nothing."""
    files.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Only one process writes to a cache. Raises InputError at once where another does; a kill frees the cache."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as file:
        files.lock(file, InputError(f"another process prepares {folder}", fix="wait for it, or choose another --to"))
        yield


# --- records of unequal length ------------------------------------------------------------------------------


def masks_of(names: Mapping[str, Tensor]) -> dict[str, str]:
    """Tensor name → name of its mask, for tensors that have one; a mask is its own."""
    found = {name: name for name in names if name == "mask" or name.endswith("_mask")}
    for name in names:
        if name in found:
            continue
        if f"{name}_mask" in names:
            found[name] = f"{name}_mask"
        elif "mask" in names and names[name].ndim > 1 and len(names[name]) == len(names["mask"]):
            found[name] = "mask"
    return found


def trim(record: CacheRecord) -> dict[str, Tensor]:
    """One row's tensors without what lies behind the last position that their mask marks as real (at least one stays).

    Arguments:
        record: name → tensor without the batch dimension: (L, …) where there is a mask (L,).
    """
    masks = masks_of(record)
    result = dict(record)
    for name, mask in masks.items():
        real = record[mask].nonzero()
        result[name] = record[name][: int(real.max()) + 1 if len(real) else 1]
    return result


def longest(records: Iterable[CacheRecord]) -> dict[str, int]:
    """Name → the greatest length among the records, for tensors that have a mask."""
    lengths: dict[str, int] = {}
    for record in records:
        for name in masks_of(record):
            lengths[name] = max(lengths.get(name, 0), len(record[name]))
    return lengths


def pad(records: Sequence[CacheRecord], lengths: Mapping[str, int]) -> dict[str, Tensor]:
    """A batch of rows: (B, …) tensors; those named in ``lengths`` are filled up with zeros to (B, length, …).

    Raises:
        InputError: rows without a mask differ in shape.
    """
    batch = {}
    for name in records[0]:
        rows = [record[name] for record in records]
        if name in lengths:
            rows = [torch.cat([row, row.new_zeros(lengths[name] - len(row), *row.shape[1:])]) for row in rows]
        elif len({row.shape for row in rows}) > 1:
            shapes = " and ".join(str(tuple(row.shape)) for row in rows[:2])
            raise InputError(
                f"embeddings {name} differ in shape between prompts", got=shapes, expected=f"a {name}_mask"
            )
        batch[name] = torch.stack(rows)
    return batch
