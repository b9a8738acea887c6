"""What rounding a student's weights costs of what training has changed in them.

Training moves a weight by some thousandths of itself, and bf16 has 8 binary digits: a rounded weight may have lost a
third of its update.
"""

import math
import statistics

import torch
from torch import Tensor

WORTH_SAYING = 0.01
"""Share of the update from which on another form of export is recommended."""


class Cost:
    """The part of an update that rounding to a format takes away, tensor by tensor.

    Arguments:
        dtype: the format.
    """

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._lost: list[float] = []
        self._moved: list[float] = []

    def see(self, exact: Tensor, moved: Tensor) -> Tensor:
        """The tensor in the format.

        Arguments:
            exact: float32. moved: by how much training has changed it, of the same shape.
        """
        rounded = exact.to(self.dtype)
        if (size := float(moved.float().norm())) > 0:
            self._lost.append(float((rounded.float() - exact).norm()))
            self._moved.append(size)
        return rounded

    @property
    def share(self) -> float:
        """Of the whole update: ‖rounded − exact‖ / ‖exact − start‖; 0 where nothing was seen."""
        return math.hypot(*self._lost) / math.hypot(*self._moved) if self._moved else 0.0

    @property
    def matters(self) -> bool:
        """Whether it is more than 1 % of the update."""
        return self.share > WORTH_SAYING

    def __str__(self) -> str:
        if not self._moved:
            return f"what rounding to {self.name} costs is not known"
        shares = [lost / moved for lost, moved in zip(self._lost, self._moved, strict=True)]
        each = f"median tensor {statistics.median(shares):.2%}, worst {max(shares):.2%}"
        return f"rounding to {self.name} costs {self.share:.2%} of what training has changed ({each})"

    @property
    def name(self) -> str:
        """Of the format."""
        return str(self.dtype).removeprefix("torch.")
