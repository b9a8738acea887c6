"""Planted reward hacking in the laboratory is told within two validations; honest runs are left in peace."""

from pathlib import Path

import pytest

import twinrl

START, EVERY = 60, 30
"""Step at which the reward of these runs begins; steps between validations."""


def run(folder: Path, seed: int = 0, **settings: object) -> twinrl.Run:
    evaluation = {"every": EVERY, "n": 200, "nfe": [1], "teacher_steps": 2}
    common = {"train.steps": 300, "evaluation": evaluation, "tracking.mlflow": False, "stability.policy": "record"}
    return twinrl.train("recommended", common | settings | {"run.dir": str(folder)}, seed=seed)


@pytest.mark.campaign
@pytest.mark.parametrize("reward", ["Contrast", "Grid", "OnePicture"])
def test_a_reward_that_is_fooled_is_told_within_two_validations(reward: str, tmp_path: Path) -> None:
    """At a share of the gradient that is fifty times the recipe's."""
    model, ratio = f"tests.rewards.fooled.{reward}", {"gradients.terms.reward.match.ratio": 1.5}
    fooled = run(
        tmp_path,
        **{"reward.model": model, "train.steps": START + 2 * EVERY + 1, "reward.schedule.weight.start": START},
        **ratio,
    )
    (first, *_) = [event.step for event in fooled.events if event.kind == "hacking"]
    assert START < first <= START + 2 * EVERY


@pytest.mark.campaign
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_honest_run_is_left_in_peace(seed: int, tmp_path: Path) -> None:
    assert [event.kind for event in run(tmp_path, seed).events if event.kind == "hacking"] == []
