"""Members of an ensemble with gradients of their own: they sum to the ensemble's, and each has norms and rules."""

from pathlib import Path

import pytest
import torch

from tests.fake_source import FakeSource, register, small
from tests.training.trainers import finish, rows
from twinrl.config.errors import InputError
from twinrl.flow.branches import BatchDraws, TimeLaw, divide
from twinrl.rewards import build_reward
from twinrl.rewards.guide import Guide, RewardConfig
from twinrl.training.schema import RunConfig

MEMBERS = "{light: {reward: brightness, weight: 2, std: 0.5}, sharp: {reward: sharpness}, more: {reward: brightness}}"
ON = ("reward.schedule.weight=1", "evaluation.guided=null", "stability.policy=record", "terms.rectify=null",
      "terms.reward={branches: [e2e], weight: 1}", f"reward.model={{kind: ensemble, rewards: {MEMBERS}}}",
      "reward.gradient={estimator: autograd}")  # fmt: skip


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


def run(runs: Path, *overrides: str) -> RunConfig:
    return small(runs, *ON, *overrides, preset="lab")


def test_parts_sum_to_the_ensembles_ascent(tmp_path: Path) -> None:
    settings, source = run(tmp_path), FakeSource()
    config = settings.reward
    assert isinstance(config, RewardConfig)
    guide = Guide(config, build_reward(config.model, source), source, 12)
    x = source.latents("train")[:6]
    prompts = source.prompts(source.train.labels[:6], 0, 0)
    drawn = divide({"e2e": 1.0}, TimeLaw(), x, source.condition(prompts), source.null_condition(6),
                   BatchDraws(0, 3, tuple(x.shape)), prompts).rows  # fmt: skip
    whole, apart = guide(x, drawn), guide(x, drawn, ("light", "sharp"))
    torch.testing.assert_close(apart.g, whole.g, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(apart.aux["reward/mean"], whole.aux["reward/mean"], rtol=1e-5, atol=1e-6)
    assert set(apart.parts) == {"light", "sharp"}
    light, more = apart.parts["light"], apart.g - apart.parts["light"] - apart.parts["sharp"]
    torch.testing.assert_close(light, 4 * more, rtol=1e-4, atol=1e-6)  # 2 / 0.5 times the same reward


def test_a_run_is_the_same_whether_they_are_apart_and_each_is_measured(tmp_path: Path) -> None:
    together = rows(finish(run(tmp_path / "a", "train.precision=float64")))
    apart = rows(finish(run(tmp_path / "b", "train.precision=float64", "terms.reward.apart=[light, sharp]")))
    for name in ("loss/total", "loss/reward", "grad/total/norm_raw"):
        assert [row[name] for row in apart] == pytest.approx([row[name] for row in together], rel=1e-6)
    for name in ("reward", "reward_light", "reward_sharp"):
        assert all(row[f"grad/{name}/norm_raw"] > 0 for row in apart)
    assert all(row["reward/light/mean"] != row["reward/sharp/mean"] for row in apart)


def test_a_members_own_clip_acts_on_it_alone(tmp_path: Path) -> None:
    logged = rows(
        finish(run(tmp_path, "terms.reward.apart=[light]", "gradients.terms.reward_light.clip.max_norm=1e-4"))
    )
    assert all(row["grad/reward_light/norm_clipped"] <= 1.001e-4 < row["grad/reward_light/norm_raw"] for row in logged)
    assert all(row["grad/reward/clip_coef"] == 1 for row in logged)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("terms.reward.apart=[dark]",), "terms.reward.apart names dark.*expected one of light, sharp, more"),
        (("terms.reward.apart=[light]", "reward.model=brightness"), "expected reward.model={kind: ensemble"),
        (("gradients.terms.reward_light.clip.max_norm=1",), "reward_light"),
    ],
)
def test_what_is_no_member_is_refused(tmp_path: Path, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        run(tmp_path, *overrides)
