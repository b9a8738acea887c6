"""Normalisation within a prompt."""

import json

import pytest
import torch

from tests.rewards.tiny import reward
from twinrl.config.errors import InputError

LATEST = {"kind": "per_prompt", "decay": 0.0, "least": 2, "reward": "brightness"}
RUNNING = {"kind": "per_prompt", "least": 4, "decay": 1.0, "reward": "brightness"}


def grey(levels):
    """Images whose brightness is known."""
    return torch.tensor(levels, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 4, 4)


def observe(model, images, prompts):
    """As training does after a step."""
    for keeper in model.keepers().values():
        keeper.observe(keeper.observed(images, prompts), prompts)


def advantages(value, levels, prompts):
    """The latest batch's normalised scores: observed, then scored."""
    model = reward(value)
    observe(model, grey([0.9] * len(levels)), prompts)  # an older batch, to be forgotten
    observe(model, grey(levels), prompts)
    return model(grey(levels), prompts)


def test_decay_zero_standardises_each_group_of_the_latest_batch():
    levels, prompts = [0.1, 0.7, 0.3, -0.5, 0.2, -0.6], ["a", "a", "a", "b", "b", "b"]
    scores = advantages({**LATEST, "epsilon": 1e-12}, levels, prompts)
    for group in (scores[:3], scores[3:]):
        torch.testing.assert_close(group.mean(), group.new_tensor(0.0))
        torch.testing.assert_close(group.std(correction=0), group.new_tensor(1.0))


def test_offsets_and_scales_of_prompts_do_not_matter():
    prompts = ["a", "b"] * 3
    levels = [0.1, 0.2, 0.3, -0.2, 0.25, 0.0]
    moved = [level if row % 2 else 0.5 * level + 0.3 for row, level in enumerate(levels)]
    value = {**LATEST, "epsilon": 1e-12}
    torch.testing.assert_close(advantages(value, levels, prompts), advantages(value, moved, prompts))


def test_statistics_are_constants_to_the_gradient():
    model = reward({**LATEST, "epsilon": 0.1})
    x = grey([0.1, 0.5]).clone().requires_grad_(True)
    observe(model, x, ["a", "a"])
    model(x, ["a", "a"]).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 48 / (0.2 + 0.1)))


def test_each_image_is_scored_for_itself():
    model = reward(LATEST)
    observe(model, grey([0.1, 0.5, 0.3]), ["a", "a", "b"])
    together = model(grey([0.2, 0.4, 0.6]), ["a", "a", "b"])
    alone = [model(grey([level]), [prompt]) for level, prompt in ((0.2, "a"), (0.4, "a"), (0.6, "b"))]
    torch.testing.assert_close(together, torch.cat(alone))


def test_running_statistics_are_exact_without_decay():
    model = reward({**RUNNING, "epsilon": 1e-12})
    levels = torch.linspace(-0.8, 0.6, 12, dtype=torch.float64) ** 3
    for start, stop in ((0, 1), (1, 5), (5, 12)):
        observe(model, grey(levels[start:stop].tolist()), ["a"] * (stop - start))
    scores = model(grey(levels.tolist()), ["a"] * 12)
    torch.testing.assert_close(scores, (levels - levels.mean()) / levels.std(correction=0))


def test_decay_forgets():
    model = reward({**RUNNING, "decay": 0.5})
    observe(model, grey([0.9] * 4), ["a"] * 4)
    for _ in range(30):
        observe(model, grey([-0.1, 0.1]), ["a"] * 2)
    assert model.known["a"].mean == pytest.approx(0.0, abs=1e-6)
    assert model.known["a"].variance == pytest.approx(0.01, rel=1e-4)


def test_rare_prompts_use_all_prompts_together_and_a_fresh_reward_normalises_nothing():
    model = reward({**RUNNING, "epsilon": 1e-12})
    x = grey([0.1, 0.3])
    torch.testing.assert_close(model(x, ["a", "b"]), reward("brightness")(x, []))
    observe(model, grey([0.0, 0.2, 0.4, 0.6]), ["a"] * 4)
    observe(model, grey([0.8]), ["b"])
    pooled = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    own = pooled[:4]
    expected = torch.stack(
        [(0.1 - own.mean()) / own.std(correction=0), (0.3 - pooled.mean()) / pooled.std(correction=0)]
    )
    torch.testing.assert_close(model(x, ["a", "b"]), expected)


def test_scoring_changes_nothing_and_so_differences_are_of_one_function():
    model = reward(RUNNING)
    observe(model, grey([0.0, 0.2, 0.4, 0.6]), ["a"] * 4)
    before = model.state()
    first = model(grey([0.1, 0.9]), ["a", "a"])
    assert model.state() == before
    assert torch.equal(model(grey([0.1, 0.9]), ["a", "a"]), first)


def test_state_survives_json_and_nesting():
    value = {"kind": "ensemble", "rewards": {"x": {"reward": RUNNING}, "y": {"reward": "quadratic"}}}
    model, fresh = reward(value), reward(value)
    observe(model, grey([0.0, 0.2, 0.4, 0.6, 0.9]), ["a"] * 4 + ["b"])
    fresh.load(json.loads(json.dumps(model.state())))
    x = grey([0.3, 0.5])
    assert torch.equal(fresh(x, ["a", "b"]), model(x, ["a", "b"]))
    assert fresh.state() == model.state() != reward(value).state()
    assert set(model.keepers()) == {"x.reward"}


def test_foreign_state_is_refused():
    with pytest.raises(ValueError, match="keeps no state"):
        reward("brightness").load({"known": {}})
    with pytest.raises(ValueError, match="no part z"):
        reward({"kind": "hinge", "ceiling": 0.0, "reward": "brightness"}).load({"z": {}})


def test_nonfinite_scores_do_not_enter_the_statistics():
    model = reward(RUNNING)
    with pytest.raises(ValueError, match="non-finite"):
        observe(model, grey([0.1, float("nan")]), ["a", "a"])
    assert model.state() == reward(RUNNING).state()


def test_as_a_judge_it_is_refused_and_in_validation_of_the_followed_reward_it_is_the_inner_one():
    with pytest.raises(InputError, match=r"per_prompt normalises by scores seen in training.*got judges\.mine; fix"):
        reward(RUNNING, key="judges.mine", training=False)
    model, x = reward(RUNNING, key="reward.model", training=False), grey([0.1, 0.3])
    torch.testing.assert_close(model(x, ["a", "a"]), reward("brightness")(x, []))
