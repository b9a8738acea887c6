"""A study of lab runs of a few seconds, shared by the tests that run trials."""

from pathlib import Path

import pytest
import yaml

from twinrl.evaluation import figures

TINY = {
    "train.steps": 20,
    "train.batch": 16,
    "checkpoint.every": 4,
    "evaluation": {"every": 0, "n": 20, "nfe": [1], "teacher_steps": 1, "velocity_rows": 5, "grid_samples": 1},
}
RATES = {"small": {"optim.lr": 1e-4}, "large": {"optim.lr": 1e-3}}

FIGURES = ("save_curves", "save_norms", "save_times", "save_renoise")


def without_figures(patch: pytest.MonkeyPatch) -> None:
    """A run draws no figures, which take longer than the rest of a short one."""
    for name in FIGURES:
        patch.setattr(figures, name, lambda *arguments: None)


def write(path: Path, **content: object) -> str:
    """A study file: base twinflow, 20 steps, the factor ``rate``, unless ``content`` says otherwise."""
    whole = {"base": "twinflow", "set": TINY, "factors": {"rate": RATES}, "seeds": 2, "retries": 0} | content
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return str(path)
