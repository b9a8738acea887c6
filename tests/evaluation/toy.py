"""A source small enough to reason about: four classes of coloured noise, an identity-like codec."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from twinrl.flow import draws
from twinrl.flow.source import Split

SHAPE, CLASSES = (3, 4, 4), ("red", "green", "blue", "grey")
CENTRES = torch.tensor([[0.5, -0.5, -0.5], [-0.5, 0.5, -0.5], [-0.5, -0.5, 0.5], [0.0, 0.0, 0.0]])
SPREAD = 0.1


def images(labels: Tensor, noise: Tensor) -> Tensor:
    """(N, 3, 4, 4) images of the classes: centre colour plus scaled noise."""
    return CENTRES[labels][:, :, None, None] + SPREAD * noise


def make_split(name: str, n: int) -> Split:
    labels = torch.arange(n) % len(CLASSES)
    return Split(images(labels, draws.normal((n, *SHAPE), 7, name)), labels)


class NearestCentre:
    """The judge: features are mean colours, channel spreads and a few pixels; classes the nearest centre."""

    def features(self, pixels: Tensor) -> Tensor:
        means, spreads = pixels.mean((2, 3)), pixels.std((2, 3))
        return torch.cat([means, spreads, pixels[:, :, 0, 0]], 1)

    def logits(self, pixels: Tensor) -> Tensor:
        return -torch.cdist(pixels.mean((2, 3)), CENTRES)


class Brightness:
    """A scorer that (rudely) draws from the global stream, as a user's might."""

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        assert len(prompts) == len(pixels)
        return pixels.mean((1, 2, 3)) + 1e-3 * torch.randn(len(pixels))


@dataclass
class ToySource:
    """Fulfils ``Source``; latents are pixels times two."""

    name: str = "toy"
    content_hash: str = "0"
    latent_shape: tuple[int, int, int] = SHAPE
    classes: tuple[str, ...] = CLASSES
    train: Split = field(default_factory=lambda: make_split("train", 100))
    validation: Split = field(default_factory=lambda: make_split("validation", 120))
    test: Split = field(default_factory=lambda: make_split("test", 160))
    judge: NearestCentre = field(default_factory=NearestCentre)
    scorers: Mapping[str, Brightness] = field(default_factory=lambda: {"bright": Brightness(), "other": Brightness()})
    held_out: frozenset[str] = frozenset({"other"})

    def latents(self, split: str) -> Tensor:
        return self.encode(getattr(self, split).pixels)

    def encode(self, pixels: Tensor) -> Tensor:
        return 2 * pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents / 2

    def prompts(self, labels: Tensor, seed: int, step: int, held_out: bool = False) -> list[str]:
        return [CLASSES[label] for label in labels.tolist()]

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"label": torch.tensor([CLASSES.index(prompt) for prompt in prompts])}

    def null_condition(self, n: int) -> dict[str, Tensor]:
        return {"label": torch.full((n,), len(CLASSES) - 1)}

    def teacher_weights(self, network: nn.Module, key: str) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def to(self, device: str) -> "ToySource":
        return self


class Exact(nn.Module):
    """The perfect one-step generator: ``z − F(z, 1, 0)`` is a fresh image of the asked class.

    Dropout, a part kept in eval mode and a draw from the global stream make disturbed modes or streams show.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.frozen = nn.BatchNorm2d(3).eval()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        torch.randn(1)
        wanted = 2 * images(condition["label"], x) + self.shift
        return self.dropout((x - wanted) / t.view(-1, 1, 1, 1))
