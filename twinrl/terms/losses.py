"""Per-sample losses and the time weight."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from twinrl.config import Settings
from twinrl.config.components import Registry, Returned, checked
from twinrl.config.errors import InputError


def mean_square(F: Tensor, target: Tensor) -> Tensor:
    """(B,) mean over all elements of a sample of ``(F − target)²``."""
    return (F - target).square().flatten(1).mean(1)


def _of_rows(value: Any, owner: Any, method: str, arguments: tuple[Any, ...]) -> None:
    checked(value, Tensor, owner, method, (len(arguments[0]),))


@dataclass(frozen=True)
class SampleLoss(ABC):
    """A loss per sample. Subclasses give ``Config`` and :meth:`__call__`."""

    config: Any
    Config: ClassVar[type[Settings]] = Settings
    RETURNS: ClassVar[Mapping[str, Returned]] = {"weight": _of_rows}

    @abstractmethod
    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        """(B, C, H, W) prediction and target → (B,) losses, differentiable in ``F``."""

    def weight(self, F: Tensor, target: Tensor) -> Tensor:
        """(B,) factor of the mean square in the loss, without gradient; what a reward inside a target is split by.

        Raises:
            InputError: the loss is no such multiple.
        """
        raise InputError(
            f"loss {self.config.kind} is no multiple of the mean square, so a reward in the target has no part of it",
            fix="override `weight`, or use l2",
        )


class L2(SampleLoss):
    """Mean square error per sample.

    *When to use*: where the size of the residual must stay visible in the loss and its gradient.
    """

    class Config(Settings):
        kind: Literal["l2"] = "l2"

    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        return mean_square(F, target)

    def weight(self, F: Tensor, target: Tensor) -> Tensor:
        return F.new_ones(len(F))


class Barron(SampleLoss):
    """The adaptive robust loss (Barron, arXiv:1701.03077) in TwinFlow's form, with a stop-gradient weight.

    ``m·sg[(m/(c² + 1e-8)/|α−2| + 1)^((α−2)/2)]/c`` with ``m`` the mean square of a sample. At α = 1 and
    RMS ≫ c it is about the RMS, with a gradient norm of about 2/√D per sample whatever the residual: the loss
    no longer shows how large the residual is.

    *When to use*: as the public large-scale code does, against outliers. Log the residuals beside it.
    """

    class Config(Settings):
        kind: Literal["barron"] = "barron"
        alpha: float = Field(1.0, lt=2, description="shape α < 2; 1 is the Charbonnier-like case")
        c: float = Field(1e-3, gt=0, description="scale below which the loss is quadratic, in units of velocity")
        max_ratio: float | None = Field(
            None,
            gt=0,
            description="upper limit of m/c² inside the weight; beyond it the loss is plain MSE again",
        )

    epsilon: ClassVar[float] = 1e-8

    def __call__(self, F: Tensor, target: Tensor) -> Tensor:
        return mean_square(F, target) * self.weight(F, target)

    def weight(self, F: Tensor, target: Tensor) -> Tensor:
        alpha, c = self.config.alpha, self.config.c
        ratio = mean_square(F.detach(), target) / (c * c + self.epsilon)
        if self.config.max_ratio is not None:
            ratio = ratio.clamp(max=self.config.max_ratio)
        return (ratio / abs(alpha - 2) + 1) ** ((alpha - 2) / 2) / c


LOSSES = Registry("loss", SampleLoss, {"l2": L2, "barron": Barron})


def time_weight(t: Tensor, r: Tensor, clamped: bool = False) -> Tensor:
    """``tan((1 − (|t| − |r|))·π/2.5) + 1`` for times (B,): 4.08 at r = t, 1 at (1, 0); 1 on fake rows (t < 0).

    Arguments:
        t, r: (B,) signed times.
        clamped: as in the published RL run: the tangent's argument in ±1.2 (3.57 at r = t), the weight in [0.01, 100].
    """
    angle = (1 - (t.abs() - r.abs())) * math.pi / 2.5
    weight = (angle.clamp(-1.2, 1.2).tan() + 1).clamp(0.01, 100) if clamped else angle.tan() + 1
    return weight.where(t >= 0, 1.0)
