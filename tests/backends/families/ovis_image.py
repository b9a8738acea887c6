"""A family as somebody would add it, all of it in one file: Ovis-Image, which twinrl does not bring.

Its transformer makes sinusoids of the time outside the module with the weights, so that module is replaced by one that
is given the time itself (``TimeModule``); the rest is as in the other families.
"""

from functools import wraps
from typing import Any

import torch
from diffusers import OvisImageTransformer2DModel
from torch import Tensor, nn

from twinrl.backends.dit import patchify, unpatchify
from twinrl.backends.families.embedding import TwinTimes
from twinrl.backends.families.family import Family, FamilyNetwork, Packed
from twinrl.backends.families.flux import positions
from twinrl.backends.families.stable_diffusion import TimeModule
from twinrl.conditions import Condition


class _TimesItself(OvisImageTransformer2DModel):
    @wraps(OvisImageTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.timestep_embedder: Any = TimeModule(self.timestep_embedder, self.time_proj, "silu")
        self.time_proj: Any = nn.Identity()


class OvisImageTwinFlowTransformer(TwinTimes, _TimesItself):
    """With a second time and a sign; timesteps are t, the time module sees 1000·t."""

    TIME = "timestep_embedder"
    OUTPUTS = ("linear_2",)

    @wraps(OvisImageTransformer2DModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


class OvisImageNetwork(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D)})``; text tokens are numbered along the diagonal."""

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        text = condition["text"]
        number = torch.arange(text.shape[1], device=x.device, dtype=x.dtype)
        tokens = self.transformer(
            hidden_states=patchify(x, 2),
            encoder_hidden_states=text,
            timestep=level,
            img_ids=positions(x),
            txt_ids=torch.stack([torch.zeros_like(number), number, number], dim=1),
            return_dict=False,
        )[0]
        return unpatchify(tokens, x, 2)


class OvisImage(Packed, Family):
    """Ovis-Image (7 B parameters)."""

    NAME = "ovis_image"
    PIPELINE = "OvisImagePipeline"
    TRANSFORMER = OvisImageTwinFlowTransformer
    NETWORK = OvisImageNetwork
    LORA_TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
    BLOCKS = ("OvisImageTransformerBlock", "OvisImageSingleTransformerBlock")
    TOKENS = 256

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        text, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=self.TOKENS
        )
        return {"text": text}
