"""A synthetic run directory, with a spike and some non-finite values in known places."""

import math
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from twinrl.run.runlog import RunLog

SPIKE_AT = 1234
GRID_STEPS = (0, 1000)
TERMS = ("base", "adversarial", "rectify")


def make_row(iteration: int, seed: int = 0) -> dict[str, object]:
    """A plausible row: falling losses, a one-step spike, some non-finite values, sparse validation."""
    rng = np.random.default_rng([iteration, seed])
    decay = 0.8 + 2 * math.exp(-iteration / 400)
    row: dict[str, object] = {"iteration": iteration, "step": iteration, "perf/step_seconds": 0.05}
    for k, term in enumerate(TERMS):
        row[f"loss/{term}"] = decay / (k + 1) + 0.05 * rng.standard_normal()
        row[f"grad/{term}/norm_raw"] = 3 * decay + 0.3 * rng.standard_normal()
        row[f"grad/{term}/share"] = 1 / 3 + 0.02 * rng.standard_normal()
    row["loss/total"] = sum(float(row[f"loss/{term}"]) for term in TERMS)  # type: ignore[arg-type]
    row["grad/total/norm_raw"] = 1e3 if iteration == SPIKE_AT else 5 + rng.standard_normal()
    row["delta_v/rms"] = math.nan if iteration in (700, 701, 1500) else 0.3 + 0.01 * rng.standard_normal()
    row["opt/lr"] = 1e-4 * min(1.0, (iteration + 1) / 100)
    if iteration % 100 == 99:
        row["val/quality"] = 0.2 * decay
        row["val/velocity_mse"] = 0.5 * decay
    return row


def make_run(folder: Path, rows: int = 2000, seed: int = 0, name: str = "twinflow") -> Path:
    """A finished run's directory with ``rows`` rows, a configuration and two sample grids."""
    run = folder / f"{name}-0a1b2c3d-s{seed}"
    (run / "samples").mkdir(parents=True)
    config = {"name": name, "seed": seed, "train": {"steps": rows, "batch": 64}, "optim": {"lr": 1e-4}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with RunLog(run / "log.jsonl") as log:
        log.trim(0)  # as a run does that begins
        for iteration in range(rows):
            log.append(make_row(iteration, seed))
    (run / "result.json").write_text('{"status": "finished", "step": 8}')
    for step in GRID_STEPS:
        Image.fromarray(make_grid(step)).save(run / f"samples/1nfe_{step:06d}.png")
    return run


def make_grid(step: int) -> np.ndarray:
    """A (256, 320, 3) picture of 8 × 10 rings that grow from the left to the right and with the step."""
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    sizes = 0.2 + 0.05 * np.arange(10)[None, :, None] + 1e-4 * step
    rings = np.abs(np.hypot(x, y)[:, None, :] - sizes) < 0.15  # (32, 10, 32)
    picture = np.tile(rings.reshape(32, 320), (8, 1))
    return np.repeat(255 * picture[..., None], 3, axis=2).astype(np.uint8)
