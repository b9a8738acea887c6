"""Bytes of a family's step that the simulation says, on one process and on two, beside those of torch's allocator."""

import json
from pathlib import Path

import pytest
import torch

from tests.benchmarks.scripts import script
from tests.fsdp.spawned import spawned
from tests.training.allocator import CPU, allocated_of_family
from twinrl.commands.simulate import Simulator
from twinrl.data.dataset import CACHE_FORMAT, MANIFEST, BucketRow, Manifest
from twinrl.fsdp.ranks import ALONE
from twinrl.fsdp.sharded import Sharded
from twinrl.training import schema

pytestmark = [pytest.mark.slow, pytest.mark.processes]

SMALL = {
    "sd3": {"num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 256, "joint_attention_dim": 256,
            "pooled_projection_dim": 64, "pos_embed_max_size": 32, "dual_attention_layers": [0]},
    "qwen_image": {"num_layers": 3, "num_attention_heads": 2, "joint_attention_dim": 256},
}  # fmt: skip
"""What makes a published transformer a small one; its blocks stay as they are, but for their width."""
SIDE = 24
WAYS = {"plain": [], "lora": ["model.lora={rank: 8}"]}


def described(family: str, folder: Path) -> list[str]:
    """A small pipeline's descriptions and what says how large prepared latents are; the run's overrides."""
    script("published").describe(family, folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SMALL[family]))
    bucket = BucketRow(name="square", width=8 * SIDE, height=8 * SIDE, latent_shape=(16, SIDE, SIDE))
    made = Manifest(format=CACHE_FORMAT, encoder="x", content_hash="x", images=False, lengths={}, buckets=[bucket])
    (folder / MANIFEST).write_text(made.model_dump_json())
    return [
        f"model={{family: {family}, path: {folder}}}", f"data={{source: folder, root: {folder}}}", "evaluation.every=0",
        "train={batch: 8, steps: 40}", f"run.dir={folder / 'runs'}", "tracking.mlflow=false",
        "gradients.telemetry={shares_every: 0, cosines_every: 0}",  # whose gradients are on the host, here the device
    ]  # fmt: skip


def measured(overrides: list[str], processes: int) -> int:
    """In one of the processes."""
    torch.set_num_threads(1)
    settings = schema.load("twinflow", overrides)
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"init": "random"})})
    return allocated_of_family(settings, Sharded(settings.fsdp, CPU) if processes > 1 else ALONE)


@pytest.mark.parametrize(
    ("family", "way", "processes"),
    [
        ("sd3", "plain", 1),
        pytest.param("sd3", "plain", 2, marks=pytest.mark.campaign),
        pytest.param("qwen_image", "lora", 2, marks=pytest.mark.campaign),
    ],
)
def test_bytes_are_those_of_the_allocator(tmp_path: Path, family: str, way: str, processes: int) -> None:
    """In float32: on a CPU there are no kernels of a device's attention in 16 bits."""
    overrides = [*described(family, tmp_path), *WAYS[way]]
    with Simulator() as simulator:
        report = simulator.report("twinflow", overrides, processes)
    expected = spawned(measured, processes, tmp_path, overrides, processes)[0]
    assert report.peak.bytes - sum(report.held.values()) == pytest.approx(expected, rel=0.1)
