"""A prepared folder as training reads it: rows by number, latents and conditions straight from the cache."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from twinrl.config import stored
from twinrl.config.errors import InputError
from twinrl.data.buckets import Bucket
from twinrl.data.cache import pad
from twinrl.data.encode import EMPTY_PROMPT
from twinrl.data.order import BucketSampler
from twinrl.data.prepare import CACHE_FORMAT, ENTRIES, MANIFEST, content_hash, stores
from twinrl.data.verify import Entry
from twinrl.flow.conditions import Condition
from twinrl.machine import files

PREPARE = "run `twinrl data prepare IMAGES --model MODEL --to PREPARED`"
"""What mends a prepared folder."""


class CachedDataset:
    """One split of what ``twinrl data prepare`` made; memory-mapped, nothing is decoded or encoded here.

    Arguments:
        folder: the prepared folder.
        split: train or validation.
        encoder: key of the encoder that the model needs; None takes the one that the data were prepared with.

    Attributes:
        content_hash: digest of pairs, splits, buckets and encoder: what decides a run's numbers.
        has_images: False for a prompt list, whose rows have conditions but no latents.
        buckets: bucket name → its size, for the buckets of the whole data set.
        latent_shapes: bucket name → (C, h, w).
        members: bucket name → (n,) row numbers of this split.

    Raises:
        InputError: the folder is not a prepared one, or for another encoder.
    """

    def __init__(self, folder: Path, split: str = "train", encoder: str | None = None):
        manifest = read_manifest(folder)
        if encoder is not None and manifest.encoder != encoder:
            raise InputError(
                f"{folder} was prepared with another encoder", got=manifest.encoder, expected=encoder,
                fix=_mended(manifest.encoder, encoder),
            )  # fmt: skip
        self.folder, self.split = folder, split
        self.content_hash, self.has_images = manifest.content_hash, manifest.images
        self.buckets = {row.name: Bucket(row.width, row.height) for row in manifest.buckets}
        self.latent_shapes = {row.name: row.latent_shape for row in manifest.buckets}
        self._lengths = manifest.lengths
        self._latents, self._prompts = stores(folder, manifest.encoder)
        entries = _entries(folder)
        if content_hash(manifest.encoder, entries) != self.content_hash:
            raise _unprepared(folder, f"{ENTRIES} and {MANIFEST} of two different runs")
        self._entries = [entry for entry in entries if entry.split == split]
        self.members = {name: self._rows_of(name) for name in self.buckets}
        self._check_complete()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def lengths(self) -> dict[str, int]:
        """Bucket name → rows of this split."""
        return {name: len(rows) for name, rows in self.members.items()}

    def latents(self, indices: Sequence[int] | Tensor) -> Tensor:
        """(B, C, h, w) normalised latents of rows that are all of one bucket, in the encoder's dtype, on the CPU."""
        return torch.stack([self._latent(entry) for entry in self._at(indices)])

    def conditions(self, indices: Sequence[int] | Tensor) -> Condition:
        """The rows' prompt embeddings (B, …), filled up with zeros to the data set's longest prompt."""
        return pad([self._embeddings(entry.text) for entry in self._at(indices)], self._lengths)

    def null_condition(self, n: int) -> Condition:
        """The embeddings of the empty prompt, n rows."""
        return pad([self._embeddings(EMPTY_PROMPT)] * n, self._lengths)

    def _latent(self, entry: Entry) -> Tensor:
        """(C, h, w) of an entry. Raises InputError: of another shape than its bucket, another format, or not finite."""
        key = str(entry.latent)
        found, shape = self._latents[key].get("latents"), self.latent_shapes[entry.bucket]
        if found is None or found.shape != shape or found.dtype != self._latent_format:
            got = "no latents" if found is None else _kind(found)
            raise self._latents.damaged(key, f"{got} instead of {_named(self._latent_format)} {shape}")
        if not found.isfinite().all():
            raise self._latents.damaged(key, "latents that are not finite")
        return found

    @cached_property
    def _latent_format(self) -> torch.dtype:
        """Of the first entry's latents."""
        first = next(iter(self._latents[str(self._entries[0].latent)].values()))
        return first.dtype if first.dtype.is_floating_point else torch.get_default_dtype()

    def _embeddings(self, key: str) -> dict[str, Tensor]:
        """Of a prompt. Raises InputError: they are not as the empty prompt's, or longer than any prompt's."""
        found, like = self._prompts[key], self._prompts[EMPTY_PROMPT]
        for name in sorted(found.keys() | like.keys()):
            if name not in found or name not in like:
                raise self._prompts.damaged(key, f"{name} in one of two prompts alone")
            one, other, longest = found[name], like[name], self._lengths.get(name)
            free = 0 if longest is None else 1  # axes that may differ
            alike = one.ndim == other.ndim and one.shape[free:] == other.shape[free:] and one.dtype == other.dtype
            if not alike or (longest is not None and len(one) > longest):
                raise self._prompts.damaged(key, f"{name} {_kind(one)}, of the empty prompt {_kind(other)}")
            if not one.isfinite().all():
                raise self._prompts.damaged(key, f"{name} that is not finite")
        return found

    def bucket_of(self, index: int) -> str:
        """The bucket of a row."""
        return self._entries[index].bucket

    def captions(self, indices: Sequence[int] | Tensor) -> list[str]:
        """The rows' captions."""
        return [entry.caption for entry in self._at(indices)]

    def names(self, indices: Sequence[int] | Tensor) -> list[str]:
        """Where the rows come from, for events and error messages."""
        return [entry.name for entry in self._at(indices)]

    def sampler(self, batch: int, seed: int, multiple: int = 1) -> BucketSampler:
        """Batches of one bucket each with as many pixels as ``batch`` images of the mean bucket area.

        Arguments:
            batch: rows of an average batch; batches of larger buckets have fewer, of smaller ones more.
            seed: the run's.
            multiple: batches are multiples of this, so that branches and ranks divide them.
        """
        area = sum(self.buckets[name].pixels for name in self.buckets) / len(self.buckets)
        rows = {name: bucket.batch_rows(round(batch * area), multiple) for name, bucket in self.buckets.items()}
        return BucketSampler(self.members, rows, seed)

    def _at(self, indices: Sequence[int] | Tensor) -> list[Entry]:
        numbers = indices.tolist() if isinstance(indices, Tensor) else indices
        return [self._entries[number] for number in numbers]

    def _rows_of(self, bucket: str) -> Tensor:
        return torch.tensor([i for i, entry in enumerate(self._entries) if entry.bucket == bucket], dtype=torch.long)

    def _check_complete(self) -> None:
        for entry in self._entries:
            if entry.text not in self._prompts or (self.has_images and str(entry.latent) not in self._latents):
                raise _unprepared(self.folder, f"{entry.name} is not in the cache")


