"""The reward in training: what it wants of samples at this step, with this weight.

:class:`Guide` joins a reward model, an estimator of its latent gradient and a schedule. Terms ask it through their
context (``ctx.reward(samples, rows)``); it does not know through which route its ascent enters the loss.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.flow.branches import Rows
from twinrl.flow.schedules import RewardSchedule
from twinrl.flow.source import Data
from twinrl.flow.transport import like
from twinrl.machine.visiting import visiting
from twinrl.rewards.ensemble import Ensemble
from twinrl.rewards.keepers import metric_of
from twinrl.rewards.latent import ESTIMATORS, KeyedRows, LatentReward, LatentRewardConfig
from twinrl.rewards.latent.autograd import without_gradient
from twinrl.rewards.latent.latent_reward import LatentGradient, sum_of
from twinrl.rewards.reward import REWARDS, Reward, RewardSettings
from twinrl.run import names
from twinrl.terms import Ascent

if TYPE_CHECKING:
    Model: TypeAlias = Any
else:
    Model = RewardSettings


class RewardConfig(Settings):
    """The reward that training follows, and those that only judge."""

    model: Model = Field(default="lab_hps", validate_default=True, description="what is to rise, by kind")
    gradient: LatentRewardConfig = LatentRewardConfig()
    schedule: RewardSchedule = RewardSchedule()
    held_out: dict[str, Model] = Field(
        default_factory=dict, description="rewards by name that validation reports and training never follows"
    )
    compare_every: int = Field(
        0, ge=0, description="steps between comparisons of the estimate with the exact gradient; 0 = never"
    )

    @model_validator(mode="after")
    def _gradient_where_one_is_asked_for(self) -> "RewardConfig":
        kind, model = self.gradient.estimator.kind, self.model
        wanting = {f"estimator {kind}": ESTIMATORS.find(kind).differentiates, "compare_every": self.compare_every}
        if any(wanting.values()) and not REWARDS.find(model.kind).has_gradient(model):
            raise ValueError(str(without_gradient(next(filter(wanting.get, wanting)), model.kind)))
        return self


class Guide:
    """The ascent of one reward.

    Arguments:
        config: model, estimator, schedule.
        reward: the model, on the codec's device.
        codec: the data source, which decodes and encodes.
        steps: length of the run.
        renoise_end: step at which the renoise schedule ends; None where there is none.
        visitors: frozen modules of reward and codec that may wait on the host.
    """

    def __init__(
        self,
        config: RewardConfig,
        reward: Reward,
        codec: Data,
        steps: int,
        renoise_end: Fraction | None = None,
        visitors: Sequence[nn.Module] = (),
    ):
        self.config, self.reward, self.codec = config, reward, codec
        self.latent = LatentReward(config.gradient)
        self.steps, self.renoise_end, self.visitors = steps, renoise_end, visitors
        config.schedule.weight.span(steps, renoise_end)  # a ramp that ends before it starts is found now

    def weight(self, step: int) -> float:
        """Factor of the reward at optimizer step ``step``."""
        return self.config.schedule.weight_at(step, self.steps, self.renoise_end)

    def __call__(self, samples: Tensor, rows: Rows, apart: Sequence[str] = ()) -> Ascent:
        """``weight·g`` for samples (B, C, h, w) of the rows' prompts; zero where the reward is not on.

        Members of an ensemble that are asked for ``apart`` have estimates of their own, at the price of one each.

        An image whose score (also that of a part that keeps statistics) or gradient is not finite gets no ascent, and
        says so in ``reward/nonfinite_frac``: an event names the first such images of an episode, and the other images'
        gradients are as they would be.

        Raises:
            InputError: the reward reads prompts and the data have none.
        """
        weight = self.weight(rows.draws.step)
        if weight == 0:
            return Ascent(torch.zeros_like(samples), rests=True)
        if self.reward.needs_prompts and not rows.prompts:
            raise InputError(
                f"reward.model {self.reward.config.kind} reads prompts and the data have none",
                fix="use data with captions, or a reward without prompts (aesthetic)",
            )
        prompts = rows.prompts or [""] * len(rows)
        keyed = KeyedRows(rows.draws.seed, rows.draws.step, tuple(rows.index.tolist()))
        z = samples.detach().float()
        with torch.autocast(samples.device.type, enabled=False), visiting(self.visitors, samples.device):
            found, parts = self._gradient(z, prompts, keyed, apart)
            observed = self._observed(z, prompts)
            aux = self._aux(found, z, prompts, rows.draws.step)
        finite = found.finite
        for scores in observed.values():
            finite = finite & scores.isfinite()

        def whole(g: Tensor) -> Tensor:
            return (weight * torch.where(like(finite, g), g, 0.0)).to(samples)

        aux |= {names.reward_of(name, "mean"): part.scores for name, part in parts.items()}
        aux |= {names.reward_of(name, "grad_norm"): part.aux[names.REWARD_GRAD_NORM] for name, part in parts.items()}
        aux |= {**observed, names.REWARD_NONFINITE: (~finite).to(z.dtype)}
        return Ascent(whole(found.g), aux, parts={name: whole(part.g) for name, part in parts.items()})

    def _gradient(
        self, z: Tensor, prompts: list[str], keyed: KeyedRows, apart: Sequence[str]
    ) -> tuple[LatentGradient, dict[str, LatentGradient]]:
        """The ascent, and those of members that are asked for apart, which are parts of it."""
        if not apart:
            return self.latent.gradient(z, prompts, self.codec, self.reward, keyed), {}
        assert isinstance(self.reward, Ensemble)
        rest = [name for name in self.reward.parts if name not in apart]
        summands = {name: [name] for name in apart} | ({"": rest} if rest else {})
        found = {
            name: self.latent.gradient(z, prompts, self.codec, self.reward.of(members), keyed)
            for name, members in summands.items()
        }
        return sum_of(list(found.values())), {name: found[name] for name in apart}

    @torch.no_grad()
    def _observed(self, z: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """(B,) scores for :mod:`twinrl.rewards.keepers`, by metric; nothing is computed where no reward asks."""
        keepers, size = self.reward.keepers(), self.config.gradient.chunk or len(z)
        found: dict[str, list[Tensor]] = {metric_of(part): [] for part in keepers}
        for start in range(0, len(z) if keepers else 0, size):
            images = self.codec.decode(z[start : start + size])
            for part, keeper in keepers.items():
                found[metric_of(part)].append(keeper.observed(images, prompts[start : start + size]))
        return {metric: torch.cat(scores) for metric, scores in found.items()}

    def _aux(self, found: Any, z: Tensor, prompts: list[str], step: int) -> dict[str, Tensor]:
        """What is worth logging, for each row."""
        spread = found.scores.std(unbiased=False).expand(len(z))
        aux = {names.REWARD_MEAN: found.scores, names.REWARD_STD: spread} | found.aux
        if self.config.compare_every and step % self.config.compare_every == 0:
            aux |= self.latent.compare(found, z, prompts, self.codec, self.reward)
        return aux

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold."""
        return self.reward.state()

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.reward.load(state)
