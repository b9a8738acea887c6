"""What is wrong with a worse image: the degradations that the lab's preference models learn to dislike."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from twinrl.lab.vae import Autoencoder

Degradation = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(pixels (B, 3, H, W), captions' numbers (B,), generator) → worse pixels (B, 3, H, W)."""


class Degrade:
    """Applies one degradation, drawn by the generator, to each image.

    Arguments:
        codec: makes the autoencoder's artefacts.
    """

    def __init__(self, codec: Autoencoder):
        self.codec = codec
        self.kinds: dict[str, Degradation] = {
            "blur": blur,
            "noise": noise,
            "contrast": contrast,
            "artefacts": self.artefacts,
            "wrong picture": wrong_picture,
            "ghost": ghost,
            "hole": hole,
        }

    def __call__(self, pixels: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        """Worse versions of ``pixels`` (B, 3, H, W) in [−1, 1]; rows of one label (B,) share their caption."""
        kinds = list(self.kinds.values())
        drawn = torch.randint(len(kinds), (len(pixels),), generator=draw)
        worse = torch.empty_like(pixels)
        for number, degradation in enumerate(kinds):
            rows = (drawn == number).nonzero()[:, 0]
            if len(rows):
                worse[rows] = degradation(pixels[rows], labels[rows], draw)
        return worse.clamp(-1, 1)

    @torch.no_grad()
    def artefacts(self, x: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
        """Decoded from latents with noise of 0.5–1.2 standard deviations."""
        z = self.codec.encode(x)
        return self.codec.decode(z + _strength(x, 0.5, 1.2, draw) * torch.randn(z.shape, generator=draw))


def blur(x: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Mixed with a mean filter of 9 pixels of 32, twice applied."""
    smooth, reach = x, x.shape[-1] // 8
    for _ in range(2):
        smooth = avg_pool2d(pad(smooth, (reach,) * 4, mode="replicate"), 2 * reach + 1, stride=1)
    return torch.lerp(x, smooth, _strength(x, 0.6, 1.0, draw))


def noise(x: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Pixel noise of 0.2–0.8."""
    return x + _strength(x, 0.2, 0.8, draw) * torch.randn(x.shape, generator=draw)


def contrast(x: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Too weak around a random grey: contrast reduced to 20–60 %."""
    grey = _strength(x, -0.6, 0.6, draw)
    return torch.lerp(grey.expand_as(x), x, _strength(x, 0.2, 0.6, draw))


def wrong_picture(x: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Another image of the batch, of another caption where there is one; else the image upside down."""
    partner = _partner(labels, draw)
    other = (labels[partner] != labels).view(-1, 1, 1, 1)
    return torch.where(other, x[partner], x.flip(2))


def ghost(x: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """Two images over each other, the other at 35–65 %: what a blurry average of modes looks like."""
    return torch.lerp(x, wrong_picture(x, labels, draw), _strength(x, 0.35, 0.65, draw))


def hole(x: Tensor, labels: Tensor, draw: torch.Generator) -> Tensor:
    """A grey or black square of 12 pixels of 32 over the middle part."""
    scale = x.shape[-1] // 32
    corner = torch.randint(6, 15, (len(x), 2), generator=draw) * scale
    place = torch.arange(x.shape[-1])
    inside = (place >= corner[..., None]) & (place < corner[..., None] + 12 * scale)  # (B, 2, side)
    mask = inside[:, 0, :, None] & inside[:, 1, None, :]
    return torch.where(mask[:, None], _strength(x, -1.0, 0.2, draw), x)


def _strength(x: Tensor, low: float, high: float, draw: torch.Generator) -> Tensor:
    """(B, 1, 1, 1) uniform strengths."""
    return low + (high - low) * torch.rand((len(x), 1, 1, 1), generator=draw)


def _partner(labels: Tensor, draw: torch.Generator) -> Tensor:
    """For each row another row, by a random rotation of the batch."""
    n = len(labels)
    shift = int(torch.randint(1, max(n, 2), (1,), generator=draw))
    return torch.arange(n).roll(shift)
