"""The protocol: registry, a user's own class, non-finite scores."""

import inspect
from typing import Literal

import pytest
import torch

from tests.rewards.tiny import images, reward
from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.rewards import REWARDS, Reward


class Darkest(Reward):
    """A user's reward: the number of dark pixels, of which no gradient exists."""

    differentiable = False
    needs_prompts = False

    class Config(Settings):
        kind: str
        below: float = 0.0

    @torch.no_grad()
    def __call__(self, images, prompts):
        return (images < self.config.below).float().flatten(1).mean(1)


def test_a_users_class_is_named_by_its_path():
    model = reward({"kind": f"{__name__}.Darkest", "below": 0.5})
    assert not model.differentiable
    torch.testing.assert_close(model(images(), []), (images() < 0.5).float().mean((1, 2, 3)))


def test_unknown_kind_lists_the_known():
    with pytest.raises(InputError, match=r"unknown reward 'hps'.*lab_hps, .*hpsv2"):
        reward("hps")


def test_unknown_setting_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown key reward\.chunks; did you mean chunk\?"):
        reward({"kind": "hpsv2", "chunks": 2})


@pytest.mark.parametrize("kind", REWARDS)
def test_registered_classes_keep_the_contract(kind):
    cls = REWARDS[kind]
    assert cls.Config.model_fields["kind"].annotation == Literal[kind]
    assert cls.Config.model_config["frozen"]
    for name, field in cls.Config.model_fields.items():
        assert name == "kind" or field.description, f"{kind}.{name} has no description"
    assert list(inspect.signature(cls.__call__).parameters)[1:] == ["images", "prompts"]
    assert inspect.getdoc(cls)
