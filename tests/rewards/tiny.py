"""Tiny models of the real classes, saved in the published files' formats; and what a reward is checked with."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from twinrl.config import Settings, component, validate
from twinrl.machine.compat import ensure_torchvision
from twinrl.rewards import REWARDS, Reward, build_reward
from twinrl.rewards.aesthetic import ScoreHead
from twinrl.rewards.imagereward import BlipReward, BlipSizes

SIDE = 32
PROMPTS = ["a red cat", "two dogs on the beach, oil painting", "a red cat"]
OPEN_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
BLIP = {
    "image": SIDE,
    "patch": 8,
    "vision_width": 32,
    "vision_layers": 2,
    "vision_heads": 4,
    "text_width": 48,
    "text_layers": 2,
    "text_heads": 4,
    "vocabulary": 60,
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat", "two", "dogs", "on", "the", "beach", ","]


def images(n: int = 3, height: int = 40, width: int = 24, dtype: torch.dtype = torch.float32) -> Tensor:
    """Seeded images in (−0.9, 0.9), neither square nor of any tower's size."""
    generator = torch.Generator().manual_seed(7)
    return 1.8 * torch.rand((n, 3, height, width), generator=generator, dtype=torch.float64).to(dtype) - 0.9


def shake(module: torch.nn.Module, scale: float = 0.2) -> torch.nn.Module:
    """Seeded noise on all weights: fresh networks have zero biases and nearly constant scores."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def open_clip_folder(folder: Path, **changes: object) -> str:
    """A folder that ``architecture: local-dir:…`` may name."""
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {**OPEN_CLIP, **changes}}))
    return f"local-dir:{folder}"


def open_clip_model() -> torch.nn.Module:
    ensure_torchvision()
    from open_clip.model import CLIP

    return shake(CLIP(**OPEN_CLIP), 0.05)


def hf_clip(projection: int = 24) -> torch.nn.Module:
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {**tower, "image_size": SIDE, "patch_size": 8}
    return shake(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)), 0.05)


def original_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """``BlipReward``'s names → those of ImageReward's published file, with what the file has beside them."""
    rules = [
        (r"^head\.", "mlp."),
        (r"^text\.", "blip.text_encoder."),
        (r"^vision\.embeddings\.class_embedding", "blip.visual_encoder.cls_token"),
        (r"^vision\.embeddings\.position_embedding", "blip.visual_encoder.pos_embed"),
        (r"^vision\.embeddings\.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
        (r"^vision\.post_layernorm", "blip.visual_encoder.norm"),
        (r"^vision\.encoder\.layers\.(\d+)\.", r"blip.visual_encoder.blocks.\1."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.self_attn\.qkv\.", ".attn.qkv."),
        (r"\.self_attn\.projection\.", ".attn.proj."),
    ]
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    unused = {"blip.vision_proj.weight": torch.zeros(2), "blip.text_encoder.embeddings.position_ids": torch.zeros(2)}
    return renamed | unused


def save_all(folder: Path) -> dict[str, dict]:
    """Every published model at tiny size in ``folder`` → settings that load it, by kind."""
    torch.manual_seed(0)
    torch.save({"epoch": 1, "state_dict": open_clip_model().state_dict()}, folder / "HPS_v2.1_compressed.pt")
    hf_clip().save_pretrained(folder / "clip")
    torch.save(shake(ScoreHead(24)).state_dict(), folder / "head.pth")
    blip = shake(BlipReward(BlipSizes(**BLIP)), 0.05)
    torch.save(original_names(blip.state_dict()), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    clip = str(folder / "clip")
    return {
        "hpsv2": {
            "checkpoint": str(folder / "HPS_v2.1_compressed.pt"),
            "architecture": open_clip_folder(folder / "architecture"),
        },
        "pickscore": {"checkpoint": clip},
        "clipscore": {"checkpoint": clip},
        "aesthetic": {"checkpoint": str(folder / "head.pth"), "tower": clip},
        "imagereward": {
            "checkpoint": str(folder / "ImageReward.pt"),
            "vocabulary": str(folder / "vocab.txt"),
            "sizes": BLIP,
        },
    }


class Holder(Settings):
    """A schema with one reward, as a run's configuration will have."""

    reward: component(REWARDS)  # type: ignore[valid-type]


def reward(value: object, **options: object) -> Reward:
    """The reward that a YAML value describes, through validation and building."""
    return build_reward(validate(Holder, {"reward": value}).reward, **options)
