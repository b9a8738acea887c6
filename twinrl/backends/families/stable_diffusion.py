"""Stable Diffusion 1 and 2 (arXiv:2112.10752): a U-Net over latents and CLIP text that predicts ε or v.

Diffusion models, not flows: Diff2Flow (``twinrl.backends.families.diffusion``) makes them one, inside the U-Net's
forward pass, so that everything outside sees a flow: x_t and 1000·t go in, the velocity comes out. An exported student
therefore samples in the stock pipeline like every other family's.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from twinrl.backends.embedding import at_least_single
from twinrl.backends.families import pipelines
from twinrl.backends.families.diffusion import Bridge, described
from twinrl.backends.families.family import Family, FamilyConfig, FamilyNetwork
from twinrl.backends.families.twin_times import TwinTimes, told_more
from twinrl.config.errors import InputError
from twinrl.flow.conditions import Condition

UNSUPPORTED = (
    *("class_embed_type", "num_class_embeds", "addition_embed_type", "encoder_hid_dim_type"),
    *("time_cond_proj_dim", "time_embedding_act_fn"),
)


class TimeModule(TimestepEmbedding):
    """A U-Net's time embedding, given timesteps (B,) themselves instead of their sinusoids.

    As in transformers, one module then does all of it, to which a second time can be added. Weights keep their names.
    """

    def __init__(self, like: TimestepEmbedding, sinusoids: nn.Module, act: str):
        super().__init__(like.linear_1.in_features, like.linear_2.out_features, act_fn=act)
        self.sinusoids = sinusoids  # no parameters

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """Timesteps (B,) → (B, width)."""
        return super().forward(self.sinusoids(sample).to(self.linear_1.weight.dtype), condition)


class _TimesItself(UNet2DConditionModel):
    """The U-Net with a :class:`TimeModule`."""

    config: Any  # diffusers' own
    time_embedding: Any
    time_proj: nn.Module

    @told_more(UNet2DConditionModel)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.time_embedding = TimeModule(self.time_embedding, self.time_proj, self.config["act_fn"])

    def get_time_embed(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The timesteps, which the time module embeds."""
        return timestep


class StableDiffusionTwinFlowUNet(TwinTimes, _TimesItself):
    """Stable Diffusion's U-Net as a flow, with a second time and a sign; timesteps are 1000·t.

    Arguments: those of ``UNet2DConditionModel``, and

        diffusion: the schedule that it was trained on and what it predicts, see ``Bridge.of``. Without it there is no
            forward pass.
    """

    TIME = "time_embedding"
    OUTPUTS = ("linear_2",)

    @told_more(UNet2DConditionModel, diffusion=None)
    def __init__(self, *args: Any, diffusion: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_to_config(diffusion=diffusion)  # type: ignore[operator]

    @cached_property
    def bridge(self) -> Bridge:
        """Between the flow outside and the diffusion model inside."""
        return Bridge.of(self.config["diffusion"])

    def module_time(self, level: Tensor) -> Tensor:
        """The diffusion model's timestep with the same signal-to-noise ratio."""
        return self.bridge.timestep(level)

    def level(self, module_time: Tensor) -> Tensor:
        """The inverse of ``module_time``, between the schedule's ends."""
        return self.bridge.level(module_time)

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *args: Any,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> Any:
        """x_t (B, C, h, w), 1000·t and text → the velocity, in at least float32 inside."""
        told = self._times
        level = _per_row(timestep, sample) / 1000 if told is None else told[0].abs()
        x_t = at_least_single(sample)
        with nullcontext() if told is not None else self.at(level, torch.zeros_like(level)):
            answer = super().forward(
                self.bridge.input(x_t, level).to(self.base_dtype),
                self.module_time(level),
                encoder_hidden_states,
                *args,
                return_dict=False,
                **kwargs,
            )[0]
        velocity = self.bridge.velocity(at_least_single(answer), x_t, level).to(sample.dtype)
        return UNet2DConditionOutput(sample=velocity) if return_dict else (velocity,)


def _per_row(timestep: Any, sample: Tensor) -> Tensor:
    """A pipeline's timestep, a number or a tensor, for each row in at least float32."""
    return at_least_single(torch.as_tensor(timestep, device=sample.device)).expand(len(sample))


class StableDiffusionNetwork(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D)})``; latents are not rounded before they are rescaled."""

    def latents(self, x_bchw: Tensor) -> Tensor:
        """As they are: 1/α would multiply the rounding."""
        return x_bchw

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """See ``FamilyNetwork``."""
        return self.transformer(x, 1000 * level, condition["text"], return_dict=False)[0]


class StableDiffusion(Family):
    """Stable Diffusion 1.x (ε) and 2.x (ε or v); not XL, inpainting or upscaling.

    The safety checker is left out: it judges images of other samplers, and is 1.2 GB.

    *When to use*: many small fine-tunes exist of it, and one fits on any GPU (0.9 B parameters).
    """

    NAME = "stable_diffusion"
    PIPELINE = "StableDiffusionPipeline"
    PART = "unet"
    LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
    SETTINGS: ClassVar[Mapping[str, Any]] = {"requires_safety_checker": False}
    TRANSFORMER = StableDiffusionTwinFlowUNet
    NETWORK = StableDiffusionNetwork
    LORA_TARGETS = (
        *("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
        *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    )
    BLOCKS = ("CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D")
    TOKENS = 77
    PATCH = 1

    def check_variant(self, described: Mapping[str, Any]) -> None:
        """Refuse variants that are told more than time and text, or see more than latents."""
        for option in UNSUPPORTED:
            if described.get(option) is not None:
                value = described[option]
                raise InputError(f"{self.folder} is a variant that cannot be trained", got=f"{option}: {value}")
        if described.get("in_channels", 4) != described.get("out_channels", 4):
            raise InputError(
                f"{self.folder} sees more than latents (inpainting, upscaling)",
                got=f"{described['in_channels']} channels in and {described['out_channels']} out",
                expected="equal numbers",
            )  # fmt: skip

    def configure(self, transformer: Any, config: FamilyConfig) -> None:
        """The schedule of the pipeline, or, in an exported student, the one that it brings.

        Raises:
            InputError: the model predicts something else than ``model.prediction``.
        """
        kept = transformer.config.get("diffusion")
        if kept is not None:
            published = {**kept, "prediction_type": {"v": "v_prediction"}.get(kept["prediction"], kept["prediction"])}
        else:
            published = pipelines.scheduler_config(self.folder)
        transformer.register_to_config(diffusion=described(published, str(config.prediction), self.folder))
        transformer.bridge  # noqa: B018  a schedule that cannot be bridged is found now

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        text, _ = self.pipeline.encode_prompt(prompts, self.device, 1, False)
        return {"text": text}
