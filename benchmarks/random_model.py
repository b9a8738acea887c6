"""A pretrained family's transformer without files: random weights, latents and prompts, of any size."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published import SD35_MEDIUM as MEDIUM
from torch import Tensor, nn

from twinrl.backends.families import family_class
from twinrl.backends.families.pipelines import quiet
from twinrl.data.dataset import CACHE_FORMAT, MANIFEST, BucketRow, Manifest
from twinrl.flow import draws
from twinrl.flow.conditions import Condition
from twinrl.training import schema
from twinrl.training.schema import RunConfig

SD3 = family_class("sd3")
HALF = MEDIUM | {
    "num_layers": 12, "num_attention_heads": 16, "caption_projection_dim": 1024,
    "dual_attention_layers": tuple(range(6)),
}  # fmt: skip
SMALL = HALF | {
    "sample_size": 64, "num_layers": 6, "num_attention_heads": 8, "caption_projection_dim": 512,
    "dual_attention_layers": (0, 1), "pos_embed_max_size": 96,
}  # fmt: skip
TINY = MEDIUM | {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 32,
    "pos_embed_max_size": 16, "dual_attention_layers": (0,),
}  # fmt: skip
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "medium": ("SD3.5-medium's size at 1024²", MEDIUM),
    "half": ("half of SD3.5-medium's layers at 1024²", HALF),
    "small": ("a quarter of SD3.5-medium's layers at 512²", SMALL),
    "tiny": ("a tiny transformer of SD3's class", TINY),
}
"""Name → what it is, and the transformer's configuration; the largest first."""
TEXT = 77 + SD3.TOKENS  # CLIP's and T5's


@dataclass(frozen=True)
class RandomFamily:
    """What the trainer asks of a family, without files: a network of random weights."""

    config: dict[str, Any]

    def network(self, settings: Any, seed: int = 0) -> nn.Module:
        """As ``Family.network``."""
        with torch.random.fork_rng(), quiet():
            torch.manual_seed(draws.generator(seed, "weights").initial_seed())
            transformer = SD3.TRANSFORMER(**self.config).to(torch.bfloat16)
        if settings.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        return SD3.NETWORK(transformer)


class RandomLatents:
    """A source and its reader: random latents and embeddings of the right shapes, the same for every row."""

    name, content_hash = "random", "random"

    def __init__(self, config: dict[str, Any], device: torch.device):
        side = config["sample_size"]
        self.family, self.latent_shape = RandomFamily(config), (config["in_channels"], side, side)
        generator = torch.Generator().manual_seed(0)
        text = torch.randn(1, TEXT, config["joint_attention_dim"], generator=generator)
        pooled = torch.randn(1, config["pooled_projection_dim"], generator=generator)
        self.told = {"text": text.to(device), "pooled": pooled.to(device)}
        self.one = torch.randn(1, *self.latent_shape, generator=generator).to(device)

    def reader(self, *_: Any) -> "RandomLatents":
        """Itself."""
        return self

    def rows(self, batch: int, seed: int, step: int) -> Tensor:
        return torch.arange(batch)

    def sizes(self, batch: int) -> Sequence[int]:
        return (batch,)

    def shape(self, at: Tensor) -> tuple[int, int, int]:
        return self.latent_shape

    def latents(self, at: Tensor) -> Tensor:
        return self.one.expand(len(at), -1, -1, -1)

    def captioned(self, at: Tensor, seed: int, step: int) -> tuple[list[str], Condition]:
        return [""] * len(at), self.null(len(at))

    def null(self, n: int) -> Condition:
        return {name: value.expand(n, *value.shape[1:]) for name, value in self.told.items()}


def overrides_of(batch: int, micro_batch: int, folder: Path, device: str) -> list[str]:
    """What makes the preset ``sd35`` a run with bf16 weights on descriptions in ``folder``."""
    return [
        f"model.path={folder}", f"data.root={folder}", "model.dtype=bf16", f"train.batch={batch}",
        f"train.micro_batch={micro_batch}", f"run.dir={folder / 'runs'}", f"machine.device={device}",
        "evaluation.every=0",
    ]  # fmt: skip


def settings_of(batch: int, micro_batch: int, folder: Path, device: str) -> RunConfig:
    """The run's configuration."""
    return schema.load("sd35", overrides_of(batch, micro_batch, folder, device))


def describe(config: dict[str, Any], folder: Path) -> None:
    """The descriptions that a simulation reads, as a pipeline's folder has them."""
    (folder / "transformer").mkdir()
    index = {"_class_name": SD3.PIPELINE, "transformer": ["diffusers", "SD3Transformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    described = {"_class_name": "SD3Transformer2DModel"} | config
    (folder / "transformer" / "config.json").write_text(json.dumps(described))
    channels, side = config["in_channels"], config["sample_size"]
    bucket = BucketRow(name="square", width=8 * side, height=8 * side, latent_shape=(channels, side, side))
    manifest = Manifest(
        format=CACHE_FORMAT, encoder="random", content_hash="random", images=False, lengths={}, buckets=[bucket]
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json())
