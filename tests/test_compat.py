"""torchvision and what needs it can be imported beside any build of torch."""

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    return done.stdout


def test_open_clip_and_diffusers_import_after_ensure_torchvision():
    code = (
        "from twinrl.compat import ensure_torchvision; ensure_torchvision(); ensure_torchvision();"
        "import torchvision, open_clip; from diffusers import AutoencoderKL; print(torchvision.__version__)"
    )
    run(code)


def test_importing_twinrl_is_enough_for_stock_scripts_and_imports_no_torch():
    run("import twinrl, sys; assert 'torch' not in sys.modules; from diffusers import DiffusionPipeline")
