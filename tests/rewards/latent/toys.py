"""Small autoencoders and rewards in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.config import validate
from twinrl.flow import draws
from twinrl.rewards.latent import LatentReward, LatentRewardConfig

SHAPE = (2, 4, 4)
PROMPTS = ("bright", "dark", "bright", "dark", "dark", "bright")


class Identity:
    """Pixels are latents: what an estimator does is seen undisturbed."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels


class Toy:
    """Latents (2, 4, 4) ↔ pixels (3, 8, 8): a channel mix and nearest upsampling, with a round-trip error.

    Arguments:
        gain: pixels per latent. ``bend`` bounds the pixels by a tanh, which the encoder does not undo: without it a
            high gain leaves [−1, 1], as real decoders do.
    """

    def __init__(self, gain: float = 0.3, bend: bool = True):
        self.mix = gain * draws.normal((3, 2), 0, "mix")
        self.bend = bend

    def decode(self, latents: Tensor) -> Tensor:
        pixels = nn.functional.interpolate(torch.einsum("pc,bchw->bphw", self.mix.to(latents), latents), scale_factor=2)
        return pixels.tanh() if self.bend else pixels

    def encode(self, pixels: Tensor) -> Tensor:
        inverse = torch.linalg.pinv(self.mix.to(pixels))
        return 0.98 * torch.einsum("cp,bphw->bchw", inverse, nn.functional.avg_pool2d(pixels, 2))


class Brightness:
    """Negative mean square distance to a grey level that the prompt names; NaN for the prompt ``broken``."""

    LEVEL = {"bright": 0.3, "dark": -0.3, "broken": float("nan")}  # noqa: RUF012

    def __init__(self, differentiable: bool = True):
        self.differentiable = differentiable

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        level = images.new_tensor([self.LEVEL[prompt] for prompt in prompts])
        scores = -(images - level.view(-1, 1, 1, 1)).square().flatten(1).mean(1)
        return scores if self.differentiable else scores.detach()


class Linear:
    """⟨a, y⟩ with a fixed unit vector a: the gradient is a, and first-order laws are exact."""

    differentiable = True

    def __init__(self, shape: tuple[int, ...]):
        a = draws.normal(shape, 0, "gradient").double()
        self.a = a / a.norm()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images * self.a).flatten(1).sum(1)


class Flat:
    """The same score for every image, connected to the pixels."""

    differentiable = True

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 0 * images.flatten(1).sum(1) + 3.0


@dataclass(frozen=True)
class Stream:
    """Quick draws for many images: one generator for each purpose instead of one for each row."""

    batch: int

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return draws.normal((self.batch, *shape), 0, purpose)

    def rows(self, start: int, stop: int) -> "Stream":
        return Stream(stop - start)


def latents(n: int = len(PROMPTS)) -> Tensor:
    """(n, 2, 4, 4) latents."""
    return draws.normal((n, *SHAPE), 0, "latents")


def latent_reward(estimator: str | dict[str, Any], **settings: Any) -> LatentReward:
    """With settings as a configuration file would give them."""
    return LatentReward(validate(LatentRewardConfig, {"estimator": estimator, **settings}))
