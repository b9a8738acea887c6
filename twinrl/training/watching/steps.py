"""The optimizer's own steps, whoever makes them: at the policy's rate, and what they move."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from twinrl.gradients.telemetry import Moved


class Steps:
    """Hooks before and after ``optimizer.step()``.

    A loop may let the optimizer back-propagate in a closure; then what belongs before the step is done at the end of
    the backward passes.

    Arguments:
        optimizer: of the loop. parameters: what it moves.

    Attributes:
        made: whether the optimizer has made a step since :meth:`begin`.
        lr: rate of the step, of the first group.
        scale: of all rates, by which cuts act.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]):
        self.optimizer, self.parameters = optimizer, parameters
        self.made, self.scale, self.lr = False, 1.0, math.nan
        self._ready = self._inside = self._measure = False
        self._rates: list[Any] | None = None
        self._moved: Moved | None = None
        before = optimizer.register_step_pre_hook(lambda *_: self._before())
        after = optimizer.register_step_post_hook(lambda *_: self._after())
        self._handles = (before, after)

    def begin(self, measure: bool) -> None:
        """The gradient is there, and the next step is its step; ``measure`` what it moves."""
        self.made, self._moved, self._ready, self._measure = False, None, True, measure
        self.lr = float(self.optimizer.param_groups[0]["lr"]) * self.scale
        if self._inside:
            self._prepare()

    def cut(self, factor: float, minimum: float) -> None:
        """Lower all rates from the next step on, but not below a share of the loop's."""
        self.scale = max(self.scale * factor, minimum)

    def measures(self) -> dict[str, Tensor]:
        """What the step has moved, if that was to be measured; asked once."""
        found = self._moved.measures() if self._moved is not None and self.made else {}
        self._moved, self._ready = None, False
        return found

    def _before(self) -> None:
        self._inside = True
        if self._ready:
            self._prepare()

    def _prepare(self) -> None:
        if self._measure:
            self._moved = Moved(self.optimizer, self.parameters)
        groups = self.optimizer.param_groups
        self._rates = [group["lr"] for group in groups]
        for group in groups if self.scale != 1 else ():
            group["lr"] = group["lr"] * self.scale
        self.lr = float(groups[0]["lr"])

    def _after(self) -> None:
        self._inside = False
        if self._ready:
            self.made = True
        for group, rate in zip(self.optimizer.param_groups, self._rates or (), strict=False):
            group["lr"] = rate
        self._rates = None

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
