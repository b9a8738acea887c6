"""A frozen ``transformers.CLIPModel``: the tower of PickScore, CLIPScore and the LAION aesthetic score.

Read from a folder in transformers' format (``config.json`` and weights) with every weight accounted for: what
``from_pretrained`` would fill with random numbers under a warning is an error here. Prompts are tokenised with
open_clip's bundled vocabulary, which is CLIP's, so that the folder needs no tokenizer; it cleans text a little
differently from transformers' tokenizer (ftfy, HTML entities), with the same tokens for ordinary prompts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import normalize

from twinrl.config.errors import InputError
from twinrl.machine.compat import ensure_torchvision
from twinrl.machine.moving import moved
from twinrl.rewards.hpsv2 import clip_tokens
from twinrl.rewards.model import ModelReward
from twinrl.rewards.preprocess import centre_crop
from twinrl.rewards.weights import PUBLISHED
from twinrl.run.fit import refuse_misfit


def load_clip(folder: Path) -> nn.Module:
    """The CLIP model in ``folder``, on the CPU.

    Raises:
        InputError: the configuration or the weights cannot be read, or do not belong together.
    """
    ensure_torchvision()
    from safetensors import SafetensorError
    from transformers import CLIPModel

    read: Any = CLIPModel.from_pretrained
    try:
        model, report = read(folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{folder} cannot be read as a CLIP model",
            got=str(error).strip().splitlines()[0],
            expected="config.json and model.safetensors of a transformers.CLIPModel",
            fix="download it again: it is incomplete, truncated or of another kind",
        ) from error
    reshaped = [(name, own, given) for name, given, own in report["mismatched_keys"]]
    refuse_misfit(sorted(report["missing_keys"]), sorted(report["unexpected_keys"]), reshaped, folder, PUBLISHED)
    loaded: nn.Module = model
    return loaded


class HFClipReward(ModelReward):
    """Embeddings for rewards whose :attr:`clip` is a ``CLIPModel``."""

    @property
    def clip(self) -> Any:
        """The ``CLIPModel``."""
        return self.model

    def image_embedding(self, images: Tensor) -> Tensor:
        """(B, 3 or 1, H, W) in [−1, 1] → unit vectors (B, D) in ``precise``."""
        pixels = centre_crop(images, self.clip.config.vision_config.image_size).to(self.dtype)
        pooled = self.clip.vision_model(pixel_values=pixels).pooler_output
        return normalize(self.clip.visual_projection(pooled).to(self.precise), dim=-1)

    def text_embedding(self, prompts: Sequence[str]) -> Tensor:
        """B prompts → unit vectors (B, D) in ``precise``, without gradient."""
        return self.texts(prompts, self._text, self.device)

    def _text(self, prompt: str) -> Tensor:
        tokens = moved(clip_tokens([prompt], self.clip.config.text_config.max_position_embeddings), self.device)
        pooled = self.clip.text_model(input_ids=tokens).pooler_output
        return normalize(self.clip.text_projection(pooled).to(self.precise), dim=-1)[0]
