"""adversarial (fake velocity): the negative-time branch learns the velocity of the student's own samples.

    x_f = sg(z_f − F(z_f, 1, 0)),   F(t·z' + (1−t)·x_f, −t, −t)  against  z' − x_f

(TwinFlow, arXiv:2512.05150.) With the fake branch at hand, the difference of both branches' velocities is a
difference of scores, which :mod:`twinrl.terms.rectify` descends.

A reward can be smuggled in here (``reward``, the route of the published RL run): its latent gradient g is added to
the target. F_fake rises by g, Δv rises, rectify lowers the generator's target by Δv, and x̂ = z − F rises: ascent by
two hops. With the loss's weight k held fixed the cotangent splits linearly into this term's part ∝ k·(F − v) and the
reward's ∝ −k·g, which is measured and clipped under the name ``reward``.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.flow.transport import interpolate, predicted_data, velocity
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, one_step

REWARD_PART = "reward"
"""Name under which the reward's part of this term is measured and clipped."""


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
        reward: Literal["one_step", "fake_row"] | None = Field(
            None,
            description="add the reward's gradient to the target (route fake_target), taken at the one-step sample, or "
            "at x̂ predicted at the fake row itself (published); null = no reward here",
        )
        reward_constant: float = Field(
            0.0, ge=0, description="add this times mean|g| to the logged loss, without gradient (published: η)"
        )

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
        if self.config.time == "uniform":
            return rows.time("fake", "fake time").clamp(*self.config.time_range)
        return rows.time("fake", "t") if "fake" in rows.renoise else rows.t

    def _path_noise(self, rows: Rows) -> Tensor:
        return self._noise(rows) if self.config.path_noise == "sample" else rows.z

    def query(self, rows: Rows, ctx: Context) -> Query:
        t, x_f = self._time(rows), self._sample(rows, ctx)
        return Query(self._point, interpolate(x_f, self._path_noise(rows), t), -t, -t, rows.c, clean=x_f)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        assert query.clean is not None
        v = velocity(query.clean, self._path_noise(rows))
        if self.config.reward is None:
            return Target(v)
        own = self.config.reward == "fake_row"
        ascent = ctx.reward(predicted_data(query.x, query.t, F) if own else query.clean, rows)
        if ascent.rests:
            return Target(v, ascent.aux)
        constant = self.config.reward_constant * ascent.g.abs().flatten(1).mean(1)
        return Target(v + ascent.g, ascent.aux, shift=ascent.g, constant=constant)

    def loss_parts(self, rows: Rows, query: Query, F: Tensor, target: Target) -> Mapping[str, Tensor]:
        """The reward's part of the loss's gradient: of k·mean((F − v − g)²), the part ∝ −g."""
        if target.shift is None:
            return {}
        weight = self.row_loss.weight(F, target.value) * self.time_weight(query)
        return {REWARD_PART: -2 * (weight * (target.shift * F).flatten(1).mean(1)).sum()}

    @classmethod
    def part_names(cls, config: Any) -> tuple[str, ...]:
        return (REWARD_PART,) if config.reward is not None else ()

    @classmethod
    def wants_reward(cls, config: Any) -> bool:
        return config.reward is not None
