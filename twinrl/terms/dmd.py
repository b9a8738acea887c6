"""dmd: moves one-step samples by the difference of two scores, one of a second network (DMD2 without its GAN).

    x̂ = z − F(z, 1, 0),  x_τ = τ·z' + (1−τ)·sg(x̂),  Δv = v_fake(x_τ, τ) − v_real(x_τ, τ)   (no gradient)
    g = −τ·Δv / mean|x̂ − (x_τ − τ·v_real)|,   ‖F(z, 1, 0) − sg(F(z, 1, 0) + g)‖²

With x_0 = x_τ − τ·v, ``g`` is (x_0,fake − x_0,real) over DMD's normaliser (arXiv:2311.18828, eq. 7 and 8), the
direction *against* which x̂ = z − F descends. The real velocity is the teacher's. The fake one is that of a network of
this term, trained by flow matching on the student's samples, several steps for each of the student's (two time scales,
arXiv:2405.14867, section 4.2). :mod:`twinrl.terms.rectify` has the same force from one network's two branches.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.flow.transport import interpolate, like, predicted_data, velocity
from twinrl.run import names
from twinrl.terms.losses import mean_square
from twinrl.terms.term import Context, NetworkOwner, OwnerConfig, Query, Target, one_step


class DMD(NetworkOwner):
    """Distribution matching of one-step samples with a frozen teacher's score and a learned fake one.

    *When to use*: to compare TwinFlow with, whose rectify term saves this second network. ``teacher.kind: frozen``
    makes the start weights the real score, as in the paper. ``weight: 0.5`` is the paper's factor.
    """

    class Config(OwnerConfig):
        kind: Literal["dmd"] = "dmd"
        normalise: bool = Field(True, description="divide by the distance of sample and real estimate, a sample each")

    def query(self, rows: Rows, ctx: Context) -> Query:
        return one_step(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        tau = rows.time("rectify", "dmd time")
        samples = predicted_data(query.x, query.t, F)
        x_tau = interpolate(samples, rows.normal("dmd noise"), tau)
        real = ctx.teacher(x_tau, tau, tau, rows.c)
        delta_v = ctx.own(self, x_tau, tau, tau, rows.c) - real
        force = like(tau, F) * delta_v
        if self.config.normalise:
            distance = (samples - (x_tau - like(tau, F) * real)).abs().flatten(1).mean(1)
            force = force / like(distance.clamp(min=torch.finfo(F.dtype).tiny), F)
        return Target(F - force, {names.DELTA_V_RMS: delta_v.square().flatten(1).mean(1).sqrt()})

    def own_losses(self, rows: Rows, ctx: Context, update: int) -> Tensor:
        noise, other = rows.normal(f"dmd fake: start {update}"), rows.normal(f"dmd fake: noise {update}")
        tau = rows.time("fake", f"dmd fake: time {update}")
        start = torch.ones_like(tau)
        samples = predicted_data(noise, start, ctx.student(noise, start, torch.zeros_like(tau), rows.c))
        F = ctx.own(self, interpolate(samples, other, tau), tau, tau, rows.c)
        return mean_square(F, velocity(samples, other))
