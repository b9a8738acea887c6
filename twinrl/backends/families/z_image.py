"""Z-Image (arXiv:2511.22699): one stream of latent patches and Qwen3 text; time runs from noise 0 to data 1.

Its transformer takes lists, is given 1 − t and answers data − noise. The public TwinFlow patch embeds the target as the
*distance* from the source, scaled by its absolute value; at r = t both are zero on either branch, and 1 − |t| loses the
sign at t = 1, so that it cannot tell the branches apart. Here the distance stays, so that its weights load, and the
separate sign tells them apart.
"""

from functools import wraps
from typing import Any

import torch
from diffusers import ZImageTransformer2DModel
from torch import Tensor

from twinrl.backends.families.family import Family, FamilyNetwork, pad_tokens
from twinrl.backends.families.twin_times import TwinTimes
from twinrl.flow.branches import selection
from twinrl.flow.conditions import Condition
from twinrl.machine.moving import on_host, rows_of


class ZImageTwinFlowTransformer(TwinTimes, ZImageTransformer2DModel):
    """Z-Image's transformer with a second time and a sign; its time module sees ``t_scale``·(1 − t)."""

    TIME = "t_embedder"
    OUTPUTS = ("mlp.2",)
    t_scale: float

    @wraps(ZImageTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def module_time(self, level: Tensor) -> Tensor:
        """``t_scale``·(1 − |t|)."""
        return self.t_scale * (1 - level)

    def level(self, module_time: Tensor) -> Tensor:
        """The inverse of ``module_time``."""
        return 1 - module_time / self.t_scale

    def second_time(self, level: Tensor, target: Tensor) -> Tensor:
        """``t_scale``·(|t| − |r|), as in the public patch."""
        return self.t_scale * (level - target)


class ZImageNetwork(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D), "mask": (B, L)})``."""

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """See ``FamilyNetwork``."""
        texts = list(condition["text"])
        if "mask" in condition:
            places = [selection(mask.nonzero().flatten().tolist()) for mask in on_host(condition["mask"])]
            texts = [rows_of(text, told) for text, told in zip(texts, places, strict=True)]
        images = list(x[:, :, None].unbind())  # (C, 1, H, W) each
        answer = self.transformer(images, 1 - level, texts, return_dict=False)[0]
        return -torch.stack(answer)[:, :, 0]


class ZImage(Family):
    """Z-Image (6 B parameters).

    *When to use*: a small single-stream model; start from the base, not from Turbo, which is already distilled.
    """

    NAME = "z_image"
    PIPELINE = "ZImagePipeline"
    TRANSFORMER = ZImageTwinFlowTransformer
    NETWORK = ZImageNetwork
    LORA_TARGETS = (
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    )
    BLOCKS = ("ZImageTransformerBlock",)
    MASKED = True

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        texts, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.TOKENS
        )
        text = torch.cat([pad_tokens(each[None], self.TOKENS) for each in texts])
        lengths = torch.tensor([len(each) for each in texts], device=text.device)
        return {"text": text, "mask": torch.arange(self.TOKENS, device=text.device) < lengths[:, None]}
