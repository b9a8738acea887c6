"""LAION aesthetic predictor v2 (Schuhmann, improved-aesthetic-predictor): how well would people rate the image?

    R(y) = head(image(crop(y)) / ‖·‖),   head: linear layers D → 1024 → 128 → 64 → 16 → 1

A mean opinion from 1 to 10 in principle, 4 to 7 in practice. The image embedding is that of OpenAI's CLIP ViT-L/14
(D = 768). The layers have dropout and *no* nonlinearity between them, so in evaluation the head is one linear
functional of the unit embedding: easy to ascend and easy to exploit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from twinrl.rewards.hf_clip import HFClipReward, load_clip
from twinrl.rewards.model import RewardModelConfig
from twinrl.rewards.weights import PUBLISHED, HubFile, located, located_folder, read_weights
from twinrl.run.fit import load_module

TOWER = "openai/clip-vit-large-patch14"
HEAD = HubFile("camenduru/improved-aesthetic-predictor", "sac+logos+ava1-l14-linearMSE.pth")


class ScoreHead(nn.Module):
    """Features (B, D) → (B, 1); names and order as in the files of the LAION predictor and of ImageReward."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features)


class Aesthetic(HFClipReward):
    """LAION's aesthetic score, v2.

    *When to use*: prompts do not matter; DDPO's and many papers' aesthetic reward. Never alone: nothing keeps the
    image to its prompt.
    """

    needs_prompts = False

    class Config(RewardModelConfig):
        kind: Literal["aesthetic"] = "aesthetic"
        checkpoint: Path | None = Field(None, description=f"the head's file ({HEAD.filename}); null = from the hub")
        tower: Path | None = Field(None, description=f"folder of the CLIPModel; null = {TOWER} from the hub")

    def network(self) -> nn.Module:
        path = located(self.config.checkpoint, HEAD, f"{self.context.key}.checkpoint")
        clip: Any = load_clip(located_folder(self.config.tower, TOWER, f"{self.context.key}.tower"))
        head = ScoreHead(clip.config.projection_dim)
        load_module(head, read_weights(path), path, PUBLISHED)
        del clip.text_model, clip.text_projection  # no prompts: a third of the parameters
        return nn.ModuleDict({"clip": clip, "head": head})

    @property
    def clip(self) -> Any:
        return self._part("clip")

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._part("head")(self.image_embedding(images).to(self.dtype)).to(self.precise)[:, 0]

    def _part(self, name: str) -> nn.Module:
        parts: Any = self.model
        return parts[name]
