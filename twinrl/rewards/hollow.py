"""Reward models without weights, by their published architectures: shapes alone, for a run that is simulated."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from twinrl.config.errors import InputError
from twinrl.machine.compat import ensure_torchvision
from twinrl.rewards.aesthetic import ScoreHead
from twinrl.rewards.hpsv2 import open_clip_model
from twinrl.rewards.imagereward import BlipReward
from twinrl.rewards.reward import REWARDS

VIT_B_32 = {"vision_config": {}, "text_config": {}, "projection_dim": 512}  # the classes' defaults
VIT_L_14 = {
    "vision_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                      "num_attention_heads": 16, "patch_size": 14},
    "text_config": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "projection_dim": 768,
}  # fmt: skip
VIT_H_14 = {
    "vision_config": {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
                      "num_attention_heads": 16, "patch_size": 14},
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                    "num_attention_heads": 16},
    "projection_dim": 1024,
}  # fmt: skip


def _clip(folder: Path | None, published: dict[str, Any]) -> Any:
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel

    found = CLIPConfig(**published) if folder is None else CLIPConfig.from_pretrained(folder)
    model: Any = CLIPModel
    return model(found)


def _aesthetic(config: Any) -> nn.Module:
    clip = _clip(config.tower, VIT_L_14)
    head = ScoreHead(clip.config.projection_dim)
    del clip.text_model, clip.text_projection
    return nn.ModuleDict({"clip": clip, "head": head})


HOLLOW: dict[str, Callable[[Any], nn.Module]] = {
    "clipscore": lambda config: _clip(config.checkpoint, VIT_B_32),
    "pickscore": lambda config: _clip(config.checkpoint, VIT_H_14),
    "aesthetic": _aesthetic,
    "hpsv2": lambda config: open_clip_model(config.architecture, "reward.model.architecture"),
    "imagereward": lambda config: BlipReward(config.sizes),
}
"""Kind → its network."""


class HollowNetworks(dict[str, nn.Module]):
    """The ``networks`` of a :class:`twinrl.rewards.reward.RewardContext`: has one for all settings that it is asked
    for, made as it is asked for.

    Raises:
        InputError: nobody knows the architecture of a kind.
    """

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> nn.Module:
        kind = json.loads(key)["kind"]
        if kind not in HOLLOW:
            raise InputError(f"reward {kind} cannot be had without its weights", expected=", ".join(HOLLOW))
        config = REWARDS.find(kind).Config.model_validate_json(key)
        with torch.device("meta"):
            network = HOLLOW[kind](config)
        from twinrl.machine.dtypes import DTYPES

        network.to(DTYPES[config.dtype]).eval().requires_grad_(False)  # type: ignore[attr-defined]
        self[key] = network
        return network
