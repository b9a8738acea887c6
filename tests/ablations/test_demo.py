"""The study that ``make demo`` runs is the published recipe and its cure, each with the reward and without."""

import pytest

from ablations import study as studies
from ablations.study import Study
from twinrl.training import schema


@pytest.fixture(scope="module")
def demo() -> Study:
    return studies.load("demo")


def test_teacher_and_reward_are_crossed(demo: Study) -> None:
    found = {
        (arm.settings.teacher.kind, arm.settings.reward.schedule.weight.final > 0): dict(arm.levels)
        for arm in demo.arms
    }  # fmt: skip
    assert found == {
        (teacher, with_reward): {"teacher": teacher, "reward": "with" if with_reward else "without"}
        for teacher in ("live", "ema") for with_reward in (True, False)
    }  # fmt: skip


def test_the_first_arm_is_the_published_recipe_but_for_its_rate_and_length(demo: Study) -> None:
    published, arm = schema.load("published"), demo.arms[0].settings
    changed = {"train": {"steps"}, "optim": {"lr"}, "stability": {"divergence"}, "evaluation": True, "name": True}
    assert arm.model_dump(exclude=changed) == published.model_dump(exclude=changed)
    assert arm.model_dump(include={"train": {"steps"}}) != published.model_dump(include={"train": {"steps"}})


def test_seeds_are_the_first_ones(demo: Study) -> None:
    """They are not chosen by what they show."""
    assert demo.config.seeds == list(range(1, len(demo.config.seeds) + 1))


def test_a_fall_is_seen_while_there_are_steps_left_to_confirm_it(demo: Study) -> None:
    for arm in demo.arms:
        settings = arm.settings
        confirmed = settings.evaluation.every * settings.stability.divergence.evaluations
        assert 0 < confirmed < settings.train.steps / 2
