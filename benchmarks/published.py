"""Descriptions of the published models: what of a pipeline's folder says how large everything is, without weights.

Transformers are those of ``transformer/config.json`` (``unet/config.json``) of the repositories that are named, VAEs
those of ``vae/config.json``; what a description leaves out is the class's default.
"""

import json
from pathlib import Path
from typing import Any

from twinrl.backends.families import family_class

SD35_MEDIUM = {  # stabilityai/stable-diffusion-3.5-medium
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 24, "attention_head_dim": 64,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "out_channels": 16, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
QWEN_IMAGE = {  # Qwen/Qwen-Image, Qwen/Qwen-Image-2512
    "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 3584, "axes_dims_rope": (16, 56, 56),
}  # fmt: skip
Z_IMAGE = {  # Tongyi-MAI/Z-Image-Turbo
    "all_patch_size": (2,), "all_f_patch_size": (1,), "in_channels": 16, "dim": 3840, "n_layers": 30,
    "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48],
    "axes_lens": [1024, 512, 512],
}  # fmt: skip
SANA_1600M = {  # Efficient-Large-Model/Sana_1600M_1024px_diffusers
    "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
    "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240,
    "caption_channels": 2304, "mlp_ratio": 2.5, "sample_size": 32, "patch_size": 1,
}  # fmt: skip
FLUX_DEV = {  # black-forest-labs/FLUX.1-dev
    "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
    "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip
FLUX2_KLEIN = {  # black-forest-labs/FLUX.2-klein-base-4B; FLUX.2-dev has the class's defaults
    "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
    "guidance_embeds": False,
}  # fmt: skip
STABLE_DIFFUSION = {  # stable-diffusion-v1-5/stable-diffusion-v1-5
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3), "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "sd3": (SD35_MEDIUM, 2.5),
    "qwen_image": (QWEN_IMAGE, 20.4),
    "z_image": (Z_IMAGE, 6.2),
    "sana": (SANA_1600M, 1.6),
    "flux": (FLUX_DEV, 11.9),
    "flux2_klein": (FLUX2_KLEIN, 3.9),
    "flux2": ({}, 32.2),
    "stable_diffusion": (STABLE_DIFFUSION, 0.86),
}
"""Family: configuration of what is trained, billions of parameters without ours."""

KL = {
    "_class_name": "AutoencoderKL", "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
KL16 = {**KL, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
SD3_VAE = {**KL16, "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_VAE = {**KL16, "sample_size": 1024, "scaling_factor": 0.3611, "shift_factor": 0.1159}  # Z-Image's, too
FLUX2_VAE = {"_class_name": "AutoencoderKLFlux2"}  # the published one has the class's defaults
SANA_VAE = {  # mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers
    "_class_name": "AutoencoderDC", "latent_channels": 32, "attention_head_dim": 32, "scaling_factor": 0.41407,
    "encoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "decoder_block_types": (*("ResBlock",) * 3, *("EfficientViTBlock",) * 3),
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3), "decoder_layers_per_block": (3, 3, 3, 3, 3, 3),
    "encoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (5,), (5,), (5,)),
    "downsample_block_type": "Conv", "upsample_block_type": "interpolate",
}  # fmt: skip
VAES: dict[str, dict[str, Any]] = {
    "sd3": SD3_VAE,
    "qwen_image": {"_class_name": "AutoencoderKLQwenImage"},  # the published one has the class's defaults
    "z_image": FLUX_VAE,
    "sana": SANA_VAE,
    "flux": FLUX_VAE,
    "flux2_klein": FLUX2_VAE,
    "flux2": FLUX2_VAE,
    "stable_diffusion": {**KL, "sample_size": 512, "latent_channels": 4},
}
NOISE = {  # scheduler/scheduler_config.json of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "beta_schedule": "scaled_linear", "prediction_type": "epsilon",
}  # fmt: skip


def describe(family: str, folder: Path) -> Path:
    """The descriptions of a published pipeline, in an empty ``folder``."""
    kind = family_class(family)
    stock = next(cls for cls in kind.TRANSFORMER.__mro__ if cls.__module__.startswith("diffusers."))
    trained = {"_class_name": stock.__name__, **MODELS[family][0]}
    parts: dict[str, dict[str, Any]] = {kind.PART: trained, "vae": VAES[family]}
    for name, config in parts.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    index: dict[str, Any] = {"_class_name": kind.PIPELINE}
    index |= {name: ["diffusers", config["_class_name"]] for name, config in parts.items()}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(NOISE))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
