"""Aspect buckets: the few sizes at which images are trained, and how an image is fitted into one.

Every image goes to the bucket of the closest ratio, closest in |log(ratio/bucket ratio)|: the bucket that keeps the
largest part of the image. Buckets have about equal areas, so that a step costs the same whichever it is of. A
ratio within ``tolerance`` of its bucket's is cropped by that little; what happens beyond is ``outside``'s to say.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from twinrl.config import Settings
from twinrl.data.identity import uniform
from twinrl.data.problems import NO_BUCKET, TOO_SMALL, UnusableError

SIZES: Mapping[str, tuple[tuple[int, int], ...]] = {
    "qwen-image": (
        (1328, 1328), (1664, 928), (928, 1664), (1472, 1104), (1104, 1472), (1584, 1056), (1056, 1584),
    ),
}  # fmt: skip
"""Preset → (width, height) of each bucket.

``qwen-image``: the sizes of the Qwen-Image model card. Its first version had 1472×1140 for 4:3, which is neither 4:3
nor a multiple of 16; later versions have 1472×1104.
"""

Box = tuple[float, float, float, float]


@dataclass(frozen=True, order=True)
class Bucket:
    """One size for training, in pixels."""

    width: int
    height: int

    @property
    def name(self) -> str:
        """``"1664x928"``: width × height."""
        return f"{self.width}x{self.height}"

    @property
    def ratio(self) -> float:
        """Width / height."""
        return self.width / self.height

    @property
    def pixels(self) -> int:
        return self.width * self.height

    def batch_rows(self, pixels: int, multiple: int = 1) -> int:
        """Rows of a batch that comes closest to ``pixels`` in all; a positive multiple of ``multiple``.

        *When to use*: with ``pixels`` = wanted rows × area of the square bucket, so that a step sees the same
        number of pixels whichever bucket it is of. ``multiple`` keeps a mix of branches divisible.
        """
        return max(1, round(pixels / (self.pixels * multiple))) * multiple


@dataclass(frozen=True)
class BucketFit:
    """Where an image goes.

    Attributes:
        bucket: its size after resizing.
        box: (left, top, right, bottom) of the part of the image that is resized, in pixels of the image.
    """

    bucket: Bucket
    box: Box


class BucketsConfig(Settings):
    """Which sizes there are and how images are fitted into them."""

    sizes: str | tuple[tuple[int, int], ...] | None = Field(
        None, description=f"(width, height) of each bucket, or a preset: {', '.join(SIZES)}; null = ratios and area"
    )
    ratios: tuple[str | float, ...] = Field(
        ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16"), min_length=1, description="width:height of each bucket"
    )
    area: int = Field(1024 * 1024, ge=1, description="pixels of a bucket, met as closely as `multiple` allows")
    multiple: int = Field(16, ge=1, description="widths and heights are multiples of this (VAE factor × patch)")
    tolerance: float = Field(0.1, ge=0, description="how far a ratio may be off its bucket's, 0.1 = 10 %")
    outside: Literal["crop", "closest", "skip"] = Field(
        "crop",
        description="beyond the tolerance: crop to the closest bucket, resize whole to the closest (it is stretched), "
        "or skip the image",
    )
    max_upscale: float = Field(1.25, gt=0, description="images that would have to be enlarged by more are skipped")
    crop: Literal["centre", "centre_weighted"] = Field(
        "centre",
        description="where a crop lies: in the middle, or drawn from the triangular law around the middle "
        "(mean of two uniforms of the image's content), so that centres are likely and edges are seen too",
    )

    @field_validator("sizes")
    @classmethod
    def _known_preset(cls, value: object) -> object:
        if isinstance(value, str) and value not in SIZES:
            raise ValueError(f"unknown preset {value!r}; expected one of {', '.join(SIZES)} or (width, height) pairs")
        return value

    @field_validator("ratios")
    @classmethod
    def _positive_ratios(cls, value: tuple[str | float, ...]) -> tuple[str | float, ...]:
        for ratio in value:
            parse_ratio(ratio)
        return value

    @model_validator(mode="after")
    def _sizes_are_valid(self) -> "BucketsConfig":
        buckets = self.buckets()
        for bucket in buckets:
            if bucket.width % self.multiple or bucket.height % self.multiple or min(bucket.width, bucket.height) < 1:
                raise ValueError(f"size {bucket.name} is not a positive multiple of {self.multiple} both ways")
        twice = sorted({bucket.name for bucket in buckets if buckets.count(bucket) > 1})
        if twice:
            raise ValueError(f"two buckets have the size {twice[0]}; remove a ratio, raise area or lower multiple")
        return self

    def buckets(self) -> tuple[Bucket, ...]:
        """The buckets, in the order of the configuration."""
        if self.sizes is None:
            return tuple(size_of(parse_ratio(ratio), self.area, self.multiple) for ratio in self.ratios)
        return tuple(Bucket(*size) for size in (SIZES[self.sizes] if isinstance(self.sizes, str) else self.sizes))


def parse_ratio(value: str | float) -> float:
    """Width / height from ``"16:9"``, ``"1.5"`` or a number. Raises ValueError where it is none or beyond 20:1."""
    width, _, height = str(value).partition(":")
    try:
        ratio = float(width) / float(height or 1)
    except (ValueError, ZeroDivisionError):
        ratio = math.nan
    if not 1 / 20 <= ratio <= 20:  # YAML reads an unquoted 16:9 as the number 16·60 + 9
        raise ValueError(f"{value!r} is not a ratio from 1:20 to 20:1; write '16:9' in quotes, or a number like 1.5")
    return ratio


def size_of(ratio: float, area: int, multiple: int) -> Bucket:
    """The size in multiples of ``multiple`` that is closest, in logarithms, to both the ratio and the area."""
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    candidates = [
        Bucket(w * multiple, h * multiple)
        for w in _neighbours(width / multiple)
        for h in _neighbours(height / multiple)
    ]
    return min(candidates, key=lambda b: abs(math.log(b.ratio / ratio)) + abs(math.log(b.pixels / area)))


def _neighbours(value: float) -> tuple[int, int]:
    return max(1, math.floor(value)), max(1, math.ceil(value))


def fit(config: BucketsConfig, width: int, height: int, identity: str) -> BucketFit:
    """The bucket of a ``width`` × ``height`` image and the part of it that is used.

    Arguments:
        identity: the image's content digest, from which a ``centre_weighted`` crop is drawn.

    Raises:
        UnusableError: the image is too small, or there is no bucket for it and ``outside`` is ``skip``.
    """
    ratio = width / height
    bucket = min(config.buckets(), key=lambda b: abs(math.log(ratio / b.ratio)))
    distance = math.exp(abs(math.log(ratio / bucket.ratio))) - 1
    if distance > config.tolerance and config.outside == "skip":
        raise UnusableError(NO_BUCKET, f"{width}x{height} is {distance:.0%} off {bucket.name}")
    upscale = max(bucket.width / width, bucket.height / height)
    if upscale > config.max_upscale:
        raise UnusableError(TOO_SMALL, f"{width}x{height} would be enlarged {upscale:.2f} times for {bucket.name}")
    if distance > config.tolerance and config.outside == "closest":
        return BucketFit(bucket, (0.0, 0.0, float(width), float(height)))
    return BucketFit(bucket, _crop(width, height, bucket.ratio, _place(config.crop, identity)))


def _place(crop: str, identity: str) -> float:
    """Where in its free range a crop lies: 0 at the left or top, 0.5 in the middle, 1 at the right or bottom."""
    if crop == "centre":
        return 0.5
    return (uniform(identity, "crop a") + uniform(identity, "crop b")) / 2


def _crop(width: int, height: int, ratio: float, place: float) -> Box:
    """The largest box of ``ratio`` inside the image, at ``place`` along the side that is too long."""
    kept_width, kept_height = min(float(width), height * ratio), min(float(height), width / ratio)
    left, top = (width - kept_width) * place, (height - kept_height) * place
    return left, top, min(left + kept_width, float(width)), min(top + kept_height, float(height))
