"""torchvision and what needs it can be imported beside any build of torch."""

import subprocess
import sys

import pytest


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_importing_twinrl_is_enough_for_torchvision_and_imports_no_torch() -> None:
    run(
        "import twinrl, sys; assert 'torch' not in sys.modules; import torchvision;"
        "from twinrl.machine.compat import ensure_torchvision; ensure_torchvision(); ensure_torchvision()"
    )


@pytest.mark.campaign
def test_stock_scripts_of_what_needs_it() -> None:
    run("import twinrl, open_clip; from diffusers import AutoencoderKL, DiffusionPipeline")
