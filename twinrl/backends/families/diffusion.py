"""Diff2Flow (arXiv:2506.02221): a diffusion model as a flow, at the noise levels that it was trained on.

A variance-preserving diffusion model knows data at timesteps s = 0 … T−1,

    x_s = α_s·x + σ_s·ε,   α_s² + σ_s² = 1,

and answers with ε or with v = α_s·ε − σ_s·x. A flow has x_t = t·z + (1−t)·x. Both are the same mixture of data and
noise, up to a factor, where their signal-to-noise ratios agree:

    t_s = σ_s/(α_s + σ_s),   x_s = x_t/√(t² + (1−t)²),   α = (1−t)/√(t² + (1−t)²),   σ = t/√(t² + (1−t)²).

So the input is rescaled exactly at every t; only the timestep that the network is told is interpolated, linearly in t
between the schedule's neighbours t_s (networks embed fractions too). At the t_s themselves nothing is approximated.
From the answer come both ends of the path, and from them the velocity:

    ε:  ẑ = ε,             x̂ = (x_s − σ·ε)/α
    v:  ẑ = σ·x_s + α·v,   x̂ = α·x_s − σ·v            velocity F = ẑ − x̂

The schedule does not reach all of [0, 1]. Below t_0 the network is told s = 0. Above t_{T−1} (0.936 for Stable
Diffusion 1.5, where 0.5 % of the variance is signal still) it is told s = T−1, sees noise of unit variance as the
model's own samplers give it, and its x̂ by the last α and σ defines ``F = (x_t − x̂)/t``: continuous at t_{T−1}, and at
t = 1 one jump along F lands on the model's own one-step prediction. Errors of ε are multiplied by 1/α there (15 for
Stable Diffusion 1.5); v is bounded.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from twinrl.config.errors import InputError

DIFFUSION_FAMILIES = frozenset({"stable_diffusion"})
"""Those that predict noise or v and need ``model.prediction`` and ``model.diff2flow``."""

SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""Of a diffusers scheduler's configuration, what decides its noise levels."""
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
"""diffusers' ``prediction_type`` → ours."""


class Bridge:
    """The two ways between a flow and a diffusion model.

    Arguments:
        alphas_cumprod: (T,) α_s² of the schedule, falling.
        prediction: what the model answers, ``epsilon`` or ``v``.

    Attributes:
        times: (T,) the flow times t_s of its timesteps, rising, float64. last: the largest of them.

    Raises:
        InputError: a model of ε whose last timestep is pure noise, where ε says nothing about the data.

    *When to use*: around a frozen diffusion model, or inside a network that starts from one.
    """

    def __init__(self, alphas_cumprod: Tensor, prediction: str):
        signal = alphas_cumprod.to("cpu", torch.float64).sqrt()
        noise = (1 - alphas_cumprod.to("cpu", torch.float64)).sqrt()
        if prediction == "epsilon" and float(signal[-1]) < 1e-6:
            raise InputError(
                "a model of ε cannot end in pure noise",
                got="a schedule with zero terminal signal",
                expected="model.prediction=v",
            )
        self.prediction, self.times = prediction, noise / (signal + noise)
        self.last = float(self.times[-1])
        self._copies: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> "Bridge":
        """From a scheduler's settings under ``SCHEDULE`` and ``prediction``, as a student's configuration has them."""
        from diffusers import DDPMScheduler

        settings = {key: value for key, value in described.items() if key in SCHEDULE}
        with torch.device("cpu"):  # where a model is loaded or planned without values, too
            schedule: Any = DDPMScheduler(**settings)
            return cls(schedule.alphas_cumprod, described["prediction"])

    def timestep(self, level: Tensor) -> Tensor:
        """Noise levels t (B,) in [0, 1] → the model's timesteps s in [0, T−1], fractions between the schedule's."""
        grid, t = self._grid(level)
        right = torch.searchsorted(grid, t).clamp(1, len(grid) - 1)
        low, high = grid[right - 1], grid[right]
        return (right - 1 + ((t - low) / (high - low)).clamp(0, 1)).to(level.dtype)

    def level(self, timestep: Tensor) -> Tensor:
        """The inverse of :meth:`timestep` on the schedule's range."""
        grid, s = self._grid(timestep)
        s = s.clamp(0, len(grid) - 1)
        left = s.long().clamp(max=len(grid) - 2)
        return (grid[left] + (s - left) * (grid[left + 1] - grid[left])).to(timestep.dtype)

    def input(self, x_t: Tensor, level: Tensor) -> Tensor:
        """x_t (B, …) of a flow → x_s, what the model expects at the same signal-to-noise ratio."""
        return x_t / _norm(_over(level, x_t))

    def velocity(self, answer: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """The model's answer at (x_s, s) → the flow's velocity, noise − data (B, …)."""
        t = _over(level, x_t)
        known = t.clamp(max=self.last)
        alpha, sigma = (1 - known) / _norm(known), known / _norm(known)
        x_s = x_t / _norm(t)
        if self.prediction == "epsilon":
            z, x = answer, (x_s - sigma * answer) / alpha
        else:
            z, x = sigma * x_s + alpha * answer, alpha * x_s - sigma * answer
        return torch.where(t > known, (x_t - x) / t.clamp(min=0.5 * self.last), z - x)

    def _grid(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The flow times and ``like``, both in float64 where ``like`` is."""
        if like.device not in self._copies:
            self._copies[like.device] = self.times.to(like.device)
        return self._copies[like.device], like.detach().double()


def _over(level: Tensor, x: Tensor) -> Tensor:
    """Levels (B,) as a column that multiplies x (B, …)."""
    return level.to(torch.promote_types(level.dtype, x.dtype)).view(-1, *[1] * (x.ndim - 1))


def _norm(t: Tensor) -> Tensor:
    return (t.square() + (1 - t).square()).sqrt()


def described(scheduler: Mapping[str, Any], prediction: str, where: object) -> dict[str, Any]:
    """What :meth:`Bridge.of` needs of a pipeline's scheduler, checked against the configured ``prediction``.

    Raises:
        InputError: the pipeline's model predicts something else.
    """
    published = scheduler.get("prediction_type", "epsilon")
    if PREDICTIONS.get(published) != prediction:
        raise InputError(
            f"model.prediction is not what {where} predicts", got=prediction,
            expected=PREDICTIONS.get(published, published),
            fix=f"model.prediction={PREDICTIONS[published]}" if published in PREDICTIONS else None,
        )  # fmt: skip
    return {key: scheduler[key] for key in SCHEDULE if scheduler.get(key) is not None} | {"prediction": prediction}


def check_bridge(family: str, prediction: str | None, diff2flow: bool) -> None:
    """Raises InputError unless a diffusion model, and no other, is asked for as a flow by both switches."""
    asked = f"model.prediction={prediction or 'null'} model.diff2flow={str(diff2flow).lower()}"
    if family not in DIFFUSION_FAMILIES:
        if prediction is not None or diff2flow:
            raise InputError(f"{family} is a flow already", got=asked, fix="remove both switches")
    elif prediction is None or not diff2flow:
        raise InputError(
            f"{family} is a diffusion model and TwinFlow trains flows", got=asked,
            fix="model.prediction=epsilon (or v, as the model was trained) and model.diff2flow=true",
        )  # fmt: skip
