"""What the estimators of a reward's latent gradient are given, and what they return.

Wanted is the ascent direction ``∇_z R(D(z), prompt)`` for latents z, decoder D and reward R, one gradient per image:
no image may influence another's. An estimator works either in pixels (:class:`PixelEstimator`), whose gradient the
encoder then carries into the latent space (:mod:`twinrl.rewards.latent.projection`), or in latents directly
(:class:`LatentEstimator`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from twinrl.config import Settings
from twinrl.flow import draws


class Codec(Protocol):
    """An autoencoder; ``twinrl.flow.source.Source`` is one."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) → pixels (B, 3, H, W), nominally in [−1, 1] but not clamped."""
        ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → latents (B, C, h, w)."""
        ...


class RewardFunction(Protocol):
    """A reward model.

    Attributes:
        differentiable: whether scores carry a gradient with respect to the pixels.
    """

    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] and B prompts → (B,) scores, higher is better, each row for itself."""
        ...


class RowDraws(Protocol):
    """Random numbers for the images of a call; the same purpose always gives the same numbers."""

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard normal numbers on the CPU."""
        ...

    def rows(self, start: int, stop: int) -> "RowDraws":
        """The draws of the images ``start`` … ``stop − 1`` alone."""
        ...


@dataclass(frozen=True)
class KeyedRows:
    """Draws that belong to rows of the global batch: neither chunks nor the number of ranks change them.

    Arguments:
        seed: the run's seed.
        step: training step.
        index: positions of the images in the global batch.
    """

    seed: int
    step: int
    index: tuple[int, ...]

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return draws.normal_rows(shape, self.seed, purpose, self.step, self.index)

    def rows(self, start: int, stop: int) -> "KeyedRows":
        return KeyedRows(self.seed, self.step, self.index[start:stop])


class Estimate(NamedTuple):
    """A gradient with the scores on the way.

    Attributes:
        g: (B, 3, H, W) in pixels, or (B, C, h, w) in latents; points uphill.
        scores: (B,) rewards of the undisturbed images.
        aux: metric name → (B,) values per image.
    """

    g: Tensor
    scores: Tensor
    aux: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class PixelEstimator(ABC):
    """Estimates ``g_y = ∂R/∂y``. A subclass gives ``Config`` and :meth:`pixel_gradient`.

    Attributes:
        differentiates: whether it asks for the scores' gradient, which some rewards have not.
    """

    config: Any
    Config: ClassVar[type[Settings]] = Settings
    differentiates: ClassVar[bool] = False

    @abstractmethod
    def pixel_gradient(self, y: Tensor, prompts: Sequence[str], reward: RewardFunction, rows: RowDraws) -> Estimate:
        """The gradient at pixels ``y`` (B, 3, H, W)."""


@dataclass(frozen=True)
class LatentEstimator(ABC):
    """Estimates ``∇_z R(D(z))`` without the encoder. A subclass gives ``Config`` and :meth:`latent_gradient`.

    Attributes:
        differentiates: as of :class:`PixelEstimator`.
    """

    config: Any
    Config: ClassVar[type[Settings]] = Settings
    differentiates: ClassVar[bool] = False

    @abstractmethod
    def latent_gradient(
        self, z: Tensor, prompts: Sequence[str], codec: Codec, reward: RewardFunction, rows: RowDraws
    ) -> Estimate:
        """The gradient at latents ``z`` (B, C, h, w)."""


def name_of(reward: RewardFunction) -> str:
    """The reward in words: its registered kind if it has one, else its class."""
    return str(getattr(getattr(reward, "config", None), "kind", type(reward).__name__))
