"""ImageReward (Xu et al., arXiv:2304.05977): BLIP with an image-grounded text encoder and a score head.

    R(y, c) = (head(text(c | image(crop(y)))₀) − 0.1672) / 1.0333

The text encoder reads the prompt (35 tokens) with cross-attention to the image's patches; the head sees the first
token. The constants standardise over the authors' data: 0 is an average image there, 1 a standard deviation better.

Here the network is transformers' ``BlipVisionModel`` and ``BlipTextModel``, and :func:`renamed` maps the names of
``ImageReward.pt`` (hub: ``THUDM/ImageReward``) to theirs. **Verified** once against the vision transformer and the
BERT of the package ``image-reward`` 1.5, at small sizes and with random weights: every name of theirs maps to one of
this network, and scores are equal to the last bit, for short, padded and cut prompts. **Not verified**: the published
file itself; should it hold other names, loading says which.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from twinrl.config import Settings
from twinrl.machine.compat import ensure_torchvision
from twinrl.machine.moving import moved
from twinrl.rewards.aesthetic import ScoreHead
from twinrl.rewards.model import ModelReward, RewardModelConfig
from twinrl.rewards.preprocess import centre_crop
from twinrl.rewards.reward import WITHOUT_SOURCE, RewardContext
from twinrl.rewards.weights import PUBLISHED, HubFile, located, read_weights
from twinrl.run.fit import load_module

CHECKPOINT = HubFile("THUDM/ImageReward", "ImageReward.pt")
VOCABULARY = HubFile("google-bert/bert-base-uncased", "vocab.txt")
MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35


class BlipSizes(Settings):
    """Sizes of the network; the defaults are the published model's (BLIP with ViT-L/16)."""

    image: int = Field(224, ge=1, description="side of the input, in pixels")
    patch: int = Field(16, ge=1, description="side of a patch, in pixels")
    vision_width: int = Field(1024, ge=1, description="of the image tower")
    vision_layers: int = Field(24, ge=1, description="of the image tower")
    vision_heads: int = Field(16, ge=1, description="of the image tower")
    text_width: int = Field(768, ge=1, description="of the text encoder")
    text_layers: int = Field(12, ge=1, description="of the text encoder")
    text_heads: int = Field(12, ge=1, description="of the text encoder")
    vocabulary: int = Field(30524, ge=1, description="BERT's 30522 tokens and BLIP's two")


class BlipReward(nn.Module):
    """Image tower, text encoder and head; tensors in, raw scores out."""

    def __init__(self, sizes: BlipSizes):
        super().__init__()
        ensure_torchvision()
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        vision = BlipVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.vision_width,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image,
            patch_size=sizes.patch,
            layer_norm_eps=1e-6,  # BLIP's own; transformers' default differs
        )
        text = BlipTextConfig(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.text_width,
            encoder_hidden_size=sizes.vision_width,
            intermediate_size=4 * sizes.text_width,
            num_hidden_layers=sizes.text_layers,
            num_attention_heads=sizes.text_heads,
        )
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.text.set_attn_implementation("eager")  # the only one that adds up its masks
        self.head = ScoreHead(sizes.text_width)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Normalised pixels (B, 3, S, S), tokens and mask (B, L) → raw scores (B,)."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(
            input_ids=tokens, attention_mask=mask, encoder_hidden_states=patches, is_decoder=False
        ).last_hidden_state
        return self.head(read[:, 0])[:, 0]


class ImageReward(ModelReward):
    """ImageReward v1.0.

    *When to use*: preference reward with another architecture than the CLIP family, so that it shares few of
    their blind spots: in an ensemble, or as a held-out judge. ReFL ascends it.
    """

    class Config(RewardModelConfig):
        kind: Literal["imagereward"] = "imagereward"
        checkpoint: Path | None = Field(None, description=f"{CHECKPOINT.filename}; null = from the hub")
        vocabulary: Path | None = Field(None, description="vocab.txt of bert-base-uncased; null = from the hub")
        sizes: BlipSizes = Field(BlipSizes(), description="architecture, the published one by default")

    def __init__(self, config: Any, context: RewardContext = WITHOUT_SOURCE):
        super().__init__(config, context)
        from transformers import BertTokenizer

        path = located(config.vocabulary, VOCABULARY, f"{context.key}.vocabulary")
        self.tokenizer = BertTokenizer(str(path), do_lower_case=True)

    def network(self) -> nn.Module:
        path = located(self.config.checkpoint, CHECKPOINT, f"{self.context.key}.checkpoint")
        model = BlipReward(self.config.sizes)
        load_module(model, renamed(read_weights(path)), path, PUBLISHED)
        return model

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = centre_crop(images, self.config.sizes.image).to(self.dtype)
        text = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        tokens, mask = (moved(text[name], self.device) for name in ("input_ids", "attention_mask"))
        return (self.model(pixels, tokens, mask).to(self.precise) - MEAN) / STD


_RENAMES = (
    (r"^mlp\.", "head."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
)
_UNUSED = re.compile(r"^blip\.(vision_proj|text_proj)\.|\.position_ids$")
"""BLIP's contrastive projections, which the score does not use, and a constant buffer."""


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ImageReward's names → :class:`BlipReward`'s; unknown names are kept, so that loading reports them."""
    return {_renamed(name): value for name, value in weights.items() if not _UNUSED.search(name)}


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        new, found = re.subn(pattern, replacement, name)
        if found:
            return new
    return name
