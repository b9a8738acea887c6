"""A laboratory's autoencoder: a small, true latent space with a true round-trip error.

A diffusers ``AutoencoderKL`` that halves images twice: 32×32 digits have 4×8×8 latents. The flow lives in *normalised*
latents: posterior means, shifted and scaled per channel to zero mean and unit variance over the training split.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.flow.draws import normal
from twinrl.lab.fitting import Keeper, Recipe, fit
from twinrl.lab.recipe import Form

_KL_WEIGHT = 1e-6
_CHUNK = 256  # rows encoded at once


class Autoencoder(nn.Module):
    """Encoder and decoder between pixels and normalised latents; deterministic, differentiable.

    Arguments:
        form: sizes of pictures, latents and layers.
    """

    vae: Any
    mean: Tensor
    std: Tensor

    def __init__(self, form: Form):
        super().__init__()
        self.vae = _autoencoder(form)
        self.register_buffer("mean", torch.zeros(1, form.latent_channels, 1, 1))
        self.register_buffer("std", torch.ones(1, form.latent_channels, 1, 1))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → normalised posterior means (B, C, H/4, W/4)."""
        return (self.vae.encode(pixels).latent_dist.mean - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) → pixels (B, 3, 4h, 4w), not clamped."""
        return self.vae.decode(latents * self.std + self.mean).sample

    @torch.no_grad()
    def encode_all(self, pixels: Tensor) -> Tensor:
        """``encode`` for any number of rows, in chunks, without gradient."""
        return torch.cat([self.encode(chunk) for chunk in pixels.split(_CHUNK)])


def train_codec(
    codec: Autoencoder, pixels: Tensor, recipe: Recipe, tick: Callable[[], None], keeper: Keeper | None = None
) -> None:
    """Train ``codec`` in place on ``pixels`` (N, 3, H, W) in [−1, 1]; its normalisation is measured there."""

    def loss(step: int) -> Tensor:
        return _evidence_loss(codec.vae, pixels[recipe.rows(len(pixels), step)], recipe.seed, step)

    fit(codec.parameters(), loss, recipe, tick, keeper)
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


def _autoencoder(form: Form) -> Any:
    from twinrl.lab.libraries import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=form.codec_channels,
        layers_per_block=1,
        latent_channels=form.latent_channels,
        norm_num_groups=8,
        sample_size=form.side,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
