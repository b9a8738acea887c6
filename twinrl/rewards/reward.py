"""What a reward is: a frozen function of images and prompts, R(y, c), higher is better.

Pixels are in [−1, 1] everywhere in this project; what a published model wants (its own size, mean and standard
deviation) happens inside the reward, on tensors, so that ∂R/∂y exists. Scores of most models compare only among
images of the same prompt.

A reward is built from its settings and its :class:`RewardContext`; composite rewards (:mod:`twinrl.rewards.ensemble`)
build their parts in the same way. Some keep statistics of scores they have seen (:class:`Keeper`); training adds to
these once after each step, so that within a step a reward is a fixed function, which finite differences need.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeAlias

import torch
from torch import Tensor, nn

from twinrl.config import Settings, component
from twinrl.config.components import Registry, Returned, all_of, checked, plain_state
from twinrl.flow.source import Scorer


@dataclass(frozen=True)
class RewardContext:
    """What a reward is built in.

    Attributes:
        scorers: reward models that come with the data source, by name.
        held_out: names of those that training must never see.
        training: whether the reward's gradient is followed; false for rewards that only judge.
        key: dotted key of the reward's settings, for error messages.
        networks: frozen networks of rewards that were built before, by settings, for those of equal settings to share;
            None shares nothing.
    """

    scorers: Mapping[str, Scorer] = field(default_factory=dict)
    held_out: frozenset[str] = frozenset()
    training: bool = True
    key: str = "reward"
    networks: MutableMapping[str, nn.Module] | None = None

    def part(self, name: str) -> "RewardContext":
        """The same surroundings for a part whose settings are under ``name``."""
        return replace(self, key=f"{self.key}.{name}")


WITHOUT_SOURCE = RewardContext()
"""No data source; the reward is to be followed."""


class Keeper(Protocol):
    """A reward that keeps statistics of scores."""

    def observed(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of which statistics are kept, for arguments as a reward's; changes nothing."""
        ...

    def observe(self, scores: Tensor, prompts: Sequence[str]) -> None:
        """Take (B,) such scores into the statistics, those of a whole training step at once; all are finite."""
        ...


def _scores(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    checked(value, Tensor, owner, method, (len(arguments[0]),))


def _itself(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    checked(value, type(owner), owner, method)


class Reward(ABC):
    """Base of all rewards. Subclasses give ``Config`` (with ``kind``) and :meth:`__call__`.

    Arguments:
        config: an instance of the class's ``Config``.
        context: see :class:`RewardContext`.

    Attributes:
        differentiable: whether ∂R/∂y exists. A reward without it is scored only, and needs an estimator that asks
            for scores alone.
        needs_prompts: whether the prompts matter.
    """

    Config: ClassVar[type[Settings]] = Settings
    RETURNS: ClassVar[Mapping[str, Returned]] = {
        "__call__": _scores, "state": plain_state, "modules": all_of(dict, nn.Module), "to": _itself,
    }  # fmt: skip
    differentiable: bool = True
    needs_prompts: bool = True

    def __init__(self, config: Any, context: RewardContext = WITHOUT_SOURCE):
        self.config = config
        self.context = context

    @abstractmethod
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores of images for their prompts, each image for itself.

        Arguments:
            images: (B, 3, H, W) or (B, 1, H, W) pixels in [−1, 1]; values outside are not clamped.
            prompts: B prompts; ignored unless ``needs_prompts``.

        Returns:
            (B,) scores, differentiable in the pixels if ``differentiable``. Non-finite scores are returned as
            they are.
        """

    @classmethod
    def has_gradient(cls, config: Any) -> bool:
        """Whether the reward that ``config`` describes is ``differentiable``; known before it is made."""
        return cls.differentiable

    def keepers(self) -> dict[str, Keeper]:
        """What keeps statistics, by the dotted path of the part whose scores these are; empty for most rewards."""
        return {}

    def state(self) -> dict[str, Any]:
        """Statistics for the checkpoint, in plain values; empty for most rewards."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        if state:
            raise ValueError(f"reward {self.config.kind} keeps no state, got {', '.join(state)}")

    def modules(self) -> dict[str, nn.Module]:
        """The reward's own frozen networks, e.g. to move them off the device between uses; empty for most."""
        return {}

    def to(self, device: torch.device | str) -> Self:
        """The reward's own networks on ``device``, in place."""
        for module in self.modules().values():
            module.to(device)
        return self


REWARDS: Registry[Reward] = Registry("reward", Reward)
"""Kind → class; filled in ``twinrl/rewards/__init__.py``. Declared here because composite rewards refer to it."""

if TYPE_CHECKING:
    RewardSettings: TypeAlias = Any
else:
    RewardSettings = component(REWARDS)


def build_part(config: Any, context: RewardContext, name: str) -> Reward:
    """The reward that ``config`` describes, as the part ``name`` of another."""
    part: Reward = REWARDS.build(config, context.part(name))
    return part


def check_batch(images: Tensor, prompts: Sequence[str], needs_prompts: bool) -> None:
    """Raises ValueError where the arguments of a reward do not belong together."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"a reward takes (B, 3, H, W) or (B, 1, H, W) images, got {tuple(images.shape)}")
    if needs_prompts and len(prompts) != len(images):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts")
