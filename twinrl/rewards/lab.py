"""Rewards that come with a data source: a laboratory's text–image models, MNIST's judge.

    R(y, c) = cos(image(y), text(c))   for a laboratory's three (see :mod:`twinrl.lab.clip`)

The models belong to the source, which loads, moves and identifies them; here they only become rewards. They take the
source's own pixels, (B, 3, 32, 32) of digits. One grey channel is repeated three times; another size is refused.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.lab.digits import SIDE
from twinrl.rewards.reward import WITHOUT_SOURCE, Reward, RewardContext, check_batch


class SourceScorer(Reward):
    """A scorer of the data source, under the scorer's name.

    Raises:
        InputError: the source has no such scorer, or training asks for one that is held out.
    """

    def __init__(self, config: Settings, context: RewardContext = WITHOUT_SOURCE):
        super().__init__(config, context)
        name = self.config.kind
        if name not in context.scorers:
            known = ", ".join(context.scorers) or "none"
            raise InputError(f"{context.key}: the data source has no scorer {name}", got=f"scorers: {known}")
        if context.training and name in context.held_out:
            free = [other for other in context.scorers if other not in context.held_out]
            raise InputError(
                f"{context.key}: {name} judges the result, training must not see it",
                expected=f"one of {', '.join(free)}" if free else "another reward",
            )
        self.scorer = context.scorers[name]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_batch(images, prompts, self.needs_prompts)
        return self.scorer(images, prompts)


class LabScorer(SourceScorer):
    """One of a laboratory's text–image models, which see pixels of its size in three channels."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_batch(images, prompts, self.needs_prompts)
        side = getattr(self.scorer, "side", SIDE)
        if images.shape[-2:] != (side, side):
            size = "×".join(map(str, images.shape[-2:]))
            raise InputError(f"{self.context.key}: {self.config.kind} takes {side}×{side} pixels", got=size)
        return self.scorer(images.expand(-1, 3, -1, -1), prompts)


class LabClip(LabScorer):
    """Plain CLIP: do image and caption agree? Says little about quality."""

    class Config(Settings):
        kind: Literal["lab_clip"] = "lab_clip"


class LabHPS(LabScorer):
    """CLIP fine-tuned on preferences (clean over degraded pictures), as HPSv2 was. *The* reward of the lab."""

    class Config(Settings):
        kind: Literal["lab_hps"] = "lab_hps"


class LabJudge(LabScorer):
    """Preference model trained apart, with another seed and width. Held out: it judges, training never sees it."""

    class Config(Settings):
        kind: Literal["lab_judge"] = "lab_judge"


class JudgeLogProbability(SourceScorer):
    """MNIST's held-out judge: log-probability of the digit that the prompt names."""

    class Config(Settings):
        kind: Literal["judge_logprob"] = "judge_logprob"


class ClassifierLogProbability(SourceScorer):
    """MNIST's reward: log-probability of the digit that the prompt names, by a classifier that is not the judge."""

    class Config(Settings):
        kind: Literal["classifier_logprob"] = "classifier_logprob"
