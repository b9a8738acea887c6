"""The linear transport between data and noise, and what a prediction on it means.

Conventions (TwinFlow, arXiv:2512.05150; RCGM, arXiv:2505.07447): **t = 1 is noise**, ``x_t = t·z + (1−t)·x``,
velocity ``v = z − x``. A *negative* time denotes the fake ("twin") trajectory at noise level ``|t|``.
A network ``F(x_t, t, r, c)`` predicts the average velocity from ``t`` down to ``r``; ``r = t`` is the
instantaneous velocity, ``r = 0`` one jump to data.

Shapes: images and latents are (B, C, H, W) (or any (B, ...)), times are (B,) in float32 or float64.
"""

from torch import Tensor


def like(value_b: Tensor, x: Tensor) -> Tensor:
    """(B,) viewed as (B, 1, …, 1), so that it broadcasts over ``x`` (B, ...)."""
    return value_b.view(-1, *([1] * (x.dim() - 1)))


def interpolate(x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """``x_t = |t|·z + (1−|t|)·x`` with data ``x``, noise ``z`` (B, ...) and times ``t`` (B,) in [−1, 1]."""
    level = like(t.abs(), x)
    return level * z + (1 - level) * x


def velocity(x: Tensor, z: Tensor) -> Tensor:
    """``v = z − x``, constant along the path."""
    return z - x


def predicted_data(x_t: Tensor, t: Tensor, F: Tensor) -> Tensor:
    """``x̂ = x_t − |t|·F``: where the predicted velocity ``F`` (B, ...) leads at noise level 0."""
    return x_t - like(t.abs(), x_t) * F


def predicted_noise(x_t: Tensor, t: Tensor, F: Tensor) -> Tensor:
    """``ẑ = x_t + (1−|t|)·F``: where the predicted velocity ``F`` (B, ...) comes from at noise level 1."""
    return x_t + (1 - like(t.abs(), x_t)) * F
