"""Distributions of times on [0, 1], drawn by inverse CDF.

A draw is a function of a keyed uniform: ``t = Q(u)`` with the quantile function Q. Two arms of a study that differ
only in their distribution therefore order their rows alike, row by row ("paired"), and noise common to both cancels
in their difference.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from twinrl.config.components import checked
from twinrl.flow import draws
from twinrl.run import names


class TimeDistribution(ABC):
    """A distribution of times in [0, 1]; t = 1 is noise."""

    @abstractmethod
    def sample(self, u: Tensor) -> Tensor:
        """(B,) times from (B,) uniforms in [0, 1), on the device and in the dtype of ``u``; increasing in ``u``."""

    @property
    @abstractmethod
    def mean(self) -> float:
        """Expected time."""

    @abstractmethod
    def parameters(self) -> dict[str, float]:
        """Metric name → value of each parameter."""

    def metrics(self) -> dict[str, float]:
        """What the log says about it: parameters and expected time."""
        parameters = checked(self.parameters(), dict, self, "parameters")
        for name, value in parameters.items():
            checked(value, float, self, f"parameters.{name}")
        return {**parameters, names.RENOISE_T_MEAN: checked(self.mean, float, self, "mean")}


@dataclass(frozen=True)
class Beta(TimeDistribution):
    """Beta(α, β): density ∝ t^(α−1)·(1−t)^(β−1); α > β leans towards noise, Beta(1, 1) is uniform.

    Arguments:
        alpha, beta: positive.
    """

    alpha: float
    beta: float

    def sample(self, u: Tensor) -> Tensor:
        return draws.beta(u, self.alpha, self.beta)

    @property
    def mean(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    def parameters(self) -> dict[str, float]:
        return {names.RENOISE_ALPHA: self.alpha, names.RENOISE_BETA: self.beta}


@dataclass(frozen=True)
class LogitNormal(TimeDistribution):
    """t = sigmoid(location + scale·n) with n ~ N(0, 1): the time density of SD3 (arXiv:2403.03206, section 3.1).

    Arguments:
        location: of the logit; positive leans towards noise.
        scale: standard deviation of the logit, positive. Above about 1.7 the density has two modes.
    """

    location: float
    scale: float

    def sample(self, u: Tensor) -> Tensor:
        logit = self.location + self.scale * torch.special.ndtri(u.double())  # u = 0 gives −∞, hence t = 0
        return logit.sigmoid().to(u)

    @property
    def mean(self) -> float:
        """There is no closed form: the mean of the quantile function over 4096 midpoints, good to about 1e-5."""
        midpoints = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
        return float(self.sample(midpoints).mean())

    def parameters(self) -> dict[str, float]:
        return {names.RENOISE_LOCATION: self.location, names.RENOISE_SCALE: self.scale}
