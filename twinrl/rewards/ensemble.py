"""Rewards made of rewards: weighted sums and ceilings. Both are remedies against reward hacking.

    ensemble   R = Σ_i w_i·(R_i − m_i)/s_i                      m_i, s_i constants, 0 and 1 unless given
    hinge      R = min(R_inner, ceiling) = ceiling − relu(ceiling − R_inner)

The hinge has the gradient of the inner reward below the ceiling and none at or above it: ascent stops there. It is
the loss ``relu(ceiling − R)`` of ReFL (Xu et al., arXiv:2304.05977) and SRPO up to sign and a constant, kept on the
inner reward's scale so that logged values stay comparable.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from twinrl.config import Settings
from twinrl.rewards.reward import REWARDS, WITHOUT_SOURCE, Keeper, Reward, RewardContext, RewardSettings, build_part


class Composite(Reward):
    """A reward of named parts: differentiable if all are, and passing state, statistics and devices on to them."""

    def __init__(self, config: Any, context: RewardContext, parts: Mapping[str, Reward]):
        super().__init__(config, context)
        self.parts = dict(parts)
        self.differentiable = all(part.differentiable for part in parts.values())
        self.needs_prompts = any(part.needs_prompts for part in parts.values())

    @staticmethod
    def inner(config: Any) -> list[Any]:
        """The parts' settings."""
        return [config.reward]

    @classmethod
    def has_gradient(cls, config: Any) -> bool:
        return all(REWARDS.find(part.kind).has_gradient(part) for part in cls.inner(config))

    def keepers(self) -> dict[str, Keeper]:
        return {
            f"{name}.{inner}": keeper for name, part in self.parts.items() for inner, keeper in part.keepers().items()
        }

    def state(self) -> dict[str, Any]:
        states = {name: part.state() for name, part in self.parts.items()}
        return {name: state for name, state in states.items() if state}

    def load(self, state: Mapping[str, Any]) -> None:
        if unknown := [name for name in state if name not in self.parts]:
            raise ValueError(f"reward {self.config.kind} has no part {unknown[0]}")
        for name, part in self.parts.items():
            part.load(state.get(name, {}))

    def modules(self) -> dict[str, nn.Module]:
        return {
            f"{name}.{inner}": module for name, part in self.parts.items() for inner, module in part.modules().items()
        }


class EnsembleMember(Settings):
    """One reward of an ensemble."""

    reward: RewardSettings = Field(description="the reward, by kind")
    weight: float = Field(1.0, allow_inf_nan=False, description="factor in the sum; negative = penalty")
    mean: float = Field(0.0, allow_inf_nan=False, description="subtracted first: the reward's typical value")
    std: float = Field(1.0, gt=0, allow_inf_nan=False, description="divided by: the reward's typical spread")


class Ensemble(Composite):
    """Weighted sum of standardised rewards.

    *When to use*: an image that exploits one model seldom exploits its fellows. Scales differ by orders of magnitude
    (HPSv2 varies by 0.02 within a prompt, PickScore by 1): give ``std``, measured on images of the start model.
    """

    class Config(Settings):
        kind: Literal["ensemble"] = "ensemble"
        rewards: dict[str, EnsembleMember] = Field(min_length=1, description="members by name")

    def __init__(self, config: Any, context: RewardContext = WITHOUT_SOURCE):
        inside = context.part("rewards")
        members = config.rewards
        super().__init__(
            config,
            context,
            {name: build_part(member.reward, inside.part(name), "reward") for name, member in members.items()},
        )

    @staticmethod
    def inner(config: Any) -> list[Any]:
        return [member.reward for member in config.rewards.values()]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """See ``Reward``. A NaN of one member is a NaN of the sum, whatever its weight."""
        return self.of(self.parts)(images, prompts)

    def of(self, members: Iterable[str]) -> "Members":
        """Some members' part of the sum."""
        chosen = {name: self.config.rewards[name] for name in members}
        parts = {name: (self.parts[name], settings) for name, settings in chosen.items()}
        return Members(parts, all(part.differentiable for part, _ in parts.values()))


@dataclass
class Members:
    """The weighted sum of some of an ensemble's members.

    Attributes:
        chosen: name → the reward, and its settings.
        differentiable: whether all of them are.
    """

    chosen: Mapping[str, tuple[Reward, EnsembleMember]]
    differentiable: bool

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores."""
        scores = [m.weight * (part(images, prompts) - m.mean) / m.std for part, m in self.chosen.values()]
        return torch.stack(scores).sum(0)


class Hinge(Composite):
    """A reward that is worth nothing more above a ceiling.

    *When to use*: the score's best values are known to be exploits. Choose the ceiling near what good real images
    reach; R is read on the inner reward's scale.
    """

    class Config(Settings):
        kind: Literal["hinge"] = "hinge"
        reward: RewardSettings = Field(description="the inner reward, by kind")
        ceiling: float = Field(allow_inf_nan=False, description="score above which nothing is gained")

    def __init__(self, config: Any, context: RewardContext = WITHOUT_SOURCE):
        super().__init__(config, context, {"reward": build_part(config.reward, context, "reward")})

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.config.ceiling - (self.config.ceiling - self.parts["reward"](images, prompts)).relu()
