"""From a folder to a cache: verify every pair, encode what is missing, write down what there is and what was left out.

Three passes. *Verify* reads and decodes every image that is not cached yet, finds its bucket, split and crop, and
keeps only digests. *Encode* goes through what the cache lacks. *Write* replaces ``entries.jsonl`` (the pairs),
``manifest.json`` (buckets, encoder, settings) and ``report.jsonl`` (what was left out and why). Latents are cached
under (content, part of the image used, size), embeddings under the prompt: another caption encodes text only,
another crop only the images that it changes, another encoder everything.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from twinrl.config.errors import InputError
from twinrl.data.buckets import Bucket
from twinrl.data.cache import ShardStore, longest, write_jsonl, writing
from twinrl.data.encode import EMPTY_PROMPT, Encoder, Failures, encode_images, encode_prompts
from twinrl.data.identity import digest
from twinrl.data.problems import Problem
from twinrl.data.settings import PrepareConfig, PrepareProgress
from twinrl.data.verify import Entry, Pair, verify
from twinrl.machine import files

CACHE_FORMAT = 1
MANIFEST, ENTRIES, REPORT = "manifest.json", "entries.jsonl", "report.jsonl"


@dataclass(frozen=True)
class Prepared:
    """What came of preparing.

    Attributes:
        format: how the data were read.
        pairs: that can be trained on.
        problems: what was left out.
        encoded_images, encoded_prompts: records that were not in the cache before.
    """

    format: str
    pairs: list[Pair]
    problems: list[Problem]
    encoded_images: int = 0
    encoded_prompts: int = 0


def prepare(path: Path, encoder: Encoder, config: PrepareConfig, to: Path, watch: PrepareProgress) -> Prepared:
    """Encode everything usable at ``path`` into the cache ``to``; what is there already stays.

    Raises:
        InputError: nothing is usable, the path or a column is wrong, ``to`` lies inside the data, the encoder gives
            no finite empty condition, or another process writes to ``to``.
    """
    check_apart(path, to)
    with writing(to):
        latents, texts = stores(to, encoder.key)
        found = verify(path, config, latents, watch)
        write_report(to, found.problems)
        check_usable(path, found.pairs, found.problems, to)
        before = len(latents), len(texts)
        failures = encode_images(found.pairs, latents, encoder, config, watch)
        captions = {EMPTY_PROMPT: ""} | {pair.text: pair.example.caption for pair in found.pairs}
        failures |= encode_prompts(captions, texts, encoder, config, watch)
        if EMPTY_PROMPT in failures:
            raise InputError("the encoder's empty condition is not finite", fix="encode in float32 or bf16")
        pairs, problems = _separate(found.pairs, failures)
        encoded = len(latents) - before[0], len(texts) - before[1]
        result = Prepared(found.format, pairs, found.problems + problems, *encoded)
        write_report(to, result.problems)
        check_usable(path, result.pairs, result.problems, to)
        _write_data(to, origin(path), result, config, encoder, latents, texts)
    return result


def _separate(pairs: Sequence[Pair], failures: Failures) -> tuple[list[Pair], list[Problem]]:
    """The pairs both of whose records could be made, and the others' problems."""
    usable, problems = [], []
    for pair in pairs:
        error = failures.get(pair.latent or "") or failures.get(pair.text)
        if error is None:
            usable.append(pair)
        else:
            problems.append(error.of(pair.example.name))
    return usable, problems


def stores(folder: Path, encoder_key: str) -> tuple[ShardStore, ShardStore]:
    """The latents and the prompt embeddings of one encoder."""
    home = folder / f"encoder-{digest(encoder_key)[:16]}"
    return ShardStore(home / "latents"), ShardStore(home / "prompts")


def check_apart(path: Path, to: Path) -> None:
    """Raises InputError where the prepared folder would be read as data the next time."""
    if to.resolve().is_relative_to(path.resolve()):
        raise InputError(f"the prepared folder {to} would lie inside the data", fix="choose another with --to")


