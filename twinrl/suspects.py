"""Which rows of a batch an event is about: those of a term that stand out, and those that no reward could score."""

import torch
from torch import Tensor

from twinrl.gradients import Losses
from twinrl.stability.events import NONFINITE, Event, Suspects
from twinrl.tracking import names


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


def unscored_images(of: Suspects, step: int, iteration: int) -> Event:
    """An event naming the images for which the reward gave no finite number; training went on without its pull."""
    shown = ", ".join(map(str, of.rows[:3]))
    message = f"the reward is not finite for data row {shown} at step {step}; it did not pull there"
    return Event(
        step, iteration, NONFINITE, ("reward",), of.rows, message,
        series=names.REWARD_NONFINITE, t=of.t, branches=of.branches,
    )  # fmt: skip
