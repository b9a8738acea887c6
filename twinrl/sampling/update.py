"""The sampler's mathematics on explicit state, shared by ``sample`` and the diffusers scheduler.

A :func:`plan` lists the network evaluations of one sample; :func:`update` folds the network's answer to one
of them into the :class:`SamplerState`, whose ``x`` is where the network is to be asked next. Neither draws noise
nor calls a network. Notation and formulas: UCGM-S, arXiv:2505.07447, with linear transport and t = 1 noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from twinrl.config.errors import InputError
from twinrl.flow.transport import predicted_data, predicted_noise
from twinrl.sampling.settings import SamplerConfig, Style, time_grid


class Prediction(NamedTuple):
    """Both ends of the path that one velocity points along: data ``x_hat`` and noise ``z_hat`` (B, ...)."""

    x_hat: Tensor
    z_hat: Tensor


@dataclass(frozen=True)
class Evaluation:
    """One network evaluation, asked at ``(time, target_time)`` within the interval ``start → stop``.

    A predicting evaluation is asked at ``start`` and moves the state to ``stop``; a correcting one (order 2)
    is asked at ``stop`` and moves it there again, better.
    """

    step: int  # of the interval, 0 … n − 1
    time: float  # t in (0, 1]
    target_time: float  # r in [0, t]
    start: float
    stop: float
    stochastic_ratio: float  # ρ in [0, 1]
    extrapolation: float  # κ; 0 on the first two intervals and the last
    corrects: bool
    is_corrected: bool  # a correcting evaluation follows

    @property
    def needs_noise(self) -> bool:
        """Whether :func:`update` wants fresh noise; never on the last step, where its factor is 0."""
        return not self.corrects and self.stochastic_ratio > 0 and self.stop > 0


@dataclass(frozen=True)
class SamplerState:
    """What a sampler knows between two evaluations; tensors (B, ...) in float64."""

    x: Tensor  # where the network is asked next
    predicted: Prediction | None = None  # the last predicting evaluation's, not extrapolated
    origin: Tensor | None = None  # x at the start of the interval, while a correction is pending
    used_z_hat: Tensor | None = None  # the ẑ that led from there


def initial_state(z: Tensor) -> SamplerState:
    """The state before the first evaluation: the starting noise ``z`` (B, ...) in float64."""
    return SamplerState(x=high_precision(z))


def high_precision(x: Tensor) -> Tensor:
    """``x`` in float64, or in float32 on devices that have no float64."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


def target_time(style: Style, time: float, next_time: float) -> float:
    """The r of an evaluation at ``time``: few: 0; any: ``next_time``; mul: ``time``."""
    return {"few": 0.0, "any": next_time, "mul": time}[style]


def sde_ratio(start: float, stop: float) -> float:
    """``ρ = clamp(|t' − t|·2t/t'², 0, 1)``, the share of fresh noise that follows the SDE from t to t'."""
    return 1.0 if stop == 0 else min(1.0, (start - stop) * 2 * start / stop**2)


def plan(config: SamplerConfig, times: Sequence[float] | Tensor | None = None) -> tuple[Evaluation, ...]:
    """The evaluations of one sample, in order.

    Arguments:
        config: the settings.
        times: t₀ > … > tₙ = 0 in place of ``time_grid(config)``, e.g. a shifted grid.

    Returns:
        ``nfe(config)`` evaluations. At order 2 every interval but the last gets two, predicting and
        correcting; r follows from t alone, so the correction and the prediction after it ask for the same r.

    Raises:
        InputError: the times are not strictly decreasing from at most 1 to 0, or start at 1 with order 2.
    """
    grid = [float(t) for t in (time_grid(config) if times is None else times)]
    _check_times(grid, config.order)
    evaluations = []
    for step, (start, stop) in enumerate(pairwise(grid)):
        predicting = _predicting(config, step, start, stop)
        evaluations.append(predicting)
        if predicting.is_corrected:
            r = target_time(config.style, stop, grid[step + 2])
            evaluations.append(replace(predicting, time=stop, target_time=r, corrects=True, is_corrected=False))
    return tuple(evaluations)


