"""autograd: the exact pixel gradient, ``g_y = ∂R/∂y``, by back-propagation through the reward model alone."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.flow.source import scored
from twinrl.rewards.latent.contract import Estimate, PixelEstimator, RewardFunction, RowDraws, name_of


def reward_gradient(y: Tensor, prompts: Sequence[str], reward: RewardFunction, estimator: str) -> Estimate:
    """Exact ``∂R/∂y`` at pixels ``y`` (B, 3, H, W), and the scores (B,).

    The sum of the scores is differentiated, which keeps images apart: row i of its gradient is the gradient of
    score i, as no score depends on another image. A NaN in one score therefore stays in its row.

    Raises:
        InputError: the reward is not differentiable (``estimator`` names who wants it to be).
    """
    if not reward.differentiable:
        raise without_gradient(f"estimator {estimator}", name_of(reward))
    leaf = y.detach().requires_grad_()
    with torch.enable_grad():
        scores = scored(reward, leaf, prompts)
        g = torch.autograd.grad(scores.sum(), leaf, allow_unused=True)[0] if scores.requires_grad else None
    if g is None:
        raise InputError(
            f"reward {name_of(reward)} calls itself differentiable, but its scores do not depend on the pixels",
            fix="drop no_grad or detach in it, or set differentiable = False",
        )
    return Estimate(g, scores.detach())


def without_gradient(wanted_by: str, reward: str) -> InputError:
    """The refusal of a reward whose gradient ``wanted_by`` asks for."""
    return InputError(
        f"{wanted_by} needs a differentiable reward, and {reward} is none",
        fix="use random_direction, antithetic, orthogonal or spsa",
    )


class Autograd(PixelEstimator):
    """*When to use*: always, if the reward is differentiable; one forward and one backward pass of the reward."""

    differentiates = True

    class Config(Settings):
        kind: Literal["autograd"] = "autograd"

    def pixel_gradient(self, y: Tensor, prompts: Sequence[str], reward: RewardFunction, rows: RowDraws) -> Estimate:
        return reward_gradient(y, prompts, reward, "autograd")
