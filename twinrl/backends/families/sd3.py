"""Stable Diffusion 3 and 3.5 (arXiv:2403.03206): joint attention over latents and CLIP + T5 text."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from twinrl.backends.families.family import Family, FamilyNetwork
from twinrl.backends.families.twin_times import TwinTimes
from twinrl.flow.conditions import Condition

CLIP_TOKENS = 77
"""Of the two CLIP encoders, before T5's."""


class SD3TwinFlowTransformer(TwinTimes, SD3Transformer2DModel):
    """SD3's transformer with a second time and a sign; timesteps are 1000·t."""

    SILENT = ("text_embedder.linear_2",)

    @wraps(SD3Transformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)


class SD3Network(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D), "pooled": (B, P)})``."""

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """See ``FamilyNetwork``."""
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=condition["text"],
            pooled_projections=condition["pooled"],
            timestep=1000 * level,
            return_dict=False,
        )[0]


class SD3(Family):
    """Stable Diffusion 3 / 3.5. The T5 encoder may be missing (null in the index), as diffusers allows.

    *When to use*: the lightest family with a published TwinFlow result (SD3.5-medium, 2.5 B parameters).
    """

    NAME = "sd3"
    PIPELINE = "StableDiffusion3Pipeline"
    TRANSFORMER = SD3TwinFlowTransformer
    NETWORK = SD3Network
    LORA_TARGETS = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    )
    BLOCKS = ("JointTransformerBlock",)
    TOKENS = 256

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        text, _, pooled, _ = self._pipeline_with_config().encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.TOKENS,
        )
        return {"text": text, "pooled": pooled}

    def condition_shapes(self, described: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        shapes = super().condition_shapes(described)
        tokens, width = shapes["text"]
        return shapes | {"text": (CLIP_TOKENS + tokens, width)}

    def _pipeline_with_config(self) -> Any:
        """The pipeline; where T5 is missing it asks the transformer for its width, so it gets one without weights."""
        if self.pipeline.text_encoder_3 is None and self.pipeline.transformer is None:
            config = SD3Transformer2DModel.load_config(self.folder / "transformer")
            with torch.device("meta"):
                self.pipeline.transformer = SD3Transformer2DModel.from_config(config)
        return self.pipeline
