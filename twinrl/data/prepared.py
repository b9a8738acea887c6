"""A prepared folder with the pretrained family that it was prepared for: what training and validation read.

Latents and prompt embeddings come from the cache; of the pipeline the VAE alone goes to the device, for rewards and
pictures. Text encoders stay on the CPU: they are asked only for prompts that are not in the data (`twinrl sample`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from twinrl.backends.families.family import Family
from twinrl.config.errors import InputError
from twinrl.data.dataset import CachedDataset
from twinrl.data.encoder import FamilyEncoder
from twinrl.data.order import BucketSampler
from twinrl.flow import conditions
from twinrl.flow.conditions import Condition
from twinrl.flow.reading import ALL
from twinrl.flow.source import Scorer
from twinrl.machine.moving import moved
from twinrl.machine.visiting import visiting


class FolderSource:
    """Data and codec of a run that trains a pretrained family.

    Arguments:
        root: folder of ``twinrl data prepare``.
        family: the pipeline that the run starts from.
        images: whether training uses the latents; False reads prompts alone.

    Attributes:
        name: as in ``data.source``.
        content_hash: of the prepared data, a dash, and of the family's files (see ``model_unchanged``).
        latent_shape: (C, h, w) of the bucket with most rows.
        splits: train and validation.
        networks: frozen networks of the run's rewards, by their settings.
        scorers, held_out: none; rewards have models of their own.

    Raises:
        InputError: no prepared folder, one for another model, or one without images where they are needed.
    """

    name = "folder"
    scorers: Mapping[str, Scorer] = {}
    held_out: frozenset[str] = frozenset()

    def __init__(self, root: Path | None, family: Family, images: bool = True):
        if root is None:
            raise InputError(
                "data.root is missing", expected="a prepared folder", fix="`twinrl data prepare IMAGES --model MODEL`"
            )
        self.family, self.device = family, torch.device("cpu")
        key = FamilyEncoder(family).key
        self.splits = {split: CachedDataset(root, split, key) for split in ("train", "validation")}
        train = self.splits["train"]
        if images and not train.has_images:
            raise InputError(f"{root} holds prompts without images", fix="data.source=prompts trains without images")
        self.images = images
        self.networks: dict[str, nn.Module] = {}
        self.content_hash = f"{train.content_hash}-{family.content_hash[:32]}"
        self.bucket = max(train.lengths, key=lambda name: train.lengths[name])
        self.latent_shape: tuple[int, int, int] = train.latent_shapes[self.bucket]

    def reader(
        self, split: str, device: torch.device, dtype: torch.dtype, mix: Mapping[str, float], multiple: int = 1
    ) -> "FolderRows":
        """The rows of a split; batches keep the shares of ``mix``, in multiples, where the batch size allows it."""
        return FolderRows(self.splits[split], device, dtype, self.images, multiple * whole_rows(mix))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → normalised latents (B, C, h, w)."""
        with visiting(self.codec, pixels.device):
            return self.family.encode(pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents → pixels, not clamped."""
        with visiting(self.codec, latents.device):
            return self.family.decode(latents)

    def condition(self, prompts: Sequence[str]) -> Condition:
        """Conditions of any prompts, by the text encoders on the CPU."""
        with visiting(self.encoders, self.family.device):
            return conditions.to(self.family.encode_prompts(prompts), self.device)

    def null_condition(self, n: int) -> Condition:
        """The empty condition ∅, n rows."""
        with visiting(self.encoders, self.family.device):
            return conditions.to(self.family.null_condition(n), self.device)

    @property
    def encoders(self) -> tuple[nn.Module, ...]:
        """What reads prompts."""
        return tuple(module for module in self.family.frozen_modules() if module not in self.codec)

    @property
    def codec(self) -> tuple[nn.Module, ...]:
        """What encodes and decodes."""
        return (self.family.pipeline.vae,)

    def to(self, device: str, offload: bool = False) -> "FolderSource":
        """Conditions on ``device``, and the VAE too, in place; with ``offload`` it waits on the CPU and visits."""
        self.device = torch.device(device)
        self.family.pipeline.vae.to("cpu" if offload else self.device)
        return self


def model_unchanged(content_hash: str, family: Family) -> bool:
    """Whether a source's ``content_hash`` is one of this very pipeline, whatever the data were."""
    return content_hash.partition("-")[2] == family.content_hash[:32]


def whole_rows(mix: Mapping[str, float]) -> int:
    """The fewest rows that the shares of ``mix`` divide without remainder: 4 for 1/1/1/1."""
    shares = [Fraction(str(share)) for share in mix.values()]
    return math.lcm(*((share / sum(shares)).denominator for share in shares))


@dataclass(frozen=True)
class FolderRows:
    """Satisfies ``twinrl.flow.reading.Reader`` from the cache; every batch is of one bucket.

    Attributes:
        dataset: one split.
        device: of what is read. dtype: of latents; conditions are as they were prepared, and cast by the network.
        images: False: latents are zeros of the right shape.
        multiple: batches are multiples of this where the wanted size is.
    """

    dataset: CachedDataset
    device: torch.device
    dtype: torch.dtype
    images: bool = True
    multiple: int = 1

    def rows(self, batch: int, seed: int, step: int) -> Tensor:
        return self._sampler(batch, seed).batch(step).rows

    def sizes(self, batch: int) -> Sequence[int]:
        return tuple(self._sampler(batch, 0).batch_size.values())

    def shape(self, at: Tensor) -> tuple[int, int, int]:
        return self.dataset.latent_shapes[self.dataset.bucket_of(int(at[0]))]

    def latents(self, at: Tensor) -> Tensor:
        if self.images:
            return moved(self.dataset.latents(at), self.device, self.dtype)
        return torch.zeros(len(at), *self.shape(at), device=self.device, dtype=self.dtype)

    def captioned(self, at: Tensor, seed: int, step: int, of: Tensor | slice = ALL) -> tuple[list[str], Condition]:
        return self.dataset.captions(at), conditions.to(self.dataset.conditions(at[of]), self.device)

    def null(self, n: int) -> Condition:
        return conditions.repeated(conditions.to(self.dataset.null_condition(1), self.device), n)

    def _sampler(self, batch: int, seed: int) -> BucketSampler:
        return _sampler(self.dataset, batch, seed, math.gcd(batch, self.multiple))


@lru_cache(maxsize=8)
def _sampler(dataset: CachedDataset, batch: int, seed: int, multiple: int) -> BucketSampler:
    return dataset.sampler(batch, seed, multiple)