def _kind(tensor: Tensor) -> str:
    return f"{_named(tensor.dtype)} {tuple(tensor.shape)}"


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _mended(got: str, expected: str) -> str:
    """How encoders called ``family-precision-digest`` are brought together."""
    (family, precision), (wanted_family, wanted) = ((*key.split("-"), "")[:2] for key in (got, expected))
    again = "run `twinrl data prepare` with this model"
    if family != wanted_family or precision == wanted:
        return again
    there, here = (name.replace("bfloat16", "bf16") for name in (precision, wanted))
    return f"model.frozen_dtype={there}, or {again} and --dtype {here}"


LARGEST = 100_000
"""Pixels of a side, and tokens of a prompt; larger numbers are damage, and would take all memory."""
Side = Annotated[int, Field(ge=1, le=LARGEST)]


class BucketRow(BaseModel):
    """A bucket of the manifest: its size in pixels, its latents' shape."""

    name: str
    width: Side
    height: Side
    latent_shape: tuple[Side, Side, Side]


class Manifest(BaseModel):
    """What is read of ``manifest.json``."""

    format: Annotated[int, Field(ge=CACHE_FORMAT, le=CACHE_FORMAT)]
    encoder: str
    content_hash: str
    images: bool
    lengths: dict[str, Annotated[int, Field(ge=0, le=LARGEST)]]
    buckets: Annotated[list[BucketRow], Field(min_length=1)]


def read_manifest(folder: Path) -> Manifest:
    """What a prepared folder holds. Raises InputError: it is none, or damaged."""
    try:
        return stored.read(folder / MANIFEST, Manifest, PREPARE)
    except files.GONE as error:
        raise _unprepared(folder, f"no {MANIFEST} in it" if folder.is_dir() else "no such folder") from error


def _entries(folder: Path) -> list[Entry]:
    path = folder / ENTRIES
    try:
        lines = stored.read_bytes(path).splitlines()
    except files.GONE as error:
        raise _unprepared(folder, error) from error
    return [stored.parse(line, Entry, f"{path}, line {number},", PREPARE) for number, line in enumerate(lines, 1)]


def _unprepared(folder: Path, why: object) -> InputError:
    return InputError(
        f"{folder} is not a complete prepared folder", got=why, fix=f"{PREPARE} and set data.root=PREPARED"
    )  # fmt: skip
