"""Gradients of rewards in latent space, with selectable estimators."""

from twinrl.rewards.latent.contract import Codec, Estimate, KeyedRows, LatentEstimator, PixelEstimator, Reward, RowDraws
from twinrl.rewards.latent.reward import ESTIMATORS, LatentGradient, LatentReward, LatentRewardConfig

__all__ = [
    "ESTIMATORS", "Codec", "Estimate", "KeyedRows", "LatentEstimator", "LatentGradient", "LatentReward",
    "LatentRewardConfig", "PixelEstimator", "Reward", "RowDraws",
]  # fmt: skip
