"""Steps of the large presets at their published sizes: minutes each, and what has to hold of them."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.scripts import script
from tests.training.test_simulated import check_waits
from twinrl.commands.simulate import Simulator
from twinrl.machine.simulated.memory import GRADIENTS

pytestmark = [pytest.mark.campaign, pytest.mark.processes]

TRANSFORMERS = {
    "sd35": ("StableDiffusion3Pipeline", {"_class_name": "SD3Transformer2DModel", **script("large_model").MEDIUM}),
    "qwen-image": ("QwenImagePipeline", script("paper").QWEN_IMAGE),
}
GB = 10**9


def described(preset: str, folder: Path) -> str:
    """A pipeline of a published transformer, without a VAE."""
    pipeline, transformer = TRANSFORMERS[preset]
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(transformer))
    index = {"_class_name": pipeline, "transformer": ["diffusers", transformer["_class_name"]]}
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
