"""Rules that change a gradient: each a small class with its own configuration, chained by name in YAML.

A rule changes the gradient in place. Most multiply it by a coefficient that depends on norms alone, which is
free of synchronisation with the device. A norm that is not finite is left as it is: what to do about it is
decided by the stability policy, and a scaled infinity would turn finite entries to zero unnoticed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from twinrl.config import Settings, stored
from twinrl.config.components import Registry, Returned, plain_state
from twinrl.flow.schedules import AnySchedule
from twinrl.gradients.gradient import Gradient


@dataclass(frozen=True)
class RuleContext:
    """What a rule may look at beside the gradient itself.

    Attributes:
        parameters: the parameters to which the gradient's positions refer; empty in output space.
        others: sum of what the terms without a rule of this kind contribute; None where no rule asks for it.
        step, steps: where in the run this is, for scheduled rules. renoise_end: step at which renoise stands still.
    """

    parameters: Sequence[Tensor] = ()
    others: Gradient | None = None
    step: int = 0
    steps: int = 1
    renoise_end: Fraction | None = None


class Transform(ABC):
    """A rule. Subclasses give ``Config`` and ``__call__``; rules with memory also ``state`` and ``load``."""

    Config: ClassVar[type[Settings]] = Settings
    RETURNS: ClassVar[Mapping[str, Returned]] = {"state": plain_state}
    needs_others: ClassVar[bool] = False  # whether the terms' sum must be there first
    needs_parameters: ClassVar[bool] = False  # whether it makes sense in parameter space alone

    def __init__(self, config: Any):
        self.config = config

    @abstractmethod
    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        """Change ``gradient`` in place."""

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return {}

    def load(self, state: dict[str, float]) -> None:  # noqa: B027 - most rules have no memory
        """Continue from a checkpoint's state."""


def shrink_to(gradient: Gradient, limit: Tensor | float) -> None:
    """Scale a gradient down to the norm ``limit`` if it is longer; where either is not finite, nothing is done."""
    norm = gradient.norm
    coefficient = (limit / norm).clamp(max=1.0)
    gradient.scale_(coefficient.where(norm.isfinite() & coefficient.isfinite(), 1.0))


class Clip(Transform):
    """Norm clipping: ‖g‖ ≤ max_norm (Pascanu et al., arXiv:1211.5063).

    *When to use*: where the healthy size of the gradient is known and constant.
    """

    class Config(Settings):
        kind: Literal["clip"] = "clip"
        max_norm: float = Field(1.0, gt=0, description="largest norm")

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        shrink_to(gradient, self.config.max_norm)


class Scale(Transform):
    """Multiply by a constant.

    *When to use*: to weigh a term after a clip, where its weight in the loss would only move the clip's threshold.
    """

    class Config(Settings):
        kind: Literal["scale"] = "scale"
        factor: float = Field(1.0, ge=0, allow_inf_nan=False, description="factor")

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        gradient.scale_(self.config.factor)


class Relative(Transform):
    """Clip relative to the others: ‖g‖ ≤ ratio · ‖sum of the terms without such a rule‖.

    *When to use*: for an added force (a reward) that must not outweigh the method whatever its scale.
    """

    needs_others = True

    class Config(Settings):
        kind: Literal["relative"] = "relative"
        ratio: float = Field(0.5, gt=0, description="largest norm as a multiple of the others' norm")

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        assert context.others is not None
        shrink_to(gradient, self.config.ratio * context.others.norm)


class Match(Transform):
    """Bring to a share of the others: ‖g‖ = ratio · ‖sum of the terms without such a rule‖, up or down.

    *When to use*: where a force's natural scale says nothing (η·∇R has the units of the reward), to give it a weight
    relative to the method's gradient, with a schedule.
    """

    needs_others = True

    class Config(Settings):
        kind: Literal["match"] = "match"
        ratio: AnySchedule = Field(default=0.3, validate_default=True, description="norm over the others', a schedule")

        @field_validator("ratio")
        @classmethod
        def _not_negative(cls, ratio: Any) -> Any:
            if ratio.extremes[0] < 0:
                raise ValueError(f"the ratio falls to {ratio.extremes[0]:g}; expected ≥ 0")
            return ratio

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        assert context.others is not None
        ratio = self.config.ratio.value(context.step, context.steps, context.renoise_end)
        norm = gradient.norm
        coefficient = ratio * context.others.norm / norm
        usable = norm.isfinite() & coefficient.isfinite()  # else there is nothing to match, or nothing to match it to
        gradient.scale_(coefficient.where(usable, 1.0))


