"""Renoise: a distribution of times whose shape moves during training, and the times that it shapes.

A *family* names the distribution; each of its parameters is a :mod:`schedule <twinrl.flow.schedules>`, so every shape
of movement combines with every family. The published run (Qwen-Image-2512) moves Beta(4→1, 1) linearly over 30 % of the
run and shapes the training times with it. DMDR (arXiv:2511.13649) moves Beta(4→1, 1.5→1) along a cosine and shapes
the time of the fake model *and* the renoise time τ, the only one that "renoise" means in distribution matching::

    renoise: {kind: beta, alpha: {kind: linear, initial: 4, final: 1, end: 30%}, beta: 1, placement: [training]}
    renoise:
      kind: beta
      alpha: {kind: cosine, initial: 4, final: 1, end: 10000}
      beta: {kind: cosine, initial: 1.5, final: 1, end: 10000}
      placement: [fake, rectify]

**Placement** says which times are drawn from it; all others keep the law that they have without renoise:

- ``training``: t of the rows (the branches mul, any and adv; e2e rows have t = 1);
- ``rectify``: τ, at which ``rectify`` compares the real and the fake branch;
- ``fake``: the time of the adversarial term, which trains the fake branch.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from twinrl.config import Settings
from twinrl.flow.schedules import AnySchedule, Schedule
from twinrl.renoise.distributions import Beta, LogitNormal, TimeDistribution

Placement = Literal["training", "rectify", "fake"]


class RenoiseConfig(Settings):
    """Settings that every family has."""

    kind: str
    placement: tuple[Placement, ...] = Field(
        ("rectify",), min_length=1, description="times that it shapes: training, rectify, fake, or a list of several"
    )

    @field_validator("placement", mode="before")
    @classmethod
    def _one_is_a_list(cls, placement: object) -> object:
        return [placement] if isinstance(placement, str) else placement

    @field_validator("placement")
    @classmethod
    def _in_fixed_order(cls, placement: tuple[Placement, ...]) -> tuple[Placement, ...]:
        """The order in which placements are written, or a repetition, changes no number and no hash."""
        known: tuple[Placement, ...] = ("training", "rectify", "fake")
        return tuple(name for name in known if name in placement)

    @model_validator(mode="after")
    def _not_tied_to_itself(self) -> "RenoiseConfig":
        for name, schedule in self.schedules().items():
            if schedule.tied:
                raise ValueError(f"{name} waits for the end of renoise, but is renoise; fix: write steps or a %")
        return self

    def schedules(self) -> dict[str, Schedule]:
        """The parameters of the family, by name."""
        return {name: value for name, value in self if isinstance(value, Schedule)}


def _positive(schedule: Schedule) -> Schedule:
    if schedule.extremes[0] <= 0:
        raise ValueError(f"the schedule reaches {schedule.extremes[0]:g}; expected > 0 throughout")
    return schedule


@dataclass(frozen=True)
class Renoise(ABC):
    """A family with moving parameters. A subclass gives ``Config`` and :meth:`at`."""

    config: Any
    Config: ClassVar[type[RenoiseConfig]] = RenoiseConfig

    @abstractmethod
    def at(self, step: int, steps: int) -> TimeDistribution:
        """The distribution at optimizer step ``step`` (0-based) of a run of ``steps``."""

    def shapes(self, placement: Placement) -> bool:
        """Whether the times of ``placement`` are drawn from it."""
        return placement in self.config.placement

    def end(self, steps: int) -> Fraction:
        """Step from which on it stands still: where schedules that start ``after_renoise`` begin."""
        return max((s.span(steps)[1] for s in self.config.schedules().values()), default=Fraction(0))


class BetaRenoise(Renoise):
    """Beta(α, β) with moving α and β. *When to use*: to reproduce the published run or DMDR."""

    class Config(RenoiseConfig):
        kind: Literal["beta"] = "beta"
        alpha: AnySchedule = Field(default=1.0, validate_default=True, description="α > 0, a number or a schedule")
        beta: AnySchedule = Field(default=1.0, validate_default=True, description="β > 0, a number or a schedule")

        _positive = field_validator("alpha", "beta")(_positive)

    def at(self, step: int, steps: int) -> Beta:
        return Beta(self.config.alpha.value(step, steps), self.config.beta.value(step, steps))


class UniformRenoise(Renoise):
    """U(0, 1) throughout. *When to use*: as the control of the other families, with the same log rows."""

    class Config(RenoiseConfig):
        kind: Literal["uniform"] = "uniform"

    def at(self, step: int, steps: int) -> Beta:
        return Beta(1.0, 1.0)


class LogitNormalRenoise(Renoise):
    """sigmoid(N(location, scale²)) with moving parameters. *When to use*: to keep τ away from both 0 and 1."""

    class Config(RenoiseConfig):
        kind: Literal["logit_normal"] = "logit_normal"
        location: AnySchedule = Field(default=0.0, validate_default=True, description="mean of the logit")
        scale: AnySchedule = Field(default=1.0, validate_default=True, description="deviation of the logit, > 0")

        _positive = field_validator("scale")(_positive)

    def at(self, step: int, steps: int) -> LogitNormal:
        return LogitNormal(self.config.location.value(step, steps), self.config.scale.value(step, steps))
