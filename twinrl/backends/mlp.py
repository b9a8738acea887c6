"""A residual perceptron on flattened latents: the cheapest network that learns the lab's flow."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twinrl.backends.embedding import Conditioning, NetworkConfig, Spec, VelocityNetwork, gaussian_velocity
from twinrl.flow.conditions import Condition


class MLP(VelocityNetwork):
    """Residual blocks of two linear layers, modulated by times and condition.

    *When to use*: sweeps on the lab, where thousands of runs count; it ignores the latents' geometry.

    Arguments:
        config: sizes.
        spec: shape of the latents and kind of condition.
    """

    class Config(NetworkConfig):
        """Settings of the MLP."""

        kind: Literal["mlp"] = "mlp"
        width: int = Field(384, ge=8, le=4096, description="width of the residual stream and of the blocks")
        depth: int = Field(4, ge=1, le=64, description="number of residual blocks, two linear layers each")
        condition_width: int = Field(128, ge=8, le=4096, description="width of the time and condition vector")

    def __init__(self, config: Config, spec: Spec):
        super().__init__(config, spec)
        size = spec.latent_shape[0] * spec.latent_shape[1] * spec.latent_shape[2]
        self.conditioning = Conditioning(spec, config.condition_width)
        self.enter = nn.Linear(size, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.leave = nn.Linear(config.width, size)
        nn.init.zeros_(self.leave.weight)

    def forward(self, x_bchw: Tensor, t_b: Tensor, r_b: Tensor, condition: Condition) -> Tensor:
        """``F(x_t, t, r, c)``: latents (B, C, H, W), t in [−1, 1], |r| ≤ |t| → velocity (B, C, H, W)."""
        told = self.conditioning(t_b, r_b, condition)
        hidden = self.enter(x_bchw.flatten(1))
        for block in self.blocks:
            hidden = block(hidden, told)
        return self.leave(self.norm(hidden)).view_as(x_bchw) + gaussian_velocity(x_bchw, t_b)


class Block(nn.Module):
    """``h + W₂·SiLU((1 + scale)·W₁·LayerNorm(h) + shift)``; scale and shift are linear in the conditioning."""

    def __init__(self, config: MLP.Config):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.first = nn.Linear(config.width, config.width)
        self.modulation = nn.Linear(config.condition_width, 2 * config.width)
        self.second = nn.Linear(config.width, config.width)

    def forward(self, hidden: Tensor, told: Tensor) -> Tensor:
        """Residual stream (B, width) and conditioning (B, condition_width) → residual stream."""
        scale, shift = self.modulation(told).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(self.first(self.norm(hidden)) * (1 + scale) + shift)
        return hidden + self.second(inner)
