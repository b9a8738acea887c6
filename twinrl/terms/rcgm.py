"""base: the RCGM objective of any order (arXiv:2505.07447; TwinFlow, arXiv:2512.05150, eq. for L_base).

From ``x_t`` a small step Δ along the target velocity v*, then N teacher jumps down to r:

    t_m = max(t − Δ, r),  x'_0 = x_t − Δ·v*,  t_i = t_m·(1 − i/N) + r·i/N
    x'_{i+1} = x'_i − (t_i − t_{i+1})·F̄(x'_i, t_i, t_{i+1}),   S = Σ F̄_i·(t_i − t_{i+1})
    R = [(t − r)·F − S]/Δ − v*   where t ≥ r + Δ,   else R = F − v*
    target = sg(F) − clamp(sg(R), ±κ)

On a straight flow whose velocity the teacher knows, R = 0. The clamped fraction of R is a free health signal.
"""

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.flow.conditions import Condition, Network
from twinrl.flow.transport import like
from twinrl.run import names
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, one_step, own


def recursion(x: Tensor, times: list[Tensor], c: Condition, teacher: Network) -> Tensor:
    """``S = Σ F̄_i·(t_i − t_{i+1})`` along the teacher's own jumps through ``times`` (each (B,)), from ``x``."""
    total = torch.zeros_like(x)
    for t, t_next in pairwise(times):
        jump = like(t - t_next, x) * teacher(x, t, t_next, c)
        x, total = x - jump, total + jump
    return total


def residual(
    F: Tensor,
    x_t: Tensor,
    t: Tensor,
    r: Tensor,
    c: Condition,
    v_star: Tensor,
    teacher: Network,
    order: int,
    delta: float,
) -> Tensor:
    """The RCGM residual R (B, C, H, W); see the module's formula.

    Arguments:
        F: (B, C, H, W) prediction at ``(x_t, t, r)``, detached.
        t, r: (B,) times, 0 ≤ r ≤ t ≤ 1.
        v_star: (B, C, H, W) target velocity.
        teacher: F̄.
        order: N ≥ 1 teacher jumps.
        delta: Δ, the length of the first step.
    """
    middle = torch.maximum(t - delta, r)
    times = [middle * (1 - i / order) + r * (i / order) for i in range(order + 1)]
    S = recursion(x_t - delta * v_star, times, c, teacher)
    long_enough = like(t >= r + delta, F)
    return torch.where(long_enough, (like(t - r, F) * F - S) / delta, F) - v_star


def clamped(F: Tensor, R: Tensor, kappa: float) -> Target:
    """``sg(F) − clamp(R, ±κ)`` and the clamped fraction of R."""
    fraction = (R.abs() > kappa).to(R.dtype).flatten(1).mean(1)
    return Target(F - R.clamp(-kappa, kappa), {names.CLAMP_RCGM: fraction})


class RCGMConfig(TermConfig):
    """Settings shared by the terms that build their target by recursion."""

    order: int = Field(2, ge=1, description="N: teacher jumps per target")
    delta: float = Field(0.01, gt=0, lt=1, description="Δ: length of the first step along v*")
    clamp: float = Field(1.0, gt=0, description="κ: bound of the residual, per element")


class Base(Term):
    """The RCGM base term on the rows' own point ``(x_t, t, r)``.

    *When to use*: always; it carries the consistency from which few-step generation comes. Costs N teacher
    forwards, and two more where guidance enhances the target.
    """

    class Config(RCGMConfig):
        kind: Literal["base"] = "base"

    def query(self, rows: Rows, ctx: Context) -> Query:
        return own(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        R = residual(
            F, query.x, query.t, query.r, query.c, ctx.target_velocity(rows), ctx.teacher,
            self.config.order, self.config.delta,
        )  # fmt: skip
        return clamped(F, R, self.config.clamp)


class OneStepConsistency(Base):
    """The base target at ``(z, 1, 0)`` with the v* of the rows' own point (TwinFlow's MNIST tutorial).

    *When to use*: with the whole-batch formulation, whose own points rarely come near the one-step jump.
    """

    class Config(RCGMConfig):
        kind: Literal["one_step_consistency"] = "one_step_consistency"

    def query(self, rows: Rows, ctx: Context) -> Query:
        return one_step(rows)
