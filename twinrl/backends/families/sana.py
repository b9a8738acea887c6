"""SANA (arXiv:2410.10629): linear attention over latents compressed 32×, Gemma text with a mask."""

import inspect
from collections.abc import Mapping
from functools import wraps
from typing import Any

from diffusers import SanaTransformer2DModel
from torch import Tensor

from twinrl.backends.families.family import Family, FamilyNetwork
from twinrl.backends.families.twin_times import TwinTimes
from twinrl.config.errors import InputError
from twinrl.flow.conditions import Condition


class SanaTwinFlowTransformer(TwinTimes, SanaTransformer2DModel):
    """SANA's transformer with a second time and a sign.

    Its time module returns two tensors, the blocks' modulation and the embedding itself; both get a second time and
    a part of the sign. Timesteps are 1000·t·``timestep_scale``.
    """

    TIME = "time_embed"
    OUTPUTS = ("linear", "emb.timestep_embedder.linear_2")

    @wraps(SanaTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def module_time(self, level: Tensor) -> Tensor:
        """1000·|t|, times the configured scale."""
        return 1000 * level * self.config["timestep_scale"]

    def level(self, module_time: Tensor) -> Tensor:
        """The inverse of ``module_time``."""
        return module_time / (1000 * self.config["timestep_scale"])


class SanaNetwork(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D), "mask": (B, L)})``."""

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """See ``FamilyNetwork``."""
        velocity = self.transformer(
            x,
            encoder_hidden_states=condition["text"],
            encoder_attention_mask=condition.get("mask"),
            timestep=self.transformer.module_time(level),
            return_dict=False,
        )[0]
        return velocity[:, : x.shape[1]]  # some variants predict a variance beside it


class Sana(Family):
    """SANA 0.6B and 1.6B; not SANA-Sprint, whose transport is not linear.

    *When to use*: the cheapest family a step: 32× compression leaves 1024 tokens of a 1024² image.
    """

    NAME = "sana"
    PIPELINE = "SanaPipeline"
    TRANSFORMER = SanaTwinFlowTransformer
    NETWORK = SanaNetwork
    LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v", "to_out.0")
    BLOCKS = ("SanaTransformerBlock",)
    MASKED = True
    TOKENS = 300
    PATCH = 1
    COMPRESSION = 32

    def check_variant(self, described: Mapping[str, Any]) -> None:
        """Refuse SANA-Sprint."""
        if described.get("guidance_embeds"):
            raise InputError(f"{self.folder} is SANA-Sprint", expected="SANA; Sprint's transport is not linear")

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        """The pipeline puts its instruction on prompt enhancement before every prompt, not before the empty one."""
        instruction = inspect.signature(self.pipeline.__call__).parameters["complex_human_instruction"].default
        return self._encoded(prompts, instruction)

    def null_condition(self, n: int) -> Condition:
        """The empty condition ∅, n rows: the empty prompt without the instruction, as in the pipeline's guidance."""
        return {k: v.expand(n, *v.shape[1:]) for k, v in self._encoded([""], None).items()}

    def _encoded(self, prompts: list[str], instruction: list[str] | None) -> Condition:
        text, mask, _, _ = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.TOKENS,
            complex_human_instruction=instruction,
        )
        return {"text": text.detach(), "mask": mask.bool()}

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → normalised latents (B, C, H/32, W/32); differentiable."""
        vae = self.pipeline.vae
        return (vae.encode(pixels.to(vae.dtype)).latent * vae.config.scaling_factor).to(pixels.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents → pixels, not clamped; differentiable."""
        vae = self.pipeline.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].to(latents.dtype)
