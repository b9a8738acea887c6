"""A flow that can be solved on paper: independent Gaussian data, whose flow map and velocities are exact."""

import torch
from torch import Tensor

from twinrl.flow.conditions import Condition
from twinrl.flow.transport import like


class GaussianFlow:
    """Data x ~ N(mean, std²) per element, so ``x_t ~ N((1−t)·mean, s(t)²)``, ``s² = t² + (1−t)²·std²``.

    The flow keeps ``(x_t − (1−t)·mean)/s(t)`` constant. Called as a network it answers with the exact average
    velocity from t to r, and the exact instantaneous one where r = t. ``calls`` counts its evaluations.
    """

    def __init__(self, mean: float = 0.7, std: float = 0.4):
        self.mean, self.std = mean, std
        self.calls = 0
        self.asked: list[tuple[float, float]] = []

    def spread(self, t: Tensor) -> Tensor:
        return (t**2 + (1 - t) ** 2 * self.std**2).sqrt()

    def move(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Where the flow takes ``x`` (B, ...) from times ``t`` to ``r`` (B,)."""
        t, r = like(t, x), like(r, x)
        return (1 - r) * self.mean + self.spread(r) / self.spread(t) * (x - (1 - t) * self.mean)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        t = like(t, x)
        slope = (t - (1 - t) * self.std**2) / self.spread(t) ** 2
        return slope * (x - (1 - t) * self.mean) - self.mean

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        self.asked.append((float(t[0]), float(r[0])))
        if torch.equal(t, r):
            return self.velocity(x, t)
        return (x - self.move(x, t, r)) / like(t - r, x)
