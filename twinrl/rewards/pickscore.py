"""PickScore (Kirstain et al., arXiv:2305.01569): CLIP ViT-H/14 fine-tuned on the choices of Pick-a-Pic's users.

    R(y, c) = exp(logit_scale)·cos(image(crop(y)), text(c))

With the published temperature, about 100, scores lie near 20; a difference of 1 means odds of e between two images of
one prompt. CLIP's own preprocessing, a centre crop.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from twinrl.rewards.hf_clip import HFClipReward, load_clip
from twinrl.rewards.model import RewardModelConfig
from twinrl.rewards.weights import located_folder

PICKSCORE_REPOSITORY = "yuvalkirstain/PickScore_v1"


class PickScore(HFClipReward):
    """PickScore v1.

    *When to use*: preference reward from another data set than HPSv2's: as the second member of an ensemble, or as
    the held-out judge of a run that ascends HPSv2.
    """

    class Config(RewardModelConfig):
        kind: Literal["pickscore"] = "pickscore"
        checkpoint: Path | None = Field(
            None, description=f"folder in transformers' format; null = {PICKSCORE_REPOSITORY} from the hub"
        )

    def network(self) -> nn.Module:
        return load_clip(located_folder(self.config.checkpoint, PICKSCORE_REPOSITORY, f"{self.context.key}.checkpoint"))

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (self.image_embedding(images) * self.text_embedding(prompts)).sum(-1)
        return self.clip.logit_scale.to(self.precise).exp() * cosine
