"""The lab's autoencoder: a small, true latent space with a true round-trip error.

A diffusers ``AutoencoderKL`` that halves 32×32 images twice: 4×8×8 latents. The flow lives in *normalised*
latents: posterior means, shifted and scaled per channel to zero mean and unit variance over the training split.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.flow.draws import normal
from twinrl.lab.fitting import Recipe, fit

LATENT_SHAPE = (4, 8, 8)
_CHANNELS = (8, 16, 32)
_KL_WEIGHT = 1e-6
_CHUNK = 256  # rows encoded at once


class Autoencoder(nn.Module):
    """Encoder and decoder between pixels and normalised latents; deterministic, differentiable."""

    vae: Any
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.vae = _autoencoder()
        self.register_buffer("mean", torch.zeros(1, LATENT_SHAPE[0], 1, 1))
        self.register_buffer("std", torch.ones(1, LATENT_SHAPE[0], 1, 1))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 32, 32) in [−1, 1] → normalised posterior means (B, 4, 8, 8)."""
        return (self.vae.encode(pixels).latent_dist.mean - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, 4, 8, 8) → pixels (B, 3, 32, 32), not clamped."""
        return self.vae.decode(latents * self.std + self.mean).sample

    @torch.no_grad()
    def encode_all(self, pixels: Tensor) -> Tensor:
        """``encode`` for any number of rows, in chunks, without gradient."""
        return torch.cat([self.encode(chunk) for chunk in pixels.split(_CHUNK)])


def train_codec(codec: Autoencoder, pixels: Tensor, recipe: Recipe, tick: Callable[[], None]) -> None:
    """Train ``codec`` in place on ``pixels`` (N, 3, 32, 32) in [−1, 1]; its normalisation is measured there."""

    def loss(step: int) -> Tensor:
        return _evidence_loss(codec.vae, pixels[recipe.rows(len(pixels), step)], recipe.seed, step)

    fit(codec.parameters(), loss, recipe, tick)
    _normalise(codec, pixels)
    codec.eval().requires_grad_(False)


def _evidence_loss(vae: Any, x: Tensor, seed: int, step: int) -> Tensor:
    """Mean absolute plus squared error of one keyed posterior sample's image, plus a small KL term."""
    posterior = vae.encode(x).latent_dist
    noise = normal(tuple(posterior.mean.shape), seed, "posterior", step)
    error = vae.decode(posterior.mean + posterior.std * noise).sample - x
    return error.abs().mean() + error.square().mean() + _KL_WEIGHT * posterior.kl().mean()


def _normalise(codec: Autoencoder, pixels: Tensor) -> None:
    """Set the codec's mean and std so that the latents of ``pixels`` have zero mean, unit variance."""
    raw = codec.encode_all(pixels)
    codec.mean.copy_(raw.mean(dim=(0, 2, 3), keepdim=True))
    codec.std.copy_(raw.std(dim=(0, 2, 3), keepdim=True))


def _autoencoder() -> Any:
    from twinrl.lab.libraries import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=_CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT_SHAPE[0],
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
