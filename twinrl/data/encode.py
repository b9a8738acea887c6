"""Encoding: what the cache lacks, bucket by bucket, a shard at a time.

What is missing is cut into shards and batches in the order of the data, so that a job that was killed goes on with
the very batches of an undisturbed one, and both leave the same files.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from twinrl.data import images
from twinrl.data.cache import CacheRecord, ShardStore, trim
from twinrl.data.identity import digest
from twinrl.data.parallel import ahead, groups_of
from twinrl.data.problems import CORRUPT, NOT_FINITE, UnusableError
from twinrl.data.settings import PrepareConfig, PrepareProgress
from twinrl.data.verify import Pair, image_bytes, latent_key

EMPTY_PROMPT = digest("")
"""The key of the empty condition's embeddings, which are always encoded."""

Failures = dict[str, UnusableError]
"""Key of a record → why it could not be made."""


class Encoder(Protocol):
    """What turns pixels and prompts into what the network sees; frozen and deterministic.

    Attributes:
        key: digest of everything that decides its numbers: weights, settings, precision.
    """

    key: str

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [−1, 1], float32 on the CPU → normalised latents (B, C, h, w), on any device."""
        ...

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """B prompts → condition of (B, …) tensors; ``<name>_mask`` or ``mask`` (B, L) where lengths differ."""
        ...


@torch.no_grad()
def encode_images(
    pairs: Sequence[Pair], store: ShardStore, encoder: Encoder, config: PrepareConfig, watch: PrepareProgress
) -> Failures:
    """Latents of the images that the store lacks; copies of an image are encoded once."""
    missing: dict[str, Pair] = {}
    for pair in pairs:
        if pair.latent is not None and pair.latent not in store:
            missing.setdefault(pair.latent, pair)
    failures: Failures = {}
    done = 0
    with ThreadPoolExecutor(config.workers) as pool:
        for bucket in config.buckets.buckets():
            for shard in groups_of((p for p in missing.values() if p.fit.bucket == bucket), config.shard):
                records: dict[str, CacheRecord] = {}
                for loaded in ahead(pool, _load, groups_of(shard, config.batch)):
                    records |= _encode_batch(loaded, encoder, failures)
                    done += len(loaded)
                    watch("images", done, len(missing))
                store.append(records)
    return failures


def _load(pair: Pair) -> tuple[str, Tensor | UnusableError]:
    key = str(pair.latent)
    try:
        data = image_bytes(pair.example)
        if latent_key(data, pair.fit) != key:
            raise UnusableError(CORRUPT, "the file changed while the data were prepared")
        return key, images.pixels(images.decode(data), pair.fit)
    except UnusableError as error:
        return key, error


def _encode_batch(
    loaded: Sequence[tuple[str, Tensor | UnusableError]], encoder: Encoder, failures: Failures
) -> dict[str, CacheRecord]:
    failures |= {key: value for key, value in loaded if isinstance(value, UnusableError)}
    pixels = {key: value for key, value in loaded if isinstance(value, Tensor)}
    if not pixels:
        return {}
    latents = encoder.encode_images(torch.stack(list(pixels.values()))).cpu()
    records = {key: {"latents": row.clone()} for key, row in zip(pixels, latents, strict=True)}
    return _finite(records, failures)


@torch.no_grad()
def encode_prompts(
    captions: Mapping[str, str], store: ShardStore, encoder: Encoder, config: PrepareConfig, watch: PrepareProgress
) -> Failures:
    """Embeddings of the captions (by their key) that the store lacks."""
    missing = [key for key in captions if key not in store]
    failures: Failures = {}
    done = 0
    for shard in groups_of(missing, config.shard):
        records: dict[str, CacheRecord] = {}
        for keys in groups_of(shard, config.prompt_batch):
            encoded = {name: value.cpu() for name, value in encoder.encode_prompts([captions[k] for k in keys]).items()}
            rows = [trim({name: value[i].clone() for name, value in encoded.items()}) for i in range(len(keys))]
            records |= _finite(dict(zip(keys, rows, strict=True)), failures)
            done += len(keys)
            watch("prompts", done, len(missing))
        store.append(records)
    return failures


def _finite(records: Mapping[str, CacheRecord], failures: Failures) -> dict[str, CacheRecord]:
    """The records without those that have a value that is not finite, which become failures."""
    kept = {}
    for key, record in records.items():
        bad = [name for name, value in record.items() if not value.isfinite().all()]
        if bad:
            failures[key] = UnusableError(NOT_FINITE, f"in {', '.join(bad)}")
        else:
            kept[key] = record
    return kept
