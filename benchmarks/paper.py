"""Qwen-Image (20 B parameters) on 8 and on 64 H200: compute and communication of a step, calculated.

Memory is simulated: ``simulated.py --table``. Compute counts multiplications of matrices: a token of
a forward pass costs 2 operations for each weight it meets and 4·s·w a block in attention (s tokens, w width); a
backward pass costs twice a forward pass, recomputed activations one more. In Qwen-Image's blocks image and text tokens
have weights of their own, so a token meets half of them; the modulation's weights are met once a row and left out.
Communication counts what FSDP2 gathers and reduces: the weights in 2 bytes for every forward and every backward pass,
the gradient in 4 bytes for every backward pass; of each, (n−1)/n leave and reach a rank of n shards. With copies
(hybrid sharding) the shard of the gradient is summed over them, twice (m−1)/m of it.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import measuring
from published import QWEN_IMAGE
from step_time import joined
from torch import nn

from twinrl.training import schema

IMAGE_TOKENS, TEXT_TOKENS = 4096, 512  # 1024² pixels, and the longest prompts
OPERATIONS, UTILISATION = 989e12, 0.4  # H200, dense bf16 (NVIDIA's data sheet); assumed share of it
INSIDE, BETWEEN = 300e9, 40e9  # bytes a second and rank: of 450 on NVLink inside a machine, of 50 (400 Gb/s) between
PER_MACHINE = 8


@dataclass(frozen=True)
class Layout:
    """Where it trains.

    Attributes:
        name: for the table. processes: GPUs. replicate: copies of the model, ``fsdp.replicate``.
        batch: global rows. overrides: of the preset ``qwen-image``.
    """

    name: str
    processes: int
    replicate: int
    batch: int
    overrides: tuple[str, ...] = ()

    @property
    def shards(self) -> int:
        """Processes that share one copy."""
        return self.processes // self.replicate


FULL = ("gradients.space=none", "model.dtype=float32", "teacher={kind: ema, allow_live: false}")
LORA = ("gradients.space=none", "model.lora={rank: 64}", "teacher={kind: ema, allow_live: false}")
LAYOUTS = (
    Layout("8, all parameters", 8, 1, 32, FULL),
    Layout("8, LoRA r64", 8, 1, 32, LORA),
    Layout("64, all parameters", 64, 1, 256, FULL),
    Layout("64 as 8 copies, all parameters", 64, 8, 256, FULL),
    Layout("64, LoRA r64", 64, 1, 256, LORA),
)


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
        operations: of a rank. moved: bytes that leave a rank, inside its machine or between.
        between: whether the gathers cross machines. summed: bytes that leave a rank to sum copies' gradients.
    """

    operations: float
    moved: float
    between: bool
    summed: float

    @property
    def compute_seconds(self) -> float:
        """At the assumed share of the peak."""
        return self.operations / (OPERATIONS * UTILISATION)

    @property
    def message_seconds(self) -> float:
        """At the assumed bandwidths, as if nothing overlapped."""
        return self.moved / (BETWEEN if self.between else INSIDE) + self.summed / BETWEEN


def settings_of(layout: Layout, folder: Path) -> schema.RunConfig:
    """The preset as the layout runs it, of a pipeline that is described and not there."""
    (folder / "transformer").mkdir(exist_ok=True)
    described = {"_class_name": "QwenImageTransformer2DModel", **QWEN_IMAGE}
    (folder / "transformer" / "config.json").write_text(json.dumps(described))
    return schema.load(
        "qwen-image",
        [f"model.path={folder}", f"train.batch={layout.batch}", "train.micro_batch=null", *layout.overrides],
    )


@cache
def _network(overrides: tuple[str, ...]) -> Any:
    """The student without values; the same for all layouts with these overrides."""
    with tempfile.TemporaryDirectory() as folder:
        layout = next(layout for layout in LAYOUTS if layout.overrides == overrides)
        settings = settings_of(layout, Path(folder))
        family = settings.model.family_class(Path(folder), SimpleNamespace(vae=None, components={}))
        return family.outline(settings.model.pretrained)


def cost(layout: Layout) -> Cost:
    """The calculation of the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of(layout, Path(folder))
        network = _network(layout.overrides)
    passes = joined(settings)
    rows = 4 * sum(passes.with_backward) + sum(passes.forward)  # forward, backward twice, recomputed once
    count, trained = _numbers(network)
    weights = 2 * count * (2 * len(passes.with_backward) + len(passes.forward))
    gradient = 4 * trained * len(passes.with_backward)
    part = (layout.shards - 1) / layout.shards
    summed = 2 * gradient / layout.shards * (layout.replicate - 1) / layout.replicate
    operations = rows * operations_of_row(network) / layout.processes
    return Cost(operations, (weights + gradient) * part, layout.shards > PER_MACHINE, summed)


def _numbers(network: nn.Module) -> tuple[int, int]:
    """Parameters, and those that are trained."""
    parameters = list(network.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


def operations_of_row(network: nn.Module) -> float:
    """Of one forward pass of one image with its prompt."""
    met = sum(
        module.weight.numel() for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks" in name and "_mod." not in name
        and "lora_" not in name
    )  # fmt: skip
    tokens = IMAGE_TOKENS + TEXT_TOKENS
    width = QWEN_IMAGE["num_attention_heads"] * QWEN_IMAGE["attention_head_dim"]  # type: ignore[operator]
    attention = 4 * tokens * width * QWEN_IMAGE["num_layers"]  # type: ignore[operator]
    return tokens * (2 * met / 2 + attention)


def report(layouts: Sequence[Layout] = LAYOUTS) -> str:
    """The table in Markdown."""
    costs = {layout: cost(layout) for layout in layouts}
    work = [
        [
            layout.name, layout.batch, f"{one.operations / 1e15:.1f}", f"{one.compute_seconds:.1f}",
            f"{one.moved / 1e9:.0f}", f"{one.summed / 1e9:.0f}", f"{one.message_seconds:.1f}",
            f"{layout.batch / max(one.compute_seconds, one.message_seconds):.1f}",
        ]
        for layout, one in costs.items()
    ]  # fmt: skip
    columns = [
        "GPUs", "rows", "10¹⁵ operations", "compute (s)", "sent, GB", "copies, GB", "messages (s)",
        "rows/s, overlapped",
    ]  # fmt: skip
    return measuring.markdown(columns, work)
