"""vae_backprop: the exact latent gradient, ``g_z = J_D(z)ᵀ·∂R/∂y``, by back-propagation through the decoder.

The chain is cut at the image (a checkpoint by hand): the decoder runs once without a graph, the reward's graph is
freed before the decoder runs again with one. The peak is the larger of both graphs instead of their sum.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from twinrl.config import Settings
from twinrl.rewards.latent.autograd import reward_gradient
from twinrl.rewards.latent.contract import Codec, Estimate, LatentEstimator, RewardFunction, RowDraws


class VaeBackprop(LatentEstimator):
    """*When to use*: as the ground truth for the others, and wherever memory allows it."""

    differentiates = True

    class Config(Settings):
        kind: Literal["vae_backprop"] = "vae_backprop"

    def latent_gradient(
        self, z: Tensor, prompts: Sequence[str], codec: Codec, reward: RewardFunction, rows: RowDraws
    ) -> Estimate:
        return exact_gradient(z, prompts, codec, reward)


def exact_gradient(z: Tensor, prompts: Sequence[str], codec: Codec, reward: RewardFunction) -> Estimate:
    """``∇_z R(D(z))`` (B, C, h, w) at latents ``z``, and the scores (B,).

    Raises:
        InputError: the reward is not differentiable.
    """
    with torch.no_grad():
        y = codec.decode(z)
    at_image = reward_gradient(y, prompts, reward, "vae_backprop")
    leaf = z.detach().requires_grad_()
    with torch.enable_grad():
        (g,) = torch.autograd.grad(codec.decode(leaf), leaf, grad_outputs=at_image.g)
    return Estimate(g, at_image.scores)
