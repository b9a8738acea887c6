"""Studies of two factors whose truth is planted: what falls, which term leads, what decides it."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.analysis import simulated

FACTORS = {"teacher": ("live", "ema"), "reward": ("without", "with")}
STEPS, FELL_AT = 160, 100
Truth = Callable[[str, str, int], dict[str, Any]]
"""Teacher, reward and seed → what :func:`simulated.make_run` is told."""


def make(folder: Path, truth: Truth, seeds: int = 8, steps: int = STEPS) -> Path:
    """A grid of both factors; returns the folder of the study, which has a study.json."""
    study = folder / "planted"
    arms = []
    for k, (teacher, reward) in enumerate(itertools.product(*FACTORS.values())):
        levels = {"teacher": teacher, "reward": reward}
        name, config_hash = " ".join(f"{f}={level}" for f, level in levels.items()), f"bbbbbbb{k}"
        arms.append({"name": name, "config_hash": config_hash, "levels": levels, "steps": steps})
        for seed in range(seeds):
            told = truth(teacher, reward, seed)
            if told.get("diverges_at"):
                told["color"] = 2
            simulated.make_run(study, config_hash=config_hash, seed=seed, steps=steps, **told)
    question = "Does a live teacher make the recipe fall, and does the reward?"
    (study / "study.json").write_text(json.dumps({"name": "planted", "question": question, "arms": arms}))
    return study


def quality(center: float, seed: int, spread: float = 0.02) -> float:
    """A run's final quality."""
    return center + spread * float(np.random.default_rng([seed, round(1000 * center)]).standard_normal())


def another_term_leads(teacher: str, reward: str, seed: int) -> dict[str, Any]:
    """Runs of a live teacher fall, led by the adversarial term; the reward does nothing; the EMA arm is clipped."""
    fell = {"diverges_at": FELL_AT + 20 * (seed % 2), "leader": "adversarial"} if teacher == "live" else {}
    return {"quality": quality(0.2, seed), "limits": {"base": 2.0} if teacher == "ema" else {}, **fell}


def nothing(teacher: str, reward: str, seed: int) -> dict[str, Any]:
    """All arms are alike."""
    return {"quality": 0.2 + 0.02 * float(np.random.default_rng([seed, len(teacher + reward)]).standard_normal())}


def only_together(teacher: str, reward: str, seed: int) -> dict[str, Any]:
    """Runs fall only where both factors meet."""
    both = (teacher, reward) == ("live", "with")
    return {"quality": quality(0.2, seed), **({"diverges_at": FELL_AT, "leader": "rectify"} if both else {})}


def crossed(teacher: str, reward: str, seed: int) -> dict[str, Any]:
    """Quality 0.30 where the levels agree, 0.45 where they differ."""
    agree = (teacher == "live") == (reward == "without")
    return {"quality": quality(0.30 if agree else 0.45, seed)}
