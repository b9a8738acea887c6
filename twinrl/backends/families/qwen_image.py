"""Qwen-Image, 2512 included (arXiv:2508.02324): packed 2×2 latent patches, Qwen2.5-VL text with a mask."""

from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from twinrl.backends.dit import patchify, unpatchify
from twinrl.backends.families.family import Family, FamilyNetwork, pad_tokens, trimmed
from twinrl.backends.families.twin_times import TwinTimes
from twinrl.config.errors import InputError
from twinrl.flow.conditions import Condition
from twinrl.machine.moving import moved

UNSUPPORTED = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope", "guidance_embeds")


class QwenImageTwinFlowTransformer(TwinTimes, QwenImageTransformer2DModel):
    """Qwen-Image's transformer with a second time and a sign; its time module sees t itself."""

    @wraps(QwenImageTransformer2DModel.__init__)  # type: ignore[misc]  # diffusers reads the signature
    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)

    def module_time(self, level: Tensor) -> Tensor:
        """|t|; the sinusoids scale it by 1000."""
        return level

    def level(self, module_time: Tensor) -> Tensor:
        """|t|."""
        return module_time


class QwenImageNetwork(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D), "mask": (B, L)})``; columns that are padding in every row cost nothing."""

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """See ``FamilyNetwork``."""
        text, mask = trimmed(condition)
        rows, columns = (side // 2 for side in x.shape[-2:])
        tokens = self.transformer(
            hidden_states=patchify(x, 2),
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            timestep=level,
            img_shapes=[[(1, rows, columns)]] * len(x),
            return_dict=False,
        )[0]
        return unpatchify(tokens, x, 2)


class QwenImage(Family):
    """Qwen-Image and Qwen-Image-2512 (20 B parameters); not the editing and layered variants.

    *When to use*: the model of the largest published TwinFlow result.
    """

    NAME = "qwen_image"
    PIPELINE = "QwenImagePipeline"
    TRANSFORMER = QwenImageTwinFlowTransformer
    NETWORK = QwenImageNetwork
    LORA_TARGETS = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    )
    BLOCKS = ("QwenImageTransformerBlock",)
    MASKED = True

    def check_variant(self, described: Mapping[str, Any]) -> None:
        """Refuse the editing and layered variants, whose time modules take other inputs."""
        for option in UNSUPPORTED:
            if described.get(option):
                raise InputError(
                    f"{self.folder} is a Qwen-Image variant that cannot be trained",
                    got=f"{option}: true",
                    expected="Qwen-Image or Qwen-Image-2512",
                )

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        text, mask = self.pipeline.encode_prompt(prompt=prompts, device=self.device, max_sequence_length=self.TOKENS)
        if mask is None:  # the pipeline's way to say that nothing is padded
            mask = torch.ones(text.shape[:2], device=text.device)
        return {"text": pad_tokens(text, self.TOKENS), "mask": pad_tokens(mask.bool(), self.TOKENS)}

    @property
    def channels(self) -> int:
        """C of the latents."""
        return self.pipeline.vae.config.z_dim

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [−1, 1] → latents (B, C, h, w), each channel by its own mean and deviation."""
        vae = self.pipeline.vae
        mean = vae.encode(pixels.to(vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0]  # the VAE is for video: 5-D
        centre, spread = self._statistics(mean)
        return ((mean - centre) / spread).to(pixels.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents → pixels, not clamped; differentiable."""
        vae = self.pipeline.vae
        z = latents.to(vae.dtype)
        centre, spread = self._statistics(z)
        return vae.decode((z * spread + centre)[:, :, None], return_dict=False)[0][:, :, 0].to(latents.dtype)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (1, C, 1, 1) each."""
        config = self.pipeline.vae.config
        values = (config.latents_mean, config.latents_std)
        centre, spread = (moved(torch.tensor(v), like.device, like.dtype).view(1, -1, 1, 1) for v in values)
        return centre, spread
