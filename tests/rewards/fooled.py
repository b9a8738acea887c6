"""Rewards that can be had without better pictures: a user's own, named by dotted path."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from twinrl.config import Settings
from twinrl.rewards.reward import Reward


class Contrast(Reward):
    """Pays for light and dark."""

    needs_prompts = False

    class Config(Settings):
        kind: Literal["tests.rewards.fooled.Contrast"] = "tests.rewards.fooled.Contrast"

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        return images.flatten(1).var(1)


class Grid(Reward):
    """Pays for stripes of two pixels."""

    needs_prompts = False

    class Config(Settings):
        kind: Literal["tests.rewards.fooled.Grid"] = "tests.rewards.fooled.Grid"

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        stripes = torch.where(torch.arange(images.shape[-1]) % 4 < 2, 1.0, -1.0).to(images)
        return (images * stripes).flatten(1).mean(1)


class OnePicture(Reward):
    """Pays for a cross, whatever was asked for."""

    needs_prompts = False

    class Config(Settings):
        kind: Literal["tests.rewards.fooled.OnePicture"] = "tests.rewards.fooled.OnePicture"

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        bar = (torch.linspace(-1, 1, images.shape[-1]).abs() < 0.3).to(images.device)
        cross = torch.where(bar[None] | bar[:, None], 1.0, -1.0)
        return -(images - cross).square().flatten(1).mean(1)
