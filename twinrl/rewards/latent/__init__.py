"""Gradients of rewards in latent space, with selectable estimators."""

from twinrl.rewards.latent.contract import (
    Codec,
    Estimate,
    KeyedRows,
    LatentEstimator,
    PixelEstimator,
    RewardFunction,
    RowDraws,
)
from twinrl.rewards.latent.latent_reward import ESTIMATORS, LatentGradient, LatentReward, LatentRewardConfig

__all__ = [
    "ESTIMATORS", "Codec", "Estimate", "KeyedRows", "LatentEstimator", "LatentGradient", "LatentReward",
    "LatentRewardConfig", "PixelEstimator", "RewardFunction", "RowDraws",
]  # fmt: skip
