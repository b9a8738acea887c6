"""The global batch of a step: data rows, conditions, times and noise, each a function of (seed, step)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from twinrl.config.components import checked, wrong_return
from twinrl.flow import conditions, draws
from twinrl.flow.branches import Batch, BatchDraws, Rows, allocate, divide, selection, shared
from twinrl.flow.conditions import Condition
from twinrl.flow.reading import ALL, Reader
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.renoise import RENOISE, Renoise, TimeDistribution
from twinrl.terms.objective import Objective
from twinrl.training.schema import RunConfig


class Fed(NamedTuple):
    """What a step is fed.

    Attributes:
        data_rows: (B,) rows of the split behind the global batch.
        batch: this process's rows of the global batch.
        counts: rows of each branch in the global batch.
        renoise: the distribution that shapes times; None where there is no renoise.
    """

    data_rows: Tensor
    batch: Batch
    counts: Mapping[str, int]
    renoise: TimeDistribution | None


@dataclass(frozen=True)
class Feed:
    """Makes batches.

    Attributes:
        settings: the configuration.
        reader: gives rows of the split.
        objective: whose student makes the samples of image-free training.
        ranks: who shares the batch.

    Raises:
        InputError: a branch would be left without rows in a batch of the data, or with rows that the ranks cannot
            share equally.
    """

    settings: RunConfig
    reader: Reader
    objective: Objective
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        for size in self.reader.sizes(self.settings.train.batch):
            self.ranks.check_shares(allocate(self.settings.branches, size))

    def batch(self, step: int, seed: int) -> Fed:
        """The batch of ``step``."""
        settings, reader = self.settings, self.reader
        at = reader.rows(settings.train.batch, seed, step)
        mine = self._mine(len(at))
        keep = ALL if mine is None else selection(mine)
        drawn = BatchDraws(seed, step, (len(at), *reader.shape(at)), settings.train.draws == "rows")
        prompts, c = reader.captioned(at, seed, step, keep)
        null, law = self._null(at, keep, c, drawn), self.renoise(step)
        shaped = dict.fromkeys(settings.renoise.placement, partial(_times, law)) if law and settings.renoise else {}
        x = reader.latents(at[keep])
        batch = divide(settings.branches, settings.time, x, c, null, drawn, tuple(prompts), shaped, mine)
        batch = batch if settings.data.images else Batch(self._generated(batch.rows), batch.branch)
        return Fed(at, batch, allocate(settings.branches, len(at)), law)

    def _mine(self, size: int) -> list[int] | None:
        """This process's rows of a global batch; None: all."""
        world = self.ranks.world
        return None if world == 1 else shared(self.settings.branches, size, world, self.ranks.rank)

    def renoise_times(self, seed: int, moments: int = 6, rows: int = 2000) -> dict[float, Tensor]:
        """Share of the run → (rows,) renoise times drawn there, for a picture; empty where there is no renoise."""
        last = self.settings.train.steps - 1
        shares = [i / (moments - 1) for i in range(moments)]
        laws = {share: self.renoise(round(share * last)) for share in shares}
        u = draws.uniform((rows,), seed, "renoise picture")
        return {share: _times(law, u) for share, law in laws.items() if law is not None}

    def renoise(self, step: int) -> TimeDistribution | None:
        """The distribution that shapes times at ``step``; None where there is no renoise."""
        if self.settings.renoise is None:
            return None
        law: Renoise = RENOISE.build(self.settings.renoise)
        found = law.at(step, self.settings.train.steps)
        return checked(found, TimeDistribution, law, "at")  # type: ignore[type-abstract]

    def _generated(self, rows: Rows) -> Rows:
        """Image-free: the rows with the student's own one-step samples of the prompts as data, without gradient."""
        z = rows.normal("image-free sample")
        one = z.new_ones(len(z))
        with torch.no_grad():
            F = self.objective.call(self.objective.teacher.student, z, one, torch.zeros_like(one), rows.c)
        return replace(rows, x=z - F)

    def _null(self, at: Tensor, keep: Tensor | slice, c: Condition, drawn: BatchDraws) -> Condition:
        if self.settings.guidance.empty == "source":
            return self.reader.null(conditions.size(c))
        order = drawn.uniform("null permutation").argsort()
        if len(order) == conditions.size(c):
            return conditions.rows(c, order)
        return self.reader.captioned(at, drawn.seed, drawn.step, order[keep])[1]


def _times(law: TimeDistribution, u: Tensor) -> Tensor:
    """(B,) times of (B,) uniforms."""
    times = checked(law.sample(u), Tensor, law, "sample", u.shape)
    if times.dtype != u.dtype:
        raise wrong_return(times, law, "sample", f"{u.dtype}, as of its argument")
    if times.device.type == "cpu" and not ((times >= 0) & (times <= 1)).all():  # elsewhere a look would be a wait
        raise wrong_return(times, law, "sample", "times in [0, 1]")
    return times
