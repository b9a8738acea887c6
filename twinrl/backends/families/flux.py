"""FLUX.1 (dev and schnell): packed 2×2 latent patches, CLIP + T5 text, rotary positions.

FLUX.1-dev is distilled from guidance and is told its strength. A student is told one value, always: stock pipelines
are called with ``guidance_scale=0`` for TwinFlow students, which must not reach the transformer.
"""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from twinrl.backends.dit import patchify, unpatchify
from twinrl.backends.families.family import Family, FamilyConfig, FamilyNetwork
from twinrl.backends.families.twin_times import TwinTimes
from twinrl.flow.conditions import Condition


class FluxTwinFlowTransformer(TwinTimes, FluxTransformer2DModel):
    """FLUX's transformer with a second time and a sign; timesteps are t, its time module sees 1000·t.

    Arguments: those of ``FluxTransformer2DModel``, and

        embedded_guidance: guidance that the model is told, whatever the pipeline says; unused in FLUX.1-schnell.
    """

    SILENT = ("text_embedder.linear_2", "guidance_embedder.linear_2")

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        embedded_guidance: float = 3.5,
    ):
        super().__init__(
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            num_single_layers=num_single_layers,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
            joint_attention_dim=joint_attention_dim,
            pooled_projection_dim=pooled_projection_dim,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=axes_dims_rope,
        )

    def forward(self, hidden_states: Tensor, *args: Any, guidance: Tensor | None = None, **kwargs: Any) -> Any:
        """As in diffusers; ``guidance`` is replaced by ``embedded_guidance``."""
        if self.config["guidance_embeds"]:
            guidance = hidden_states.new_full((len(hidden_states),), self.config["embedded_guidance"])
        return super().forward(hidden_states, *args, guidance=guidance, **kwargs)


class FluxNetwork(FamilyNetwork):
    """``F(x, t, r, {"text": (B, L, D), "pooled": (B, P)})``."""

    def velocity(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        """See ``FamilyNetwork``."""
        text = condition["text"]
        tokens = self.transformer(
            hidden_states=patchify(x, 2),
            encoder_hidden_states=text,
            pooled_projections=condition["pooled"],
            timestep=level,
            img_ids=positions(x),
            txt_ids=text.new_zeros(text.shape[1], 3),
            return_dict=False,
        )[0]
        return unpatchify(tokens, x, 2)


def positions(x_bchw: Tensor) -> Tensor:
    """(h·w/4, 3): of each 2×2 patch a zero, its row and its column."""
    rows, columns = (torch.arange(side // 2, device=x_bchw.device, dtype=x_bchw.dtype) for side in x_bchw.shape[-2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1)


class Flux(Family):
    """FLUX.1-dev and FLUX.1-schnell (12 B parameters).

    *When to use*: dev as a start is already guided; its student then needs no guidance in the target.
    """

    NAME = "flux"
    PIPELINE = "FluxPipeline"
    TRANSFORMER = FluxTwinFlowTransformer
    NETWORK = FluxNetwork
    LORA_TARGETS = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp"),
    )
    BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock")

    def configure(self, transformer: Any, config: FamilyConfig) -> None:
        """The guidance that the model is told."""
        transformer.register_to_config(embedded_guidance=config.embedded_guidance)

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        text, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=self.device, max_sequence_length=self.TOKENS
        )
        return {"text": text, "pooled": pooled}
