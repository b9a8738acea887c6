"""What a run ran on: versions, revision, threads and devices, for the run's ``env.json``.

Provenance only: nothing here enters a hash or changes a number. Heavy packages are looked up in the
installed metadata instead of being imported; the devices of torch are named only if the caller has torch.
"""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

NUMERIC_PACKAGES = (
    "twinrl",
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "pandas",
    "scikit-learn",
    "diffusers",
    "transformers",
    "accelerate",
    "open-clip-torch",
    "peft",
    "torchmetrics",
    "safetensors",
    "pillow",
    "mlflow",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def describe() -> dict[str, Any]:
    """The environment as plain JSON values; takes some 20 ms.

    Returns:
        ``python``, ``platform``, ``packages`` (name → version, absent ones left out), ``git`` (``revision``
        and ``dirty``, or None outside a checkout), ``threads`` and ``devices``.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "git": git_state(Path(__file__).parent),
        "threads": threads(),
        "devices": devices(),
    }


def versions() -> dict[str, str]:
    """Installed versions of the packages that numbers depend on, without importing them."""
    found = {}
    for name in NUMERIC_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """Revision of the checkout around ``folder`` and whether tracked files differ; None outside a checkout.

    ``revision`` is None in a checkout without a commit. Only a checkout that tracks ``folder`` counts, so a
    package installed below somebody's home repository is not mistaken for it.
    """
    if not _git(folder, "ls-files", "--", "."):
        return None
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"revision": _git(folder, "rev-parse", "--verify", "HEAD") or None, "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty where git is missing, slow or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def threads() -> dict[str, Any]:
    """Usable CPU cores, the thread variables that are set, and torch's own number if it is loaded."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cores": usable}
    found |= {name: os.environ[name] for name in THREAD_VARIABLES if name in os.environ}
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.get_num_threads()
    return found


def devices() -> list[str]:
    """Names of the accelerators torch sees; empty on a CPU machine or while torch is not loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
