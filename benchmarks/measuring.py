"""What the benchmarks share: data, clocks, intervals, and how results are written."""

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from twinrl.flow.source import Split
from twinrl.lab.digits import CLASSES
from twinrl.lab.mnist import MNISTSource
from twinrl.lab.mnist_files import read_splits
from twinrl.machine import files

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"


# --- data -----------------------------------------------------------------------------------------------


def mnist_root() -> Path | None:
    """Folder of the digits: ``$TWINRL_MNIST_ROOT``, or None."""
    named = os.environ.get("TWINRL_MNIST_ROOT")
    return Path(named) if named else None


class Pixels(MNISTSource):
    """MNIST's pixels and conditions without its judge, which timing does not need.

    Arguments:
        root: folder of the digits; None takes random pixels of the same shape.
        rows: number of random images.
    """

    def __init__(self, root: Path | None, rows: int = 2000):
        self.name, self.classes, self.latent_shape = "mnist", CLASSES, (1, 28, 28)
        self.train = read_splits(root)[0] if root else _random_digits(rows)
        self.content_hash = "digits" if root else "random pixels"
        self._latents = {"train": self.train.pixels}
        self._device = "cpu"

    def to(self, device: str) -> "Pixels":
        """Latents and conditions on ``device``, in place."""
        self._device = device
        self._latents = {"train": self.train.pixels.to(device)}
        return self


def _random_digits(rows: int) -> Split:
    pixels = 2 * torch.rand((rows, 1, 28, 28), generator=torch.Generator().manual_seed(0)) - 1
    return Split(pixels, torch.arange(rows) % len(CLASSES))


# --- clocks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seconds:
    """Wall time, and CPU time of the process (which other processes on the machine hardly change)."""

    wall: float
    cpu: float


def clocked(run: Callable[[], object], device: torch.device | None = None) -> Seconds:
    """How long ``run()`` takes, a GPU's queue included."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronise(device)
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def synchronise(device: torch.device | None) -> None:
    """Wait for a GPU's queue; nothing to do on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    first: Callable[[], object], second: Callable[[], object], pairs: int, warmup: int, device: torch.device
) -> list[tuple[Seconds, Seconds]]:
    """``pairs`` timings of both, one after the other in turn, so that both see the same machine."""
    for _ in range(warmup):
        first(), second()
    return [(clocked(first, device), clocked(second, device)) for _ in range(pairs)]


# --- statistics -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A median with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def median(values: Sequence[float]) -> Estimate:
    """The median of ``values`` with a 95 % percentile bootstrap interval (none for a single value)."""
    point = float(np.median(values))
    if len(values) < 2:
        return Estimate(point, math.nan, math.nan)
    found = bootstrap((values,), np.median, n_resamples=9999, method="percentile", rng=np.random.default_rng(0))
    interval = found.confidence_interval
    return Estimate(point, float(interval.low), float(interval.high))


# --- another commit -------------------------------------------------------------------------------------


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The sources of another commit in a folder, for the block."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        subprocess.run(["git", "worktree", "add", "-q", "--detach", str(tree), commit], cwd=REPOSITORY, check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=REPOSITORY, check=True)


def run_in(tree: Path, script: str, *arguments: str) -> None:
    """Run a script of this folder in a process of its own, on the packages of another source tree."""
    command = [sys.executable, str(Path(script).resolve()), *arguments]
    subprocess.run(command, cwd=tree, check=True, env=os.environ | {"PYTHONPATH": str(tree)})


# --- results --------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on beside the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    head = ["| " + " | ".join(columns) + " |", "|---|" + "--:|" * (len(columns) - 1)]
    return "\n".join(head + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def write(path: Path, result: Mapping[str, Any], text: str) -> None:
    """``path`` with suffixes .json (the numbers) and .md (the table)."""
    store(path, result)
    path.with_suffix(".md").write_text(text)


def store(path: Path, result: Mapping[str, Any]) -> None:
    """``path`` with suffix .json, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path.with_suffix(".json"), json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """JSON has no infinity or nan: as strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
