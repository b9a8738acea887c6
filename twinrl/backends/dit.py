"""A small diffusion transformer (DiT, arXiv:2212.09748): patches, self-attention, adaLN-zero modulation."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from twinrl.backends.embedding import Conditioning, NetworkConfig, Spec, VelocityNetwork, gaussian_velocity
from twinrl.flow.conditions import Condition


class DiT(VelocityNetwork):
    """Transformer over latent patches with learnt positions; times and condition modulate every block.

    *When to use*: to see whether a finding on the MLP holds for the architecture family of large models.

    Arguments:
        config: sizes.
        spec: shape of the latents and kind of condition.

    Raises:
        ValueError: the patch does not divide the latents' height and width.
    """

    class Config(NetworkConfig):
        """Settings of the DiT."""

        kind: Literal["dit"] = "dit"
        width: int = Field(96, ge=8, le=4096, description="width of a token")
        depth: int = Field(4, ge=1, le=64, description="number of transformer blocks")
        heads: int = Field(4, ge=1, le=64, description="attention heads; divides the width")
        patch: int = Field(2, ge=1, le=16, description="side of a patch; divides the latents' sides")
        expansion: int = Field(2, ge=1, le=8, description="width of the blocks' perceptron / width")
        condition_width: int = Field(128, ge=8, le=4096, description="width of the time and condition vector")

        @model_validator(mode="after")
        def _heads_divide_width(self) -> "DiT.Config":
            if self.width % self.heads:
                raise ValueError(f"heads {self.heads} do not divide width {self.width}")
            return self

    def __init__(self, config: Config, spec: Spec):
        super().__init__(config, spec)
        channels, height, width = spec.latent_shape
        if height % config.patch or width % config.patch:
            raise ValueError(f"patch {config.patch} does not divide latents of {height}×{width}")
        self.patch = config.patch
        values, tokens = channels * config.patch**2, height * width // config.patch**2
        self.conditioning = Conditioning(spec, config.condition_width)
        self.enter = nn.Linear(values, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = _zero_linear(config.condition_width, 2 * config.width)
        self.leave = _zero_linear(config.width, values)

    def forward(self, x_bchw: Tensor, t_b: Tensor, r_b: Tensor, condition: Condition) -> Tensor:
        """``F(x_t, t, r, c)``: latents (B, C, H, W), t in [−1, 1], |r| ≤ |t| → velocity (B, C, H, W)."""
        told = self.conditioning(t_b, r_b, condition)[:, None]  # (B, 1, condition_width)
        tokens = self.enter(patchify(x_bchw, self.patch)) + self.position
        for block in self.blocks:
            tokens = block(tokens, told)
        shift, scale = self.modulation(told).chunk(2, dim=-1)
        patches = self.leave(self.norm(tokens) * (1 + scale) + shift)
        return unpatchify(patches, x_bchw, self.patch) + gaussian_velocity(x_bchw, t_b)


class Block(nn.Module):
    """Attention, then a perceptron, each modulated and gated by the conditioning; the identity at first."""

    def __init__(self, config: DiT.Config):
        super().__init__()
        width, inner = config.width, config.width * config.expansion
        self.heads = config.heads
        self.modulation = _zero_linear(config.condition_width, 6 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))

    def forward(self, tokens: Tensor, told: Tensor) -> Tensor:
        """Tokens (B, L, width) and conditioning (B, 1, condition_width) → tokens."""
        shift_a, scale_a, gate_a, shift_p, scale_p, gate_p = self.modulation(told).chunk(6, dim=-1)
        tokens = tokens + gate_a * self.attention(self.norm(tokens) * (1 + scale_a) + shift_a)
        return tokens + gate_p * self.perceptron(self.norm(tokens) * (1 + scale_p) + shift_p)

    def attention(self, tokens: Tensor) -> Tensor:
        """Multi-head self-attention of (B, L, width)."""
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.merge(scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def patchify(x_bchw: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) → (B, H·W/patch², C·patch²), patches in row order."""
    B, C, H, W = x_bchw.shape
    x = x_bchw.reshape(B, C, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch**2)


def unpatchify(patches: Tensor, x_bchw: Tensor, patch: int) -> Tensor:
    """The inverse of ``patchify`` for an image of ``x_bchw``'s shape."""
    B, C, H, W = x_bchw.shape
    x = patches.reshape(B, H // patch, W // patch, C, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


def _zero_linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
