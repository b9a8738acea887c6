"""SimpleTuner's base term: the recursion starts at x_t itself and the (t − r)/Δ factor is missing.

    grid: t, then the points at fractions 1/N … (N−1)/N of the way to max(r, t − Δ), then r
    R = F − S − v*,   S = Σ F̄_i·(t_i − t_{i+1}) along that grid
    target = sg(F) − clamp(sg(R), ±κ)

On a straight flow with known velocity v, S = (t − r)·v, so **R = −(t − r)·v ≠ 0**: the fixed point is
``F = (1 + (t − r))·v``, a bias against :class:`twinrl.terms.rcgm.Base` that vanishes only at r = t.
(SimpleTuner's ``twinflow_*`` options; formula checked against its public code.)
"""

from typing import Literal

import torch
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.terms.rcgm import RCGMConfig, clamped, recursion
from twinrl.terms.term import Context, Query, Target, Term, own


class SimpleTunerBase(Term):
    """The base term as SimpleTuner computes it.

    *When to use*: to reproduce or diagnose SimpleTuner runs. For training prefer ``base``.
    """

    class Config(RCGMConfig):
        kind: Literal["simpletuner_base"] = "simpletuner_base"

    def query(self, rows: Rows, ctx: Context) -> Query:
        return own(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        S = recursion(query.x, self._grid(query), query.c, ctx.teacher)
        return clamped(F, F - S - ctx.target_velocity(rows), self.config.clamp)

    def _grid(self, query: Query) -> list[Tensor]:
        """N + 1 times (B,) from t down to r."""
        N, t, r = self.config.order, query.t, query.r
        lowest = torch.maximum(r, t - self.config.delta)
        return [t, *(t + (lowest - t) * (i / N) for i in range(1, N)), r]