def _predicting(config: SamplerConfig, step: int, start: float, stop: float) -> Evaluation:
    rho = config.stochastic_ratio
    # The last x̂ is the result and is reported raw, so extrapolating it would have no effect but a wrong one.
    extrapolates = step >= 2 and stop > 0
    return Evaluation(
        step=step,
        time=start,
        target_time=target_time(config.style, start, stop),
        start=start,
        stop=stop,
        stochastic_ratio=sde_ratio(start, stop) if rho == "sde" else rho,
        extrapolation=config.extrapolation if extrapolates else 0.0,
        corrects=False,
        is_corrected=config.order == 2 and stop > 0,
    )


def _check_times(times: list[float], order: int) -> None:
    shown = "[" + ", ".join(f"{t:.4g}" for t in times) + "]"
    falling = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not (falling and times[0] <= 1 and times[-1] == 0):
        raise InputError("unusable sampling times", got=shown, expected="1 >= t0 > t1 > ... > 0, closed by 0")
    if order == 2 and times[0] == 1:
        raise InputError(
            "order 2 divides by 1 - t and is undefined at t = 1",
            got=shown,
            expected="a first time below 1",
            fix="start at 0.999 or use order 1",
        )


def update(evaluation: Evaluation, state: SamplerState, F: Tensor, noise: Tensor | None = None) -> SamplerState:
    """The state after the network answered ``evaluation`` with ``F``.

    Arguments:
        evaluation: what was asked.
        state: the state before; ``F`` was computed at ``state.x``.
        F: predicted velocity (B, ...), any floating dtype.
        noise: ε ~ N(0, I) (B, ...), needed where ``evaluation.needs_noise``.

    Returns:
        The next state. After the last evaluation ``x`` is the sample, the raw x̂.

    Raises:
        ValueError: noise is needed and missing, or a correction without its prediction.
    """
    t = state.x.new_full((len(state.x),), evaluation.time)
    F = F.to(state.x)
    predicted = Prediction(predicted_data(state.x, t, F), predicted_noise(state.x, t, F))
    if evaluation.corrects:
        return _correct(evaluation, state, predicted.z_hat)
    return _predict(evaluation, state, predicted, noise)


def _predict(evaluation: Evaluation, state: SamplerState, predicted: Prediction, noise: Tensor | None) -> SamplerState:
    """``x ← (1 − t')·x̂ + t'·(√(1−ρ)·ẑ + √ρ·ε)``, with x̂ and ẑ extrapolated where the plan says so."""
    x_hat, z_hat = _extrapolate(predicted, state.predicted, evaluation.extrapolation)
    stop = evaluation.stop
    x = (1 - stop) * x_hat + stop * _renoise(evaluation, z_hat, noise)
    if evaluation.is_corrected:
        return SamplerState(x=x, predicted=predicted, origin=state.x, used_z_hat=z_hat)
    return SamplerState(x=x, predicted=predicted)


def _extrapolate(predicted: Prediction, previous: Prediction | None, kappa: float) -> Prediction:
    """``x̂ + κ(x̂ − x̂_prev)`` and the same of ẑ; the previous values are not extrapolated ones."""
    if kappa == 0 or previous is None:
        return predicted
    return Prediction(*(now + kappa * (now - before) for now, before in zip(predicted, previous, strict=True)))


def _renoise(evaluation: Evaluation, z_hat: Tensor, noise: Tensor | None) -> Tensor:
    """``√(1−ρ)·ẑ + √ρ·ε``."""
    if not evaluation.needs_noise:
        return z_hat
    if noise is None:
        raise ValueError(f"step {evaluation.step} injects noise (ratio {evaluation.stochastic_ratio:g}), got none")
    rho = evaluation.stochastic_ratio
    return math.sqrt(1 - rho) * z_hat + math.sqrt(rho) * noise.to(z_hat)


def _correct(evaluation: Evaluation, state: SamplerState, z_hat: Tensor) -> SamplerState:
    """``x' = x·(1−t')/(1−t) + (t' − (1−t')·t/(1−t))·(ẑ + ẑ')/2``.

    The trapezoid rule for x/(1−t), whose derivative with respect to t/(1−t) is ẑ. It starts again from x, so
    injected noise decides where the correction is evaluated and is otherwise discarded.
    """
    if state.origin is None or state.used_z_hat is None:
        raise ValueError(f"step {evaluation.step}: a correction needs the prediction before it")
    start, stop = evaluation.start, evaluation.stop
    kept = (1 - stop) / (1 - start)
    x = kept * state.origin + (stop - kept * start) * (state.used_z_hat + z_hat) / 2
    return SamplerState(x=x, predicted=state.predicted)
