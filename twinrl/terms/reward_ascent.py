"""reward: moves one-step samples uphill (the route ``generator``).

    x̂ = z − F(z, 1, 0),   g ≈ η·∇_x̂ R(D(x̂), prompt)   (no gradient)
    ‖x̂ − sg(x̂ + g)‖² = ‖F − sg(F − g)‖²

Descent moves x̂ along +g. The loss is the plain mean square: under Barron's the gradient would have the same norm
whatever |g|. How g is estimated is the business of :mod:`twinrl.rewards`; its weight over training is in ``reward``.
"""

from typing import Any, Literal

from pydantic import model_validator
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, one_step


class RewardAscent(Term):
    """The reward's latent gradient on one-step samples.

    *When to use*: to add a preference to a method that trains one-step samples anyway (``rectify``): the forward
    pass is shared. The other route is ``terms.adversarial.reward``.
    """

    class Config(TermConfig):
        kind: Literal["reward"] = "reward"

        @model_validator(mode="after")
        def _size_of_the_gradient_survives(self) -> "RewardAscent.Config":
            if self.loss.kind != "l2":
                raise ValueError(f"loss {self.loss.kind} would erase the size of the reward's gradient; fix: use l2")
            return self

    def query(self, rows: Rows, ctx: Context) -> Query:
        return one_step(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        ascent = ctx.reward(query.x - F, rows)
        return Target(F - ascent.g, ascent.aux, rests=ascent.rests)

    @classmethod
    def wants_reward(cls, config: Any) -> bool:
        return True