def origin(path: Path) -> str:
    """Where data come from: the whole path of a file or folder, or a name on the hub."""
    return str(path.resolve()) if os.path.exists(path) else path.as_posix()


def check_origin(path: Path, to: Path) -> None:
    """Raises InputError where ``to`` was prepared from other data, which would be replaced."""
    try:
        files.check_plain(to / MANIFEST)
        before = json.loads((to / MANIFEST).read_text())["origin"]
    except (*files.GONE, ValueError, TypeError, KeyError, RecursionError):  # not prepared, or before origins were kept
        return
    if before != origin(path):
        raise InputError(f"{to} holds other data", got=f"those of {before}", fix="name another folder with --to")


def check_usable(path: Path, pairs: Sequence[Pair], problems: Sequence[Problem], to: Path) -> None:
    """Raises InputError where nothing is left of the data."""
    if not pairs:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in count_reasons(problems).items())
        raise InputError(f"{path} has nothing to train on", got=reasons or "no pairs", fix=f"see {to / REPORT}")


def count_reasons(problems: Sequence[Problem]) -> dict[str, int]:
    """Reason → pairs left out for it, most frequent first."""
    return dict(Counter(problem.reason for problem in problems).most_common())


def count_buckets(pairs: Sequence[Pair]) -> dict[str, Counter[str]]:
    """Bucket → pairs in each split."""
    buckets: dict[str, Counter[str]] = {}
    for pair in pairs:
        buckets.setdefault(pair.fit.bucket.name, Counter())[pair.split] += 1
    return buckets


def write_report(to: Path, problems: Sequence[Problem]) -> None:
    """``report.jsonl``: one line for each pair that was left out."""
    write_jsonl(to / REPORT, [asdict(problem) for problem in problems])


def identity_of(entry: Entry) -> tuple[str, ...]:
    """What of a pair decides a run's numbers. Rows are numbered in this order, so files may be renamed."""
    return entry.split, entry.bucket, entry.latent or "", entry.text


def content_hash(encoder_key: str, entries: Sequence[Entry]) -> str:
    """Digest of prepared data: the encoder and every pair's identity."""
    return digest(encoder_key, *("/".join(identity_of(entry)) for entry in entries))


def _write_data(
    to: Path, where: str, result: Prepared, config: PrepareConfig, encoder: Encoder, latents: ShardStore,
    texts: ShardStore,
) -> None:  # fmt: skip
    entries = sorted((pair.entry() for pair in result.pairs), key=identity_of)
    manifest = {
        "format": CACHE_FORMAT,
        "origin": where,
        "encoder": encoder.key,
        "content_hash": content_hash(encoder.key, entries),
        "images": result.format != "prompts",
        "lengths": longest(texts[key] for key in dict.fromkeys([EMPTY_PROMPT, *(pair.text for pair in result.pairs)])),
        "buckets": [_bucket_row(bucket, result, encoder, latents) for bucket in _used(result, config)],
        "settings": config.model_dump(mode="json"),
    }
    write_jsonl(to / ENTRIES, [entry._asdict() for entry in entries])
    files.write_text(to / MANIFEST, json.dumps(manifest, indent=1))


def _used(result: Prepared, config: PrepareConfig) -> list[Bucket]:
    counts = count_buckets(result.pairs)
    return [bucket for bucket in config.buckets.buckets() if bucket.name in counts]


@torch.no_grad()
def _bucket_row(bucket: Bucket, result: Prepared, encoder: Encoder, latents: ShardStore) -> dict[str, Any]:
    """A bucket's line in the manifest; the latent shape of prompts without images is that of a grey picture."""
    pair = next(pair for pair in result.pairs if pair.fit.bucket == bucket)
    if pair.latent is None:
        shape = encoder.encode_images(torch.zeros(1, 3, bucket.height, bucket.width)).shape[1:]
    else:
        shape = latents[pair.latent]["latents"].shape
    return {
        "name": bucket.name, "width": bucket.width, "height": bucket.height, "latent_shape": list(shape),
        **{split: count_buckets(result.pairs)[bucket.name][split] for split in ("train", "validation")},
    }  # fmt: skip
