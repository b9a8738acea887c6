"""mean flow: the average velocity by its own derivative along the path (MeanFlow, arXiv:2505.13447, eq. 6 and 10).

    (t − r)·F(x_t, t, r) = ∫_r^t v dτ   ⇒   F = v − (t − r)·dF/dt,   dF/dt = v·∂_x F + ∂_t F
    target = v* − (t − r)·sg(dF/dt)

The recursion of :mod:`twinrl.terms.rcgm` is the same identity over a finite step and several jumps of a teacher. Here
the student itself is differentiated.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.flow.transport import like
from twinrl.run import names
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, own


def difference(query: Query, v: Tensor, ctx: Context, width: float) -> Tensor:
    """dF/dt (B, C, H, W) from the student's predictions on both sides of ``t``, as far as r and 1 let them.

    Arguments:
        v: (B, C, H, W) velocity of the path. width: distance in time, on either side.
    """
    t, r = query.t, query.r
    later, earlier = (t + width).clamp(max=1), torch.maximum(t - width, r)
    ahead, behind = (
        ctx.student(query.x + like(at - t, v) * v, at, r, query.c) for at in (later, earlier)
    )  # fmt: skip
    apart = like(later - earlier, v)
    return torch.where(apart > 0, (ahead - behind) / apart, 0)


class MeanFlow(Term):
    """``‖F(x_t, t, r) − v* + (t − r)·dF/dt‖²``.

    *When to use*: to compare TwinFlow with; its target needs no teacher and no recursion. ``derivative: forward`` is
    exact and costs about three forward passes (forward-mode automatic differentiation). ``difference`` costs two, works
    with every network and across processes, and loses digits in bf16: its error there is a rounding over ``width``.
    """

    class Config(TermConfig):
        kind: Literal["mean_flow"] = "mean_flow"
        derivative: Literal["forward", "difference"] = Field(
            "forward", description="dF/dt by forward-mode differentiation, or from predictions on both sides of t"
        )
        width: float = Field(0.005, gt=0, lt=0.5, description="of the difference, in time on either side")

    def query(self, rows: Rows, ctx: Context) -> Query:
        return own(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        v, length = ctx.target_velocity(rows), like(query.t - query.r, F)
        exact = self.config.derivative == "forward"
        slope = ctx.derivative(query, v) if exact else difference(query, v, ctx, self.config.width)
        correction = torch.where(length > 0, length * slope, 0)
        return Target(v - correction, {names.CURVATURE_RMS: correction.square().flatten(1).mean(1).sqrt()})
