"""rectify: moves one-step samples along the difference of the real and the fake branch's scores.

    x̂ = z − F(z, 1, 0),  x_τ = τ·z' + (1−τ)·sg(x̂),  Δv = F(x_τ, −τ, −τ) − F(x_τ, τ, τ)   (no gradient)
    ‖F(z, 1, 0) − sg(F(z, 1, 0) − Δv)‖²

Descent moves x̂ along +Δv, i.e. along ``s_real − s_fake = ((1−τ)/τ)·Δv`` up to that positive factor (TwinFlow,
arXiv:2512.05150, drops it; ``score_weight`` keeps it). The loss *value* does not know Δv's sign, and under the
Barron loss hardly its size: Δv's rms is logged.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.flow.transport import interpolate, like, predicted_data
from twinrl.run import names
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, one_step, own


class Rectify(Term):
    """Distribution matching of one-step samples with the network's own two branches; no second network.

    *When to use*: with ``adversarial``, which trains the fake branch. ``point: own`` takes Δv on the real
    noisy batch itself (SimpleTuner) instead of on renoised one-step samples.
    """

    negative_time = True

    class Config(TermConfig):
        kind: Literal["rectify"] = "rectify"
        point: Literal["one_step", "own"] = Field("one_step", description="correct F(z, 1, 0), or F at (x_t, t, r)")
        clamp: float | None = Field(None, gt=0, description="bound of Δv, per element; null = none")
        score_weight: bool = Field(False, description="multiply Δv by (1−τ)/τ: the difference of scores")

    def query(self, rows: Rows, ctx: Context) -> Query:
        return one_step(rows) if self.config.point == "one_step" else own(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        x_tau, tau = self._renoised(rows, query, F)
        fake, real = ctx.both_branches(x_tau, tau, rows.c)
        delta_v = fake - real
        if self.config.score_weight:
            # a uniform τ may be exactly 0, where the factor is infinite
            delta_v = delta_v * like((1 - tau) / tau.clamp(min=torch.finfo(tau.dtype).eps), delta_v)
        kappa = self.config.clamp if self.config.clamp is not None else torch.inf
        aux = {
            names.DELTA_V_RMS: delta_v.square().flatten(1).mean(1).sqrt(),
            names.CLAMP_DELTA_V: (delta_v.abs() > kappa).to(delta_v.dtype).flatten(1).mean(1),
        }
        return Target(F - delta_v.clamp(-kappa, kappa), aux)

    def _renoised(self, rows: Rows, query: Query, F: Tensor) -> tuple[Tensor, Tensor]:
        """(x_τ, τ) at which both branches are compared."""
        if self.config.point == "own":
            return query.x, rows.t
        tau = rows.time("rectify", "renoise time")
        x_hat = predicted_data(query.x, query.t, F)
        return interpolate(x_hat, rows.normal("renoise noise"), tau), tau
