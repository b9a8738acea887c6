"""The encoder of a pretrained family: its VAE and text encoders, identified by their weights."""

import json
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from twinrl.data.identity import digest
from twinrl.lab.storage import content_hash

if TYPE_CHECKING:
    from twinrl.backends.families.family import Family


class FamilyEncoder:
    """Satisfies ``Encoder`` with a family's frozen parts, on whatever device they are.

    Arguments:
        family: with its VAE and text encoders loaded.

    Attributes:
        cut: tokenizer → prompts encoded so far that were longer than its text encoder sees.

    *When to use*: to prepare data, and to check that prepared data belong to the model (``CachedDataset``'s
    ``encoder``). Making the key reads all frozen weights once: some seconds for billions of parameters.
    """

    def __init__(self, family: "Family"):
        self.family = family
        self.key = _key(family)
        self.cut: Counter[str] = Counter()

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) pixels in [−1, 1] → normalised latents, the posterior's mean."""
        return self.family.encode(pixels.to(self.family.device))

    def encode_prompts(self, prompts: list[str]) -> dict[str, Tensor]:
        """B prompts → the family's condition."""
        self.cut.update(self.family.cut(prompts))
        return dict(self.family.encode_prompts(prompts))


@torch.no_grad()
def _key(family: "Family") -> str:
    """Family, precision, and a digest of weights, vocabularies and what else decides the encoders' numbers."""
    parts = {name: part for name, part in family.pipeline.components.items() if isinstance(part, nn.Module)}
    weights = {name: dict(part.state_dict()) for name, part in parts.items() if name != family.PART}
    vae = {name: str(value) for name, value in family.pipeline.vae.config.items() if not name.startswith("_")}
    settings = {"family": family.NAME, "tokens": family.TOKENS, "vae": vae, "tokenizers": _tokenizers(family)}
    found = content_hash(weights, settings)
    precision = str(family.pipeline.vae.dtype).removeprefix("torch.")
    return f"{family.NAME}-{precision}-{found[:32]}"


def _tokenizers(family: "Family") -> dict[str, str]:
    """Of each tokenizer a digest of its vocabulary and of the template around a prompt."""
    parts = {name: part for name, part in family.pipeline.components.items() if hasattr(part, "get_vocab")}
    return {
        name: digest(getattr(part, "chat_template", None), json.dumps(sorted(part.get_vocab().items())))
        for name, part in parts.items()
    }
