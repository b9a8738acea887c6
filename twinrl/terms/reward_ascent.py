"""reward: moves one-step samples uphill (the route ``generator``).

    x̂ = z − F(z, 1, 0),   g ≈ η·∇_x̂ R(D(x̂), prompt)   (no gradient)
    ‖x̂ − sg(x̂ + g)‖² = ‖F − sg(F − g)‖²

An ensemble's members may have their gradients apart, g = Σ g_i: each then has norms, rules and a share of its own.

Descent moves x̂ along +g. The loss is the plain mean square: under Barron's the gradient would have the same norm
whatever |g|. How g is estimated is the business of :mod:`twinrl.rewards`; its weight over training is in ``reward``.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, one_step


def part_of(member: str) -> str:
    """Name of the gradient of an ensemble's member."""
    return f"reward_{member}"


class RewardAscent(Term):
    """The reward's latent gradient on one-step samples.

    *When to use*: to add a preference to a method that trains one-step samples anyway (``rectify``): the forward
    pass is shared. The other route is ``terms.adversarial.reward``.
    """

    class Config(TermConfig):
        kind: Literal["reward"] = "reward"
        apart: tuple[str, ...] = Field(
            (), description="members of the ensemble reward.model whose gradients are taken apart, as reward_<member>"
        )

        @model_validator(mode="after")
        def _size_of_the_gradient_survives(self) -> "RewardAscent.Config":
            if self.loss.kind != "l2":
                raise ValueError(f"loss {self.loss.kind} would erase the size of the reward's gradient; fix: use l2")
            return self

    def query(self, rows: Rows, ctx: Context) -> Query:
        return one_step(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        ascent = ctx.reward(query.x - F, rows, self.config.apart)
        shifts = {part_of(name): -g for name, g in ascent.parts.items()}
        return Target(F - ascent.g, ascent.aux, shifts=shifts, rests=ascent.rests)

    def loss_parts(self, rows: Rows, query: Query, F: Tensor, target: Target) -> Mapping[str, Tensor]:
        """Of mean((F − sg(F − Σ g_i))²) the part of each member, whose gradient is ∝ g_i."""
        weight = self.row_loss.weight(F, target.value) * self.time_weight(query)
        return {name: -2 * (weight * (shift * F).flatten(1).mean(1)).sum() for name, shift in target.shifts.items()}

    @classmethod
    def part_names(cls, config: Any) -> tuple[str, ...]:
        return tuple(map(part_of, config.apart))

    @classmethod
    def wants_reward(cls, config: Any) -> bool:
        return True
