"""The published models' configurations build with a second time and a sign, on the meta device, at their known sizes.

Configurations: ``transformer/config.json`` of the repositories named; sizes: the parameter counts that the model pages
state, to the digits that they give.
"""

import functools
import json

import pytest
import torch

from twinrl.backends.families import family_class
from twinrl.config import presets
from twinrl.training import schema
from twinrl.training.described import meta_family

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
STABLE_DIFFUSION = {  # stable-diffusion-v1-5/stable-diffusion-v1-5
    "sample_size": 64, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3), "cross_attention_dim": 768, "attention_head_dim": 8,
}  # fmt: skip
MODELS = {  # family: configuration, billions of parameters without ours
    "sd3": (SD35_MEDIUM, 2.5),
    "qwen_image": (QWEN_IMAGE, 20.4),
    "z_image": (Z_IMAGE, 6.2),
    "sana": (SANA_1600M, 1.6),
    "flux": (FLUX_DEV, 11.9),
    "stable_diffusion": (STABLE_DIFFUSION, 0.86),
}


@functools.cache
def published(name):
    """The transformer of the published size."""
    with torch.device("meta"):
        return family_class(name).TRANSFORMER(**MODELS[name][0])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_published_sizes(name):
    transformer, billions = published(name), MODELS[name][1]
    count = sum(tensor.numel() for tensor in transformer.state_dict().values())  # SD3 stores its positions
    ours = sum(p.numel() for p in transformer.twin_parameters().values())
    assert (count - ours) / 1e9 == pytest.approx(billions, rel=0.03)
    assert ours < 0.03 * count


@pytest.mark.parametrize("name", sorted(MODELS))
def test_adapters_find_their_layers_in_the_published_models(name):
    """Every default target names layers in every block that it is meant for."""
    family, transformer = family_class(name), published(name)
    names = [n for n, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    found = {target: sum(n.endswith(f".{target}") for n in names) for target in family.LORA_TARGETS}
    blocks = sum(type(module).__name__ in family.BLOCKS for module in transformer.modules())
    assert blocks > 0
    assert all(count >= blocks // 3 for count in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in presets() if schema.load(name).model.family is not None])
def test_presets_of_real_sizes_build_with_their_settings(preset, tmp_path):
    """`published-qwen2512` and the others on the published dimensions: sizes, dtypes and adapters, no weights."""
    settings = schema.load(preset)
    family = family_class(settings.model.family)
    config, billions = MODELS[settings.model.family]
    (tmp_path / family.PART).mkdir()
    described = {"_class_name": "any"} | config
    (tmp_path / family.PART / "config.json").write_text(json.dumps(described))
    network = meta_family(settings, tmp_path)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    frozen = [p for p in network.parameters() if not p.requires_grad]
    if settings.model.lora is None:
        assert sum(p.numel() for p in trained.values()) / 1e9 == pytest.approx(billions, rel=0.13)  # positions: buffers
    else:
        assert sum(p.numel() for p in frozen) / 1e9 == pytest.approx(billions, rel=0.13)
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert sum("lora_A" in name for name in trained) >= len(family.LORA_TARGETS)
        assert all(p.shape[0] == settings.model.lora.rank for name, p in trained.items() if "lora_A" in name)
