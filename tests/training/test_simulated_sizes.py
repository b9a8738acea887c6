"""Steps of the large presets at their published sizes: minutes each, and what has to hold of them."""

from pathlib import Path

import pytest

from tests.benchmarks.scripts import script
from tests.training.test_simulated import check_waits
from twinrl.commands.simulate import Simulator
from twinrl.machine.simulated.memory import GRADIENTS
from twinrl.training import schema

pytestmark = [pytest.mark.campaign, pytest.mark.processes]

GB = 10**9


@pytest.mark.parametrize(("preset", "processes", "most"), [("sd35", 1, 95), ("sd35", 8, 18), ("qwen-image", 8, 50)])
def test_large(tmp_path: Path, preset: str, processes: int, most: int) -> None:
    """``most``: GB of a rank at the peak."""
    folder = script("published").describe(str(schema.load(preset).model.family), tmp_path)
    overrides = [f"model.path={folder}", f"train.batch={4 * max(4, processes)}"]
    with Simulator() as simulator:
        report = simulator.report(preset, overrides, processes)
    check_waits(report)
    assert report.peak.bytes < most * GB
    if processes > 1:
        assert report.peak.owners[GRADIENTS] < 2 * report.parameters  # in bf16, a whole one
