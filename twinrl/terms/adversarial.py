"""adversarial (fake velocity): the negative-time branch learns the velocity of the student's own samples.

    x_f = sg(z_f − F(z_f, 1, 0)),   F(t·z' + (1−t)·x_f, −t, −t)  against  z' − x_f

(TwinFlow, arXiv:2512.05150.) With the fake branch at hand, the difference of both branches' velocities is a
difference of scores, which :mod:`twinrl.terms.rectify` descends.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from twinrl.branches import Rows
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, one_step
from twinrl.transport import interpolate, velocity


class Adversarial(Term):
    """The fake branch's flow matching on one-step samples of the student.

    *When to use*: wherever ``rectify`` is on; without it the fake branch knows nothing. The published
    formulations differ in which noise makes the sample, which noise the path, and which time is taken.
    """

    negative_time = True

    class Config(TermConfig):
        kind: Literal["adversarial"] = "adversarial"
        sample: Literal["fresh", "shared"] = Field(
            "fresh",
            description="one-step sample from fresh noise (an extra forward), or from the rows' own noise",
        )
        path_noise: Literal["rows", "sample"] = Field(
            "rows", description="z': the rows' noise, or the noise that made the sample"
        )
        time: Literal["rows", "uniform"] = Field("rows", description="the rows' t, or a uniform one of its own")
        time_range: tuple[float, float] = Field((0.01, 0.99), description="limits of a uniform time")

        @model_validator(mode="after")
        def _ordered(self) -> "Adversarial.Config":
            low, high = self.time_range
            if not 0 <= low < high <= 1:
                raise ValueError(f"time_range {self.time_range} is no range; expected 0 ≤ lo < hi ≤ 1")
            return self

    @property
    def _point(self) -> str:
        """Terms that make their sample, path or time otherwise are evaluated elsewhere."""
        made = (self.config.sample, self.config.path_noise, self.config.time, *self.config.time_range)
        return f"fake {' '.join(map(str, made))}"

    def _noise(self, rows: Rows) -> Tensor:
        return rows.z if self.config.sample == "shared" else rows.normal("fake sample")

    def _sample(self, rows: Rows, ctx: Context) -> Tensor:
        """(B, C, H, W): ``x_f``, without gradient."""
        if self.config.sample == "shared":
            query = one_step(rows)
            return (rows.z - ctx.prediction(query, rows)).detach()
        z_f, one = self._noise(rows), torch.ones_like(rows.t)
        return z_f - ctx.student(z_f, one, torch.zeros_like(one), rows.c)

    def _time(self, rows: Rows) -> Tensor:
        if self.config.time == "rows":
            return rows.t
        return rows.uniform("fake time").clamp(*self.config.time_range)

    def _path_noise(self, rows: Rows) -> Tensor:
        return self._noise(rows) if self.config.path_noise == "sample" else rows.z

    def query(self, rows: Rows, ctx: Context) -> Query:
        t, x_f = self._time(rows), self._sample(rows, ctx)
        return Query(self._point, interpolate(x_f, self._path_noise(rows), t), -t, -t, rows.c, clean=x_f)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        assert query.clean is not None
        return Target(velocity(query.clean, self._path_noise(rows)))
