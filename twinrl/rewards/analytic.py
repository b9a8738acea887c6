"""Rewards in closed form: values and gradients known exactly, for tests and for science without a network.

With y in [−1, 1] and D pixel values per image,

    brightness        mean(y)                                     ∂R/∂y = 1/D
    quadratic         −½·mean((y − target)²)                      ∂R/∂y = −(y − target)/D
    sharpness         ½·mean over both directions of (y_{i+1} − y_i)²   a quadratic form, unbounded above
    compressibility   −kilobytes of the image as JPEG             none: not differentiable

*When to use*: ``brightness`` has a constant gradient, so an estimator's error is its variance alone; ``quadratic``
has a maximum that a run should find; ``sharpness`` rewards an artefact and shows reward hacking; ``compressibility``
(Black et al., DDPO, arXiv:2305.13301) needs an estimator that only asks for scores.
"""

import io
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinrl.config import Settings
from twinrl.rewards.preprocess import unit_rgb
from twinrl.rewards.reward import Reward, check_batch


class Brightness(Reward):
    """Mean pixel value, in [−1, 1] for valid images."""

    needs_prompts = False

    class Config(Settings):
        kind: Literal["brightness"] = "brightness"

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        check_batch(images, prompts, needs_prompts=False)
        return images.flatten(1).mean(1)


class Quadratic(Reward):
    """Negative half mean square distance to an image of one grey level."""

    needs_prompts = False

    class Config(Settings):
        kind: Literal["quadratic"] = "quadratic"
        target: float = Field(0.0, ge=-1, le=1, description="grey level of the best image, in [−1, 1]")

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        check_batch(images, prompts, needs_prompts=False)
        return -0.5 * (images - self.config.target).square().flatten(1).mean(1)


class Sharpness(Reward):
    """Half the mean squared difference of neighbouring pixels, rows and columns together."""

    needs_prompts = False

    class Config(Settings):
        kind: Literal["sharpness"] = "sharpness"

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        check_batch(images, prompts, needs_prompts=False)
        differences = [images.diff(dim=-1).flatten(1), images.diff(dim=-2).flatten(1)]
        return 0.5 * torch.cat(differences, dim=1).square().mean(1)


class Compressibility(Reward):
    """Negative size of the image as JPEG, in kilobytes."""

    differentiable = False
    needs_prompts = False

    class Config(Settings):
        kind: Literal["compressibility"] = "compressibility"
        quality: int = Field(95, ge=1, le=95, description="of the JPEG encoder")

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        check_batch(images, prompts, needs_prompts=False)
        sizes = [self._kilobytes(image) for image in unit_rgb(images)]
        return -torch.tensor(sizes, dtype=torch.float32, device=images.device)

    def _kilobytes(self, image: Tensor) -> float:
        """Of one image (3, H, W) in [0, 1]; NaN where a pixel is not finite, since no such image exists."""
        from PIL import Image

        if not image.isfinite().all():
            return float("nan")
        bytes_hwc = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        encoded = io.BytesIO()
        Image.fromarray(bytes_hwc).save(encoded, "JPEG", quality=self.config.quality)
        return encoded.tell() / 1000
