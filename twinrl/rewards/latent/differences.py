"""Finite differences of a score along directions, averaged into a gradient.

forward   s_k = [R(x + ε·d_k) − R(x)]/ε              one evaluation a direction; bias O(ε)·curvature
central   s_k = [R(x + ε·d_k) − R(x − ε·d_k)]/2ε     two evaluations, even orders of the curvature cancel
ĝ = (1/K) Σ s_k·d_k
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from twinrl.flow.transport import like

Score = Callable[[Tensor], Tensor]
"""x (B, ...) → (B,) scores."""


@dataclass(frozen=True)
class Differences:
    """The mean over the directions, and what is needed to judge it.

    Attributes:
        g: (B, ...) the gradient ĝ.
        mean_square: (B,) mean over k of ‖s_k·d_k‖².
        count: K.
    """

    g: Tensor
    mean_square: Tensor
    count: int

    def signal_to_noise(self) -> Tensor:
        """(B,) ‖ĝ‖² over the variance of ĝ, estimated from the spread of *independent* directions; needs K ≥ 2.

        About 1 means that ĝ is noise. NaN where every difference is zero (a reward blind to ±ε after rounding).
        """
        norm_square = self.g.square().flatten(1).sum(1)
        return norm_square * (self.count - 1) / (self.mean_square - norm_square)


@torch.no_grad()
def along(score: Score, x: Tensor, base: Tensor | None, directions: Iterable[Tensor], epsilon: float) -> Differences:
    """Differences of ``score`` at ``x`` (B, ...); forward ones from the scores ``base`` (B,), else central ones."""
    total, mean_square, count = torch.zeros_like(x), x.new_zeros(len(x)), 0
    for d in directions:
        ahead = score(x + epsilon * d)
        rise = (ahead - base) / epsilon if base is not None else (ahead - score(x - epsilon * d)) / (2 * epsilon)
        single = like(rise.to(x), x) * d
        total, count = total + single, count + 1
        mean_square = mean_square + single.square().flatten(1).sum(1)
    return Differences(total / count, mean_square / count, count)
