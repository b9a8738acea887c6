"""The global batch of a step: data rows, conditions, times and noise, each a function of (seed, step)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from twinrl import conditions, draws
from twinrl.branches import Batch, BatchDraws, TimeMap, divide
from twinrl.conditions import Condition
from twinrl.config import build
from twinrl.data.source import Source
from twinrl.objective import Objective
from twinrl.renoise import RENOISE, Renoise, TimeDistribution
from twinrl.schema import RunConfig


@dataclass(frozen=True)
class Feed:
    """Makes batches.

    Attributes:
        settings: the configuration.
        source: the data.
        objective: whose student makes the samples of image-free training.
        latents: (N, C, H, W) of the split, on the device.
        split: whose rows, ``train`` or ``validation``.
    """

    settings: RunConfig
    source: Source
    objective: Objective
    latents: Tensor
    split: str = "train"

    def batch(self, step: int, seed: int) -> tuple[Tensor, Batch]:
        """The rows of the split and the global batch of ``step``."""
        settings, source = self.settings, self.source
        at = draws.shuffled_rows(len(self.latents), settings.train.batch, seed, step)
        prompts = source.prompts(getattr(source, self.split).labels[at], seed, step)
        drawn = BatchDraws(seed, step, (len(at), *self.latents.shape[1:]))
        c = self._cast(source.condition(prompts))
        x = self.latents[at.to(self.latents.device)] if settings.data.images else self._generated(drawn, c)
        null = self._null(c, drawn)
        return at, divide(settings.branches, settings.time, x, c, null, drawn, tuple(prompts), self._shaped(step))

    def _shaped(self, step: int) -> dict[str, TimeMap]:
        """Placement → law of its times, where renoise shapes them."""
        law, config = self.renoise(step), self.settings.renoise
        return dict.fromkeys(config.placement, law.sample) if law and config else {}

    def renoise(self, step: int) -> TimeDistribution | None:
        """The distribution that shapes times at ``step``; None where there is no renoise."""
        if self.settings.renoise is None:
            return None
        law: Renoise = build(RENOISE, self.settings.renoise, "renoise")
        return law.at(step, self.settings.train.steps)

    def _generated(self, drawn: BatchDraws, c: Condition) -> Tensor:
        """Image-free data: the student's own one-step samples of the prompts, without gradient."""
        z = drawn.normal("image-free sample").to(self.latents)
        one = z.new_ones(len(z))
        with torch.no_grad():
            return z - self.objective.call(self.objective.teacher.student, z, one, torch.zeros_like(one), c)

    def _null(self, c: Condition, drawn: BatchDraws) -> Condition:
        n = self.settings.train.batch
        if self.settings.guidance.empty == "source":
            return self._cast(self.source.null_condition(n))
        order = drawn.uniform("null permutation").argsort()
        return conditions.rows(c, order)

    def _cast(self, c: Condition) -> Condition:
        return conditions.to(c, self.latents.device, self.latents.dtype)
