"""Steps of the large presets at their published sizes: minutes each, and what has to hold of them."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.scripts import script
from tests.training.test_simulated import check_waits
from twinrl.commands.simulate import Simulator
from twinrl.machine.simulated.memory import GRADIENTS

pytestmark = [pytest.mark.campaign, pytest.mark.processes]

KL = {  # vae/config.json of stabilityai/stable-diffusion-3.5-medium
    "_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2,
    "sample_size": 1024, "scaling_factor": 1.5305, "shift_factor": 0.0609, "use_quant_conv": False,
    "use_post_quant_conv": False,
}  # fmt: skip
QWEN = {"_class_name": "AutoencoderKLQwenImage"}  # the published one has the class's defaults
PIPELINES = {
    "sd35": ("StableDiffusion3Pipeline", {"_class_name": "SD3Transformer2DModel", **script("random_model").MEDIUM}, KL),
    "qwen-image": ("QwenImagePipeline", script("paper").QWEN_IMAGE, QWEN),
}
GB = 10**9


def described(preset: str, folder: Path) -> str:
    """A published pipeline's folder."""
    pipeline, *parts = PIPELINES[preset]
    index: dict[str, object] = {"_class_name": pipeline}
    for name, config in zip(("transformer", "vae"), parts, strict=True):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
        index[name] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))
    return f"model.path={folder}"


@pytest.mark.parametrize(("preset", "processes", "most"), [("sd35", 1, 95), ("sd35", 8, 18), ("qwen-image", 8, 50)])
def test_large(tmp_path: Path, preset: str, processes: int, most: int) -> None:
    """``most``: GB of a rank at the peak."""
    overrides = [described(preset, tmp_path), f"train.batch={4 * max(4, processes)}"]
    with Simulator() as simulator:
        report = simulator.report(preset, overrides, processes)
    check_waits(report)
    assert report.peak.bytes < most * GB
    if processes > 1:
        assert report.peak.owners[GRADIENTS] < 2 * report.parameters  # in bf16, a whole one
