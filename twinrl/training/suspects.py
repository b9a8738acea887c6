"""Which rows of a batch an event is about: those of a term that stand out, and those that no reward could score."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twinrl.flow.branches import Batch
from twinrl.run import names
from twinrl.stability.events import UNSCORED, Suspects
from twinrl.terms.objective import Losses

TIME_DIGITS = 6  # of the times in events


@dataclass(frozen=True)
class SuspectFinder:
    """Names the rows behind trouble at one step, with their times and branches.

    Every process must ask it for the same: each knows only its own rows.

    Attributes:
        losses: of the whole step.
        data_rows: (B,) rows of the split behind the global batch.
        batch: this process's part of the global batch.
        total: the sum of a tensor over all processes.
    """

    losses: Losses
    data_rows: Tensor
    batch: Batch
    total: Callable[[Tensor], Tensor]

    def __call__(self, kind: str, term: str | None) -> Suspects:
        """The rows behind a kind of trouble in a term, or in the whole batch for None, the most conspicuous first."""
        whole = len(self.data_rows)
        at = unscored(self.losses) if kind == UNSCORED else conspicuous(self.losses, term, whole)
        rows, branches, t = self.batch.rows, list(self.batch.branch), torch.zeros(whole, 2)
        t[rows.index, 0] = rows.t.float().cpu()
        for number, of_branch in enumerate(self.batch.branch.values()):
            t[rows.index[of_branch], 1] = number
        times, numbers = self.total(t.to(rows.t.device)).cpu()[at].unbind(1)
        return Suspects(
            tuple(self.data_rows[at].tolist()),
            tuple(round(time, TIME_DIGITS) for time in times.tolist()),
            tuple(branches[int(number)] for number in numbers),
        )


def conspicuous(losses: Losses, term: str | None, size: int) -> Tensor:
    """Positions in a global batch of ``size``: rows with a non-finite loss of the term if there are any, else all of
    the term's, the largest loss first; the whole batch for no term in particular.
    """
    parts = [found[term] for found in losses if term in found] if term is not None else []
    if not parts:
        return torch.arange(size)
    per_row = torch.cat([part.per_row for part in parts]).cpu()
    rows = torch.cat([part.rows for part in parts]).cpu()
    bad = ~per_row.isfinite()
    return rows[bad] if bad.any() else rows[per_row.argsort(descending=True)]


def unscored(losses: Losses) -> Tensor:
    """Positions in the global batch of images for which the reward gave no finite number."""
    parts = [part for found in losses for part in found.values() if names.REWARD_NONFINITE in part.aux]
    at = [part.rows[part.aux[names.REWARD_NONFINITE].cpu() > 0] for part in parts]
    return torch.cat(at).cpu() if at else torch.zeros(0, dtype=torch.long)
