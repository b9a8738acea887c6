"""The sampler's settings, its time grid and the settings in public use (UCGM-S, arXiv:2505.07447)."""

from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from twinrl.config import Settings
from twinrl.config.errors import InputError

Style = Literal["few", "any", "mul"]


class SamplerConfig(Settings):
    """Everything that decides a sample beside the network, the starting noise and the injected noise.

    The defaults are the few-step settings for 4 evaluations. Prefer :func:`few_step`, :func:`any_step`,
    :func:`multi_step` and :func:`euler`, which know which settings belong together.

    Raises:
        InputError: the combination is undefined (order 2 at ``gap_start`` 0, gaps that leave no interval).
    """

    model_config = ConfigDict(allow_inf_nan=False)

    steps: int = Field(
        default=4,
        ge=1,
        description="Network evaluations at order 1; order 2 walks (steps + 1) // 2 intervals.",
    )
    style: Style = Field(
        default="few",
        description="Target time r of an evaluation: few: 0 (a jump to data); any: the next time; mul: t.",
    )
    order: Literal[1, 2] = Field(default=1, description="1: plain steps; 2: Heun-like correction, all but the last.")
    stochastic_ratio: Annotated[float, Field(ge=0, le=1)] | Literal["sde"] = Field(
        default=1.0,
        description="Share ρ of fresh noise in each step, 0 … 1; 'sde': chosen per step from the times.",
    )
    extrapolation: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="κ: predictions go on by κ times their last change, from the third step.",
    )
    kumaraswamy: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (
        Field(default=(1.0, 1.0, 1.0), description="(a, b, c) > 0 of the warp u ← (1 − (1 − u^a)^b)^c of the grid.")
    )
    gap_start: float = Field(
        default=0.001, ge=0, lt=1, description="The first time is 1 − gap_start (before the warp)."
    )
    gap_end: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="The last time before 0 is gap_end (before the warp); 0: an even grid.",
    )

    @model_validator(mode="after")
    def _defined(self) -> "SamplerConfig":
        if self.order == 2 and self.gap_start == 0:
            raise InputError(
                "order 2 divides by 1 - t and is undefined at t = 1",
                got="gap_start 0",
                expected="gap_start > 0",
                fix="set gap_start: 0.001 or order: 1",
            )
        if self.gap_start + self.gap_end >= 1:
            raise InputError(
                "the gaps leave no time between them",
                got=f"gap_start {self.gap_start:g}, gap_end {self.gap_end:g}",
                expected="gap_start + gap_end < 1",
            )
        return self


def few_step(nfe: int = 2) -> SamplerConfig:
    """Few-step sampling with ``nfe`` jumps to data, each but the last followed by fresh noise (ρ = 1).

    The settings are those of TwinFlow's README at 2 and 4 evaluations and follow SimpleTuner's rule
    elsewhere.
    At ``nfe`` = 1 it is the one jump ``x̂ = z − F(z, 1, 0)`` from exactly t = 1.

    *When to use*: to judge a TwinFlow student; guidance stays 0, it is in the training target.
    """
    if nfe == 1:
        return SamplerConfig(steps=1, style="few", stochastic_ratio=1.0, gap_start=0.0, gap_end=0.0)
    return SamplerConfig(
        steps=nfe, style="few", stochastic_ratio=1.0, gap_start=0.001, gap_end=simpletuner_gap_end(nfe)
    )


def any_step(steps: int = 4) -> SamplerConfig:
    """Deterministic any-step sampling: every evaluation is asked for the average velocity to the next time.

    *When to use*: a student trained with ``any`` rows, where equal noise must give equal images.
    """
    return SamplerConfig(steps=steps, style="any", stochastic_ratio=0.0, gap_start=0.001, gap_end=0.5)


def multi_step(steps: int = 30, extrapolation: float = 0.0) -> SamplerConfig:
    """Deterministic multi-step sampling with instantaneous velocities on UCGM's warped grid.

    *When to use*: a student as an ordinary flow model, for comparison with its few-step samples.
    """
    return SamplerConfig(
        steps=steps,
        style="mul",
        stochastic_ratio=0.0,
        extrapolation=extrapolation,
        kumaraswamy=(1.17, 0.8, 1.1),
        gap_start=0.001,
        gap_end=0.0,
    )


def euler(steps: int = 50) -> SamplerConfig:
    """Plain Euler from t = 1 to 0 in ``steps`` equal steps.

    *When to use*: teachers and other flow-matching models that know no target time.
    """
    return SamplerConfig(steps=steps, style="mul", stochastic_ratio=0.0, gap_start=0.0, gap_end=0.0)


def simpletuner_gap_end(steps: int) -> float:
    """What SimpleTuner's scheduler takes for ``gap_end`` = 0: .6 (≤ 2 steps), .5 (≤ 4), .3 (more)."""
    return 0.6 if steps <= 2 else 0.5 if steps <= 4 else 0.3


def intervals(config: SamplerConfig) -> int:
    """The number n of grid intervals: ``steps`` at order 1, (steps + 1) // 2 at order 2."""
    return config.steps if config.order == 1 else (config.steps + 1) // 2


def nfe(config: SamplerConfig, guidance: float = 0.0) -> int:
    """Network evaluations of one sample: ``steps`` at order 1, 2n − 1 at order 2; twice that under guidance.

    At order 2 the last interval is never corrected. Public code does evaluate that correction where
    ``gap_end`` is 0, but its result is the last *prediction*, which the correction comes too late to change.
    """
    evaluations = config.steps if config.order == 1 else 2 * intervals(config) - 1
    return evaluations * (2 if guidance else 1)


def time_grid(config: SamplerConfig) -> Tensor:
    """The times t₀ > t₁ > … > tₙ = 0, shape (n + 1,), float64.

    ``u = linspace(gap_start, 1 − gap_end, n)`` (n + 1 points without the last where ``gap_end`` is 0),
    warped by the Kumaraswamy distribution function ``(1 − (1 − u^a)^b)^c``; then ``t = 1 − u``, and 0.
    """
    n = intervals(config)
    points = n + 1 if config.gap_end == 0 else n
    u = torch.linspace(config.gap_start, 1 - config.gap_end, points, dtype=torch.float64)[:n]
    a, b, c = config.kumaraswamy
    warped = (1 - (1 - u**a) ** b) ** c
    return torch.cat([1 - warped, warped.new_zeros(1)])
