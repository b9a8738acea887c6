"""A term with a mistake that only shows on a device."""

from typing import Literal

import torch

from twinrl.flow.branches import Rows
from twinrl.terms.term import Context, Query, Target, Term, TermConfig, instant


class Mixed(Term):
    """A plain velocity regression that adds a tensor of the host."""

    class Config(TermConfig):
        kind: Literal["tests.training.mixed.Mixed"] = "tests.training.mixed.Mixed"

    def query(self, rows: Rows, ctx: Context) -> Query:
        return instant(rows)

    def target(self, rows: Rows, query: Query, F: torch.Tensor, ctx: Context) -> Target:
        return Target(rows.v + torch.ones(F.shape))