class Project(Transform):
    """Remove the part that works against the others: ``g ← g − min(0, g·s)/‖s‖²·s``.

    One-sided gradient surgery (PCGrad, Yu et al., arXiv:2001.06782): the others keep their gradient.

    *When to use*: where an added force should never undo the method's own progress to first order.
    """

    needs_others = True

    class Config(Settings):
        kind: Literal["project"] = "project"

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        others = context.others
        assert others is not None
        against = gradient.dot(others).clamp(max=0)
        share = against / others.norm.square()
        share = share.where(share.isfinite(), 0.0)  # the others are zero, or something is not finite and stays so
        for i, tensor in gradient.tensors.items():
            if i in others.tensors:
                factor = share.to(tensor.device)
                tensor.sub_((others.tensors[i] * factor).masked_fill_(factor == 0, 0.0))  # 0 times nan is nan
        gradient.changed()


class AGC(Transform):
    """Adaptive gradient clipping (Brock et al., arXiv:2102.06171): ‖G_i‖ ≤ λ·max(‖W_i‖, ε) for every unit i.

    A unit is a row of the weight (first dimension); vectors and scalars are one unit each.

    *When to use*: where the scale of the gradients differs between layers.
    """

    needs_parameters = True

    class Config(Settings):
        kind: Literal["agc"] = "agc"
        ratio: float = Field(0.01, gt=0, description="λ: largest ratio of gradient to weight")
        eps: float = Field(1e-3, gt=0, description="ε: smallest weight norm assumed, so that zero weights can move")

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        for i, tensor in gradient.tensors.items():
            limit = self.config.ratio * _unit_norm(context.parameters[i].detach()).clamp(min=self.config.eps)
            norm = _unit_norm(tensor)
            coefficient = (limit / norm).clamp(max=1.0)
            tensor.mul_(coefficient.where(norm.isfinite() & (norm > 0), 1.0))
        gradient.changed()


def _unit_norm(tensor: Tensor) -> Tensor:
    """Norm of every unit, shaped to multiply the tensor."""
    if tensor.ndim < 2:
        return tensor.norm()
    return tensor.square().sum(dim=tuple(range(1, tensor.ndim)), keepdim=True).sqrt()


class ZClip(Transform):
    """Clip by z-score of the norm's own history (Kumar et al., arXiv:2504.02507).

        z = (‖g‖ − μ)/σ;  where z > z_max:  ‖g‖ ← μ + (z_max²/z)·σ
        μ ← α·μ + (1−α)·‖g‖,  σ² ← α·σ² + (1−α)·(‖g‖ − μ)²      with the clipped norm

    μ and σ start as mean and standard deviation of the first ``warmup`` norms, which are not clipped.

    *When to use*: where the healthy size of the gradient drifts over training.
    """

    class Config(Settings):
        kind: Literal["zclip"] = "zclip"
        z: float = Field(2.5, gt=0, description="largest z-score")
        alpha: float = Field(0.97, gt=0, lt=1, description="decay of mean and variance")
        warmup: int = Field(25, ge=2, description="norms from which mean and variance start")

    def __init__(self, config: Any):
        super().__init__(config)
        self.count, self.mean, self.variance = torch.zeros(3, dtype=torch.float64).unbind()

    def __call__(self, gradient: Gradient, context: RuleContext) -> None:
        norm = gradient.norm.double()
        self.count, self.mean, self.variance = (s.to(norm.device) for s in (self.count, self.mean, self.variance))
        warm = self.count >= self.config.warmup
        sigma = self.variance.sqrt()
        z = (norm - self.mean) / sigma
        beyond = warm & norm.isfinite() & (sigma > 0) & (z > self.config.z)
        kept = (self.mean + self.config.z**2 / z * sigma).where(beyond, norm)
        gradient.scale_((kept / norm).where(beyond, 1.0).to(gradient.norm))
        self._remember(kept, warm)

    def _remember(self, norm: Tensor, warm: Tensor) -> None:
        """Mean and variance with one more norm: running moments in the warm-up, then exponential averages."""
        seen, alpha = norm.isfinite(), self.config.alpha
        count = self.count + 1
        share = (1 - alpha) * torch.ones_like(count)
        share = share.where(warm, 1 / count)
        mean = self.mean + share * (norm - self.mean)
        # Welford's update in the warm-up: (n−1)/n·σ² + (x − μ_old)(x − μ_new)/n
        variance = (alpha * self.variance + (1 - alpha) * (norm - mean).square()).where(
            warm, (1 - share) * self.variance + share * (norm - self.mean) * (norm - mean)
        )
        self.count, self.mean, self.variance = (
            new.where(seen, old) for new, old in ((count, self.count), (mean, self.mean), (variance, self.variance))
        )

    def state(self) -> dict[str, float]:
        return {"count": float(self.count), "mean": float(self.mean), "variance": float(self.variance)}

    def load(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.variance = (
            torch.tensor(stored.number(state[name]), dtype=torch.float64) for name in ("count", "mean", "variance")
        )


TRANSFORMS = Registry(
    "gradient transform",
    Transform,
    {
        "clip": Clip,
        "zclip": ZClip,
        "agc": AGC,
        "relative": Relative,
        "match": Match,
        "scale": Scale,
        "project": Project,
    },
)
