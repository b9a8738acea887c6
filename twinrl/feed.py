"""The global batch of a step: data rows, conditions, times and noise, each a function of (seed, step)."""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from twinrl import conditions, draws
from twinrl.branches import Batch, BatchDraws, Rows, TimeMap, allocate, divide
from twinrl.components import checked
from twinrl.conditions import Condition
from twinrl.data.reading import Reader
from twinrl.fsdp.ranks import ALONE, Ranks
from twinrl.objective import Objective
from twinrl.renoise import RENOISE, Renoise, TimeDistribution
from twinrl.schema import RunConfig


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

    def counts(self, batch: Batch) -> dict[str, int]:
        """Rows of each branch in the global batch of which ``batch`` is a part."""
        return allocate(self.settings.branches, batch.rows.global_batch)

    def batch(self, step: int, seed: int) -> tuple[Tensor, Batch]:
        """The rows of the split behind the global batch of ``step``, and this process's rows of that batch."""
        settings, reader = self.settings, self.reader
        at = reader.rows(settings.train.batch, seed, step)
        prompts, c = reader.captioned(at, seed, step)
        drawn = BatchDraws(seed, step, (len(at), *reader.shape(at)))
        x = reader.latents(at)
        null = self._null(c, drawn)
        whole = divide(settings.branches, settings.time, x, c, null, drawn, tuple(prompts), self._shaped(step))
        batch = self.ranks.share(whole)
        return at, batch if settings.data.images else Batch(self._generated(batch.rows), batch.branch)

    def renoise_times(self, seed: int, moments: int = 6, rows: int = 2000) -> dict[float, Tensor]:
        """Share of the run → (rows,) renoise times drawn there, for a picture; empty where there is no renoise."""
        last = self.settings.train.steps - 1
        shares = [i / (moments - 1) for i in range(moments)]
        laws = {share: self.renoise(round(share * last)) for share in shares}
        u = draws.uniform((rows,), seed, "renoise picture")
        return {share: _times(law, u) for share, law in laws.items() if law is not None}

    def _shaped(self, step: int) -> dict[str, TimeMap]:
        """Placement → law of its times, where renoise shapes them."""
        law, config = self.renoise(step), self.settings.renoise
        return dict.fromkeys(config.placement, partial(_times, law)) if law and config else {}

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

    def _null(self, c: Condition, drawn: BatchDraws) -> Condition:
        if self.settings.guidance.empty == "source":
            return self.reader.null(conditions.size(c))
        order = drawn.uniform("null permutation").argsort()
        return conditions.rows(c, order)


def _times(law: TimeDistribution, u: Tensor) -> Tensor:
    """(B,) times of (B,) uniforms."""
    return checked(law.sample(u), Tensor, law, "sample", u.shape)
