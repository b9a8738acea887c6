"""FLUX.2 and FLUX.2 [klein]: latents of 2×2 patches, normalised channel by channel, and text of one encoder's layers.

The VAE's latents are put together in patches of 2×2, four times the channels at half the side, and normalised by the
running statistics of the VAE's batch norm. That is the space of the flow here, as it is the pipelines': one latent is
one token. Text is padded to a fixed length without a mask; the models attend to the padding, and have learnt to.

FLUX.2-dev is distilled from guidance and is told its strength, as FLUX.1-dev is; [klein] is told none.
"""

from typing import Any

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from twinrl.backends.dit import patchify, unpatchify
from twinrl.backends.families.family import Family, FamilyConfig, FamilyNetwork
from twinrl.backends.families.twin_times import TwinTimes, told_more
from twinrl.flow.conditions import Condition


class _AnyTime(Flux2Transformer2DModel):
    """The transformer with a time module that takes times of any precision."""

    time_guidance_embed: Any

    @told_more(Flux2Transformer2DModel)
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        embedders = (self.time_guidance_embed.timestep_embedder, self.time_guidance_embed.guidance_embedder)
        for embedder in filter(None, embedders):
            embedder.register_forward_pre_hook(_in_its_precision)


def _in_its_precision(embedder: nn.Module, args: tuple) -> tuple:
    """Sinusoids in the weights' precision; they come in that of the time, which is float32 always."""
    return (args[0].to(embedder.linear_1.weight.dtype), *args[1:])  # type: ignore[union-attr]


class Flux2TwinFlowTransformer(TwinTimes, _AnyTime):
    """FLUX.2's transformer with a second time and a sign; timesteps are t, its time module sees 1000·t.

    Arguments: those of ``Flux2Transformer2DModel``, and

        embedded_guidance: guidance that the model is told, whatever the pipeline says; unused in [klein].
    """

    TIME = "time_guidance_embed"
    SILENT = ("guidance_embedder.linear_2",)

    @told_more(Flux2Transformer2DModel, embedded_guidance=3.5)
    def __init__(self, *args: Any, embedded_guidance: float = 3.5, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register_to_config(embedded_guidance=embedded_guidance)  # type: ignore[operator]

    def forward(self, hidden_states: Tensor, *args: Any, guidance: Tensor | None = None, **kwargs: Any) -> Any:
        """As in diffusers; ``guidance`` is replaced by ``embedded_guidance``."""
        if self.config["guidance_embeds"]:
            guidance = hidden_states.new_full((len(hidden_states),), self.config["embedded_guidance"])
        return super().forward(hidden_states, *args, guidance=guidance, **kwargs)


class Flux2Network(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D)})``."""

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """See ``FamilyNetwork``."""
        text = condition["text"]
        tokens = self.transformer(
            hidden_states=patchify(x, 1),
            encoder_hidden_states=text,
            timestep=level,
            img_ids=positions(x, 1, *x.shape[-2:], 1),
            txt_ids=positions(x, 1, 1, 1, text.shape[1]),
            return_dict=False,
        )[0]
        return unpatchify(tokens, x, 1)


def positions(x: Tensor, *sizes: int) -> Tensor:
    """(B, N, 4): picture, row, column and word of N tokens, which count along ``sizes``; whole numbers, exact."""
    counted = torch.cartesian_prod(*(torch.arange(size, device=x.device) for size in sizes))
    return counted.expand(len(x), *counted.shape)


class Flux2Klein(Family):
    """FLUX.2 [klein], 4 B and 9 B parameters; the text encoder is Qwen3.

    *When to use*: the "base" models as a start. The others are distilled to four steps already, without guidance.
    """

    NAME = "flux2_klein"
    PIPELINE = "Flux2KleinPipeline"
    TRANSFORMER = Flux2TwinFlowTransformer
    NETWORK = Flux2Network
    LORA_TARGETS = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out", "attn.to_qkv_mlp_proj"),
    )
    BLOCKS = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    COMPRESSION = 16

    def configure(self, transformer: Any, config: FamilyConfig) -> None:
        """The guidance that the model is told."""
        transformer.register_to_config(embedded_guidance=config.embedded_guidance)

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        text, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.TOKENS)
        return {"text": text}

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of height × width pixels, in patches; InputError for sides that do not fit."""
        channels, rows, columns = super().latent_shape(height, width)
        return channels, rows // self.PATCH, columns // self.PATCH

    @property
    def channels(self) -> int:
        """C of the latents, in patches."""
        return super().channels * self.PATCH**2

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → latents (B, C, h, w), each channel by the VAE's mean and deviation."""
        vae = self.pipeline.vae
        mean = pixel_unshuffle(vae.encode(pixels.to(vae.dtype)).latent_dist.mode(), self.PATCH)
        centre, spread = self._statistics(mean)
        return ((mean - centre) / spread).to(pixels.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents → pixels, not clamped; differentiable."""
        vae = self.pipeline.vae
        centre, spread = self._statistics(latents.to(vae.dtype))
        z = pixel_shuffle(latents.to(vae.dtype) * spread + centre, self.PATCH)
        return vae.decode(z, return_dict=False)[0].to(latents.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (1, C, 1, 1) each."""
        vae = self.pipeline.vae
        spread = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        centre, spread = (value.to(like).view(1, -1, 1, 1) for value in (vae.bn.running_mean, spread))
        return centre, spread


class Flux2(Flux2Klein):
    """FLUX.2-dev (32 B parameters); the text encoder is Mistral Small, of 24 B.

    *When to use*: it is already guided; its student then needs no guidance in the target.
    """

    NAME = "flux2"
    PIPELINE = "Flux2Pipeline"
