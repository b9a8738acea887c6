"""CLIPScore (Hessel et al., arXiv:2104.08718): does the image show what the prompt says? CLIP without fine-tuning.

    cosine     R = cos(image(crop(y)), text(c))                         the default: a gradient everywhere
    percent    R = 100·max(cos, 0)                                      torchmetrics' definition
    paper      R = 2.5·max(cos, 0), text = "A photo depicts " + c       the paper's, with its prefix

Where cos < 0 the two clipped definitions have no gradient.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from twinrl.rewards.hf_clip import HFClipReward, load_clip
from twinrl.rewards.model import RewardModelConfig
from twinrl.rewards.weights import located_folder

PREFIX = "A photo depicts "


class CLIPScore(HFClipReward):
    """Agreement of image and prompt by plain CLIP.

    *When to use*: as the control of a preference reward: at least one published run labelled plain CLIP "HPSv2".
    """

    class Config(RewardModelConfig):
        kind: Literal["clipscore"] = "clipscore"
        definition: Literal["cosine", "percent", "paper"] = Field("cosine", description="formula, see the module")
        repository: str = Field("openai/clip-vit-base-patch32", description="CLIPModel on the hub; the paper's model")
        checkpoint: Path | None = Field(None, description="folder in transformers' format; null = from the hub")

    def network(self) -> nn.Module:
        setting = f"{self.context.key}.checkpoint"
        return load_clip(located_folder(self.config.checkpoint, self.config.repository, setting))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        prefix = PREFIX if self.config.definition == "paper" else ""
        text = self.text_embedding([prefix + prompt for prompt in prompts])
        cosine = (self.image_embedding(images) * text).sum(-1)
        if self.config.definition == "cosine":
            return cosine
        return (100 if self.config.definition == "percent" else 2.5) * cosine.relu()
