"""Latents as the pipelines hold them; noise that a scheduler injects has that layout, too."""

from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from twinrl.backends.dit import patchify, unpatchify
from twinrl.backends.families.family import Family

PATCHES = {
    "FluxPipeline": 2,
    "QwenImagePipeline": 2,
    "OvisImagePipeline": 2,
    "Flux2KleinPipeline": 1,
    "Flux2Pipeline": 1,
}
"""Those that hold patch tokens (B, h·w/p², p²·C), and the side p of a patch."""


def to_state(family: Family, latents: Tensor) -> Tensor:
    """Of latents (B, C, h, w), what the pipeline's scheduler sees."""
    return patchify(latents, PATCHES[family.PIPELINE]) if family.PIPELINE in PATCHES else latents


def from_state(family: Family, state: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The inverse, of latents of ``shape`` (C, h, w)."""
    if family.PIPELINE not in PATCHES:
        return state
    return unpatchify(state, state.new_empty(len(state), *shape), PATCHES[family.PIPELINE])


def to_pipeline(family: Family, latents: Tensor) -> Tensor:
    """Of latents (B, C, h, w), what the pipeline is given; FLUX.2's makes its tokens itself."""
    return latents if family.PIPELINE.startswith("Flux2") else to_state(family, latents)


def from_pipeline(family: Family, state: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Of what the pipeline returns, latents of ``shape`` (C, h, w); FLUX.2 [klein]'s gives what its VAE decodes."""
    if family.PIPELINE != "Flux2KleinPipeline":
        return from_state(family, state, shape)
    vae = family.pipeline.vae
    mean, variance = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    return (pixel_unshuffle(state, 2) - mean) / (variance + vae.config.batch_norm_eps).sqrt()
