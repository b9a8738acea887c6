"""Rewards made of rewards."""

import pytest
import torch

from tests.rewards.tiny import PROMPTS, images, reward
from twinrl.config.errors import InputError

SUM = {
    "kind": "ensemble",
    "rewards": {
        "bright": {"reward": "brightness", "weight": 2.0, "mean": 0.1, "std": 0.5},
        "flat": {"reward": {"kind": "sharpness"}, "weight": -1.0},
    },
}


def test_weighted_sum_of_standardised_members():
    x = images(dtype=torch.float64)
    expected = 2 * (reward("brightness")(x, PROMPTS) - 0.1) / 0.5 - reward("sharpness")(x, PROMPTS)
    torch.testing.assert_close(reward(SUM)(x, PROMPTS), expected)


def test_gradient_of_the_sum_is_the_sum_of_gradients():
    def gradient(value):
        x = images(dtype=torch.float64).requires_grad_(True)
        reward(value)(x, PROMPTS).sum().backward()
        return x.grad

    torch.testing.assert_close(gradient(SUM), 4 * gradient("brightness") - gradient("sharpness"))


def test_a_broken_member_is_not_hidden_by_its_weight():
    parts = {"a": {"reward": "brightness", "weight": 0.0}, "b": {"reward": "quadratic"}}
    x = images()
    x[2] = torch.nan
    scores = reward({"kind": "ensemble", "rewards": parts})(x, PROMPTS)
    assert (~scores.isfinite()).nonzero()[:, 0].tolist() == [2]


def test_hinge_stops_at_the_ceiling():
    x = torch.stack([torch.full((3, 4, 4), level, dtype=torch.float64) for level in (-0.5, 0.2, 0.25, 0.9)])
    x.requires_grad_(True)
    hinge = reward({"kind": "hinge", "ceiling": 0.25, "reward": "brightness"})
    scores = hinge(x, [])
    torch.testing.assert_close(scores.detach(), torch.tensor([-0.5, 0.2, 0.25, 0.25], dtype=torch.float64))
    scores.sum().backward()
    expected = torch.tensor([1 / 48, 1 / 48, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(x.grad[:, 0, 0, 0], expected)


def test_hinge_passes_nan_on():
    hinge = reward({"kind": "hinge", "ceiling": 0.0, "reward": "brightness"})
    assert hinge(torch.full((1, 3, 4, 4), torch.nan), []).isnan().all()


def test_ascent_settles_on_the_ceiling():
    hinge = reward({"kind": "hinge", "ceiling": 0.5, "reward": "brightness"})
    x = torch.zeros(1, 3, 4, 4)
    for _ in range(200):
        x = x.detach().requires_grad_(True)
        hinge(x, []).sum().backward()
        x = x + x.grad
    assert 0.5 <= x.mean().item() < 0.53


def test_not_differentiable_if_one_member_is_not():
    parts = {"a": {"reward": "brightness"}, "b": {"reward": "compressibility"}}
    assert not reward({"kind": "ensemble", "rewards": parts}).differentiable
    assert not reward({"kind": "hinge", "ceiling": 0.0, "reward": "compressibility"}).differentiable
    assert reward(SUM).differentiable


def test_networks_of_members_are_reachable(saved):
    inner = {"kind": "hinge", "ceiling": 0.3, "reward": {"kind": "hpsv2", **saved["hpsv2"]}}
    pick = {"kind": "pickscore", **saved["pickscore"]}
    model = reward({"kind": "ensemble", "rewards": {"hps": {"reward": inner}, "pick": {"reward": pick}}})
    assert list(model.modules()) == ["hps.reward.model", "pick.model"]
    assert model.needs_prompts
    assert not reward(SUM).needs_prompts


def test_errors_name_the_nested_setting():
    value = {"kind": "ensemble", "rewards": {"hps": {"reward": {"kind": "hpsv2", "checkpoint": "/nowhere.pt"}}}}
    with pytest.raises(InputError, match=r"rewards\.mix\.rewards\.hps\.reward\.checkpoint is no file"):
        reward(value, key="rewards.mix")
    with pytest.raises(InputError, match=r"reward\.rewards\.hps\.reward: .*unknown reward 'hps'"):
        reward({"kind": "ensemble", "rewards": {"hps": {"reward": "hps"}}})
    with pytest.raises(InputError, match=r"did you mean ceiling"):
        reward({"kind": "hinge", "cieling": 0.2, "reward": "brightness"})
