"""real velocity: ordinary flow matching towards the guidance-enhanced velocity, ``F(x_t, t, t)`` against ``v*``."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, instant, own


class RealVelocity(Term):
    """``‖F(x_t, t, t) − v*‖²``.

    *When to use*: to keep the instantaneous velocity of the real branch accurate, on which the rectify
    direction depends. ``point: own`` compares the prediction at the rows' own target time instead
    (SimpleTuner), ``target: path`` regresses on the plain ``z − x`` (ordinary flow matching).
    """

    class Config(TermConfig):
        kind: Literal["real_velocity"] = "real_velocity"
        point: Literal["instant", "own"] = Field("instant", description="evaluate at (x_t, t, t) or at (x_t, t, r)")
        target: Literal["enhanced", "path"] = Field("enhanced", description="v* with guidance, or the path's z − x")

    def query(self, rows: Rows, ctx: Context) -> Query:
        return own(rows) if self.config.point == "own" else instant(rows)

    def target(self, rows: Rows, query: Query, F: Tensor, ctx: Context) -> Target:
        return Target(rows.v if self.config.target == "path" else ctx.target_velocity(rows))
