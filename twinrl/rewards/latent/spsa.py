"""spsa: central differences along random signs in latent space (Spall 1992, simultaneous perturbation).

    ĝ = (1/K) Σ_k [R(D(z + ε·d_k)) − R(D(z − ε·d_k))]/2ε · d_k,   d_k ∈ {−1, 1}^D

The latent space has far fewer dimensions than the image (1/12 in the lab, 1/12 to 1/48 in large models), so K
directions know more about the gradient, and no encoder is needed; every evaluation costs a decoder pass.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinrl.config import Settings
from twinrl.flow.source import scored
from twinrl.rewards.latent import differences, directions
from twinrl.rewards.latent.contract import Codec, Estimate, LatentEstimator, RewardFunction, RowDraws
from twinrl.run import names


class Spsa(LatentEstimator):
    """*When to use*: for a reward without gradient, where decoding is cheap. 2K + 1 decodings and evaluations."""

    class Config(Settings):
        kind: Literal["spsa"] = "spsa"
        directions: int = Field(4, ge=1, description="K: directions per image")
        epsilon: float = Field(0.05, gt=0, allow_inf_nan=False, description="ε: step, latents having variance 1")

    @torch.no_grad()
    def latent_gradient(
        self, z: Tensor, prompts: Sequence[str], codec: Codec, reward: RewardFunction, rows: RowDraws
    ) -> Estimate:
        def score(latents: Tensor) -> Tensor:
            return scored(reward, codec.decode(latents), prompts)

        count = self.config.directions
        found = differences.along(score, z, None, directions.rademacher(rows, z, count), self.config.epsilon)
        return Estimate(found.g, score(z), {names.REWARD_GRAD_SNR: found.signal_to_noise()} if count > 1 else {})
