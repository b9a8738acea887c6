"""Verification: every image is read and decoded once; what is kept of it are digests, bucket, crop and split."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from twinrl.data import images, readers
from twinrl.data.buckets import BucketFit, fit
from twinrl.data.cache import ShardStore
from twinrl.data.captions import Example, Found
from twinrl.data.identity import digest, of_bytes, uniform, validation_place
from twinrl.data.parallel import ahead, groups_of
from twinrl.data.problems import UNREADABLE, Problem, UnusableError
from twinrl.data.settings import PrepareConfig, PrepareProgress


class Entry(NamedTuple):
    """A pair as it is written down: names, and the keys of its records."""

    name: str
    bucket: str
    split: str
    latent: str | None
    text: str
    caption: str


@dataclass(frozen=True)
class Pair:
    """A verified pair.

    Attributes:
        example: where it comes from.
        latent: digest of image content, crop and size: the key of its latents; None in a prompt list.
        text: digest of the caption: the key of its embeddings.
        fit: where the image goes; for prompts the bucket alone matters.
        place: of its content in [0, 1); those below the configured share are for validation.
        split: train or validation.
    """

    example: Example
    latent: str | None
    text: str
    fit: BucketFit
    place: float
    split: str = "train"

    def entry(self) -> Entry:
        """Its line in ``entries.jsonl``."""
        return Entry(self.example.name, self.fit.bucket.name, self.split, self.latent, self.text, self.example.caption)


@dataclass(frozen=True)
class Verified:
    """What was found.

    Attributes:
        format: how the data were read.
        pairs: that look usable.
        problems: what was left out.
    """

    format: str
    pairs: list[Pair]
    problems: list[Problem]


def verify(path: Path, config: PrepareConfig, latents: ShardStore | None, watch: PrepareProgress) -> Verified:
    """Every pair with its bucket, split and digests, and every problem, in the order of the data.

    Arguments:
        latents: images whose latents are here were decoded before and are not decoded again.
    """
    name, found = readers.read(path, config.read)
    pairs, problems = [], []
    with ThreadPoolExecutor(config.workers) as pool:
        check = partial(_check, config=config, latents=latents)
        for done, result in enumerate(
            chain.from_iterable(ahead(pool, check, groups_of(found, 16 * config.workers))), 1
        ):
            pairs.append(result) if isinstance(result, Pair) else problems.append(result)
            watch("verify", done, None)
    return Verified(name, divided(pairs, config.validation), problems)


def divided(pairs: Sequence[Pair], share: float) -> list[Pair]:
    """The pairs with their splits: validation is ``share`` of the contents, with at least one of each bucket of which
    ``share`` would be half an image or more, so that no common shape goes unseen."""
    chosen = {pair.place for pair in pairs if pair.place < share}
    for bucket in {pair.fit.bucket for pair in pairs}:
        places = {pair.place for pair in pairs if pair.fit.bucket == bucket}
        if not places & chosen and share * len(places) >= 0.5 and len(places) > 1:
            chosen.add(min(places))
    return [replace(pair, split="validation" if pair.place in chosen else "train") for pair in pairs]


def _check(found: Found, config: PrepareConfig, latents: ShardStore | None) -> Pair | Problem:
    if isinstance(found, Problem):
        return found
    try:
        return _prompt(found, config) if found.read is None else _pair(found, image_bytes(found), config, latents)
    except UnusableError as error:
        return error.of(found.name)


def _pair(example: Example, data: bytes, config: PrepareConfig, latents: ShardStore | None) -> Pair:
    content = of_bytes(data)
    place = fit(config.buckets, *images.upright_size(data), content)
    pair = Pair(example, latent_key(data, place), digest(example.caption), place, validation_place(content))
    if latents is None or str(pair.latent) not in latents:
        images.decode(data)
    return pair


def latent_key(data: bytes, place: BucketFit) -> str:
    """The key of an image file's latents: its content, the part of it that is used, and the size."""
    return digest(of_bytes(data), place.bucket.name, place.box)


def _prompt(example: Example, config: PrepareConfig) -> Pair:
    """A prompt without image gets a bucket by its own digest, so that all sizes are trained."""
    text, buckets = digest(example.caption), config.buckets.buckets()
    bucket = buckets[int(uniform(text, "bucket") * len(buckets))]
    return Pair(example, None, text, BucketFit(bucket, (0.0, 0.0, 0.0, 0.0)), validation_place(text))


def image_bytes(example: Example) -> bytes:
    """The bytes of a pair's image file. Raises UnusableError where they cannot be read."""
    assert example.read is not None
    try:
        return example.read()
    except OSError as error:
        raise UnusableError(UNREADABLE, error.strerror or str(error)) from error
