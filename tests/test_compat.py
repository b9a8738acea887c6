"""torchvision and what needs it can be imported beside any build of torch."""

import subprocess
import sys


def test_open_clip_and_diffusers_import_after_ensure_torchvision():
    code = (
        "from twinrl.compat import ensure_torchvision; ensure_torchvision(); ensure_torchvision();"
        "import torchvision, open_clip; from diffusers import AutoencoderKL; print(torchvision.__version__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)
