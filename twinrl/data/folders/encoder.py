"""The encoder of a pretrained family: its VAE and text encoders, identified by their weights."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twinrl.lab.storage import content_hash

if TYPE_CHECKING:
    from twinrl.backends.families.family import Family


class FamilyEncoder:
    """Satisfies ``Encoder`` with a family's frozen parts, on whatever device they are.

    Arguments:
        family: with its VAE and text encoders loaded.

    *When to use*: to prepare data, and to check that prepared data belong to the model (``CachedDataset``'s
    ``encoder``). Making the key reads all frozen weights once: some seconds for billions of parameters.
    """

    def __init__(self, family: "Family"):
        self.family = family
        self.key = _key(family)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [−1, 1] → normalised latents, the posterior's mean."""
        return self.family.encode(pixels.to(self.family.device))

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """B prompts → the family's condition."""
        return dict(self.family.encode_prompts(prompts))


@torch.no_grad()
def _key(family: "Family") -> str:
    """Family, precision, and a digest of the frozen parts' weights and of what else decides their numbers."""
    parts = {name: part for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}
    weights = {name: dict(part.state_dict()) for name, part in parts.items() if name != family.PART}
    vae = {name: str(value) for name, value in family.pipeline.vae.config.items() if not name.startswith("_")}
    digest = content_hash(weights, {"family": family.NAME, "tokens": family.TOKENS, "vae": vae})
    precision = str(family.pipeline.vae.dtype).removeprefix("torch.")
    return f"{family.NAME}-{precision}-{digest[:32]}"
