"""Latents as the pipelines hold them; noise that a scheduler injects has that layout, too."""

from torch import Tensor

from twinrl.backends.dit import patchify, unpatchify
from twinrl.backends.families.family import Family

PACKED = ("FluxPipeline", "QwenImagePipeline", "OvisImagePipeline")
"""Hold patch tokens (B, h·w/4, 4·C)."""


def to_pipeline(family: Family, latents: Tensor) -> Tensor:
    """Of latents (B, C, h, w)."""
    return patchify(latents, 2) if family.PIPELINE in PACKED else latents


def from_pipeline(family: Family, state: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The inverse, of latents of ``shape`` (C, h, w)."""
    return unpatchify(state, state.new_empty(len(state), *shape), 2) if family.PIPELINE in PACKED else state
