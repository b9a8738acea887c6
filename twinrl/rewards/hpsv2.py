"""HPSv2 (Wu et al., arXiv:2306.09341): OpenCLIP ViT-H-14, fine-tuned on 798 k human choices between images.

    R(y, c) = cos(image(letterbox(y)), text(c))

The plain cosine, without CLIP's temperature; published tables show 100·R (v2.1: SD1.4 25.35, SDXL 30.63). Images are
letterboxed, not cropped (:func:`twinrl.rewards.preprocess.letterbox`): on images that are not square a crop changes
the score in its second decimal.

The checkpoints are those of the ``hpsv2`` package (hub: ``xswu/HPSv2``). The package itself scores PIL images without
gradient and pins old dependencies, so it serves the parity test alone: there, its own code and this file agree on the
same weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from twinrl.config.errors import InputError
from twinrl.machine.compat import ensure_torchvision
from twinrl.machine.moving import moved
from twinrl.rewards.model import ModelReward, RewardModelConfig
from twinrl.rewards.preprocess import letterbox
from twinrl.rewards.weights import PUBLISHED, HubFile, located, read_weights
from twinrl.run.fit import load_module

HPSV2_REPOSITORY = "xswu/HPSv2"
WEIGHTS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


class HPSv2(ModelReward):
    """Human Preference Score v2. 986 M parameters: 3.9 GB in float32, half of that in bf16.

    *When to use*: general preference reward for text-to-image models; compare only images of one prompt. v2.1 was
    trained on better data and is the default; v2.0 and v2.1 are different scales.
    """

    class Config(RewardModelConfig):
        kind: Literal["hpsv2"] = "hpsv2"
        version: Literal["v2.0", "v2.1"] = Field("v2.1", description="which of the two published checkpoints")
        checkpoint: Path | None = Field(None, description="local checkpoint file; null = from the hub")
        architecture: str = Field(
            "ViT-H-14", description="open_clip model name, or local-dir:PATH of a folder with open_clip_config.json"
        )

    def network(self) -> nn.Module:
        hub = HubFile(HPSV2_REPOSITORY, WEIGHTS_FILES[self.config.version])
        path = located(self.config.checkpoint, hub, f"{self.context.key}.checkpoint")
        model = open_clip_model(self.config.architecture, f"{self.context.key}.architecture")
        load_module(model, read_weights(path, inside="state_dict"), path, PUBLISHED)
        return model

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        pixels = letterbox(images, self.side).to(self.dtype)
        image = normalize(self.model.encode_image(pixels).to(self.precise), dim=-1)  # type: ignore[operator]
        return (image * self.texts(prompts, self._text, self.device)).sum(-1)

    def _text(self, prompt: str) -> Tensor:
        """Unit embedding (D,) of a prompt; tokens beyond the context's length are cut."""
        tokens = moved(clip_tokens([prompt], self.model.context_length), self.device)  # type: ignore[arg-type]
        return normalize(self.model.encode_text(tokens).to(self.precise), dim=-1)[0]  # type: ignore[operator]

    @property
    def side(self) -> int:
        """Pixels of the tower's square input."""
        size: Any = self.model.visual.image_size  # type: ignore[union-attr]
        return int(size[0] if isinstance(size, tuple | list) else size)


def open_clip_model(architecture: str, setting: str) -> nn.Module:
    """An open_clip CLIP with random weights; nothing is downloaded.

    Raises:
        InputError: open_clip knows no such architecture.
    """
    ensure_torchvision()
    import open_clip
    from open_clip.model import CLIP

    try:
        config = open_clip.get_model_config(architecture)
    except (OSError, ValueError) as error:
        raise InputError(f"{setting} {architecture!r} cannot be read", got=error) from error
    if config is None:
        raise InputError(
            f"{setting} {architecture!r} is no open_clip model", expected="e.g. ViT-H-14 or local-dir:PATH"
        )
    return CLIP(
        **{name: config[name] for name in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu") if name in config}
    )


def clip_tokens(prompts: Sequence[str], length: int) -> Tensor:
    """CLIP's byte-pair tokens (B, length) with open_clip's bundled vocabulary, zeros after the end token.

    Text towers of CLIP look back only and are read at the end token, so what pads behind it does not matter.
    """
    ensure_torchvision()
    from open_clip import tokenize

    return tokenize(list(prompts), context_length=length)
