"""Pixel gradients from scores alone: finite differences along K random directions of the image.

The published run draws 4 Gaussian directions with ε = 0.01 (pixels in [−1, 1]) and passes the images through 8 bits:
``{kind: random_direction, directions: 4, epsilon: 0.01, quantise: true}``. One 8-bit level is 0.0078, so most of such
a perturbation is rounded away; the cosine to the true gradient is tiny in any case
(:mod:`twinrl.rewards.latent.directions`).
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from twinrl.config import Settings
from twinrl.flow.source import scored
from twinrl.rewards.latent import differences, directions
from twinrl.rewards.latent.contract import Estimate, PixelEstimator, RewardFunction, RowDraws
from twinrl.run import names


def to_8_bit(images: Tensor) -> Tensor:
    """Pixels rounded to the 256 levels of an image file between −1 and 1; values outside are clamped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


class FiniteDifferenceConfig(Settings):
    """Settings of all direction estimators in pixels."""

    kind: str
    directions: int = Field(4, ge=1, description="K: directions per image")
    epsilon: float = Field(0.01, gt=0, allow_inf_nan=False, description="ε: step, pixels being in [−1, 1]")
    quantise: bool = Field(False, description="round images to 8 bits before scoring, as through an image file")


class FiniteDifference(PixelEstimator):
    """ĝ from differences of scores; a subclass says along which directions and whether to both sides."""

    central: ClassVar[bool] = False
    independent: ClassVar[bool] = True  # whether the spread over directions measures the noise

    @abstractmethod
    def directions(self, rows: RowDraws, y: Tensor) -> Iterator[Tensor]:
        """K directions (B, 3, H, W), one at a time."""

    @torch.no_grad()
    def pixel_gradient(self, y: Tensor, prompts: Sequence[str], reward: RewardFunction, rows: RowDraws) -> Estimate:
        def score(images: Tensor) -> Tensor:
            return scored(reward, to_8_bit(images) if self.config.quantise else images, prompts)

        scores = score(y)
        base = None if self.central else scores
        found = differences.along(score, y, base, self.directions(rows, y), self.config.epsilon)
        judged = self.independent and self.config.directions > 1
        return Estimate(found.g, scores, {names.REWARD_GRAD_SNR: found.signal_to_noise()} if judged else {})


class RandomDirection(FiniteDifference):
    """Forward differences along Gaussian directions: K + 1 evaluations an image. As the published run does.

    *When to use*: to reproduce it. With a differentiable reward ``autograd`` is better and cheaper.
    """

    class Config(FiniteDifferenceConfig):
        kind: Literal["random_direction"] = "random_direction"

    def directions(self, rows: RowDraws, y: Tensor) -> Iterator[Tensor]:
        return directions.gaussian(rows, y, self.config.directions)


class Antithetic(FiniteDifference):
    """Central differences along Gaussian directions: 2K + 1 evaluations, no first-order effect of curvature.

    *When to use*: for a reward without gradient, if ε must be large against rounding or noise of the reward.
    """

    central = True

    class Config(FiniteDifferenceConfig):
        kind: Literal["antithetic"] = "antithetic"

    def directions(self, rows: RowDraws, y: Tensor) -> Iterator[Tensor]:
        return directions.gaussian(rows, y, self.config.directions)


class Orthogonal(FiniteDifference):
    """Forward differences along orthogonal directions: K + 1 evaluations, and the gradient itself at K = D.

    *When to use*: for a reward without gradient and small images; K images' worth of directions are held at once.
    """

    independent = False

    class Config(FiniteDifferenceConfig):
        kind: Literal["orthogonal"] = "orthogonal"

    def directions(self, rows: RowDraws, y: Tensor) -> Iterator[Tensor]:
        return directions.orthonormal(rows, y, self.config.directions)
