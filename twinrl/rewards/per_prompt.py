"""Normalisation within a prompt: scores compare only among images of one prompt, so only their spread should count.

    R'(y, c) = (R(y, c) − m_c) / (s_c + ε)

Mean m_c and standard deviation s_c are those of the scores that :meth:`PerPrompt.observe` has seen of c, older ones
discounted by ``decay`` each time c is observed; ``decay: 0`` leaves the latest batch alone, which is GRPO's advantage
(Shao et al., arXiv:2402.03300) if the batch is observed before it is scored. Training observes the samples of a step
after it, those of all micro-batches and processes together, so a step is normalised by the steps before it; a score
that is not finite is left out, and the step logs it. The statistics are constants to the gradient,
∂R'/∂y = ∂R/∂y / (s_c + ε): prompts on which the model's images differ much pull less, and m_c pulls nowhere. Scoring
itself changes nothing and treats each image for itself, so finite differences are those of one function.

A prompt with fewer than ``least`` (discounted) images uses the statistics of all prompts together; while those are
fewer too, scores are returned as they are (m = 0, s = 1 and no ε).

With N discounted images of mean μ and variance v, n new ones of mean μ' and variance v', and W = dN + n:
μ ← (dN·μ + n·μ')/W, v ← (dN·v + n·v')/W + dN·n·(μ' − μ)²/W², N ← W, which for d = 1 is the exact mean and variance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from twinrl.config import Settings, stored
from twinrl.config.errors import InputError
from twinrl.machine.moving import moved
from twinrl.rewards.ensemble import Composite
from twinrl.rewards.reward import WITHOUT_SOURCE, Keeper, RewardContext, RewardSettings, build_part


@dataclass(frozen=True)
class Statistics:
    """Of a prompt's scores.

    Attributes:
        count: images, discounted.
        mean: discounted mean.
        variance: discounted variance.
    """

    count: Annotated[FiniteFloat, Field(ge=0)] = 0.0
    mean: FiniteFloat = 0.0
    variance: Annotated[FiniteFloat, Field(ge=0)] = 0.0

    def updated(self, scores: Tensor, decay: float) -> "Statistics":
        """With new scores (n,), n ≥ 1."""
        old, n = decay * self.count, len(scores)
        total, step = old + n, scores.mean().item() - self.mean
        variance = (old * self.variance + n * scores.var(correction=0).item()) / total + old * n * (step / total) ** 2
        return Statistics(total, self.mean + n * step / total, variance)


class PerPrompt(Composite):
    """A reward normalised within each prompt.

    *When to use*: prompts recur over steps, as classes or a list of prompts do; with several images of each prompt in
    a step ``decay: 0, least: 2`` follows the model fastest. Values have no scale of their own afterwards: the inner
    reward is logged as ``reward/mean_of_<part>``. It costs one more decoding and forward pass of the inner reward.

    Raises:
        InputError: it is to judge and not to be followed, where it would have no statistics.
    """

    class Config(Settings):
        kind: Literal["per_prompt"] = "per_prompt"
        reward: RewardSettings = Field(description="the inner reward, by kind")
        decay: float = Field(0.99, ge=0, le=1, description="factor of old observations; 0 = the latest batch alone")
        least: float = Field(8, ge=2, description="discounted images before a prompt has its own statistics")
        epsilon: float = Field(1e-4, gt=0, description="added to the standard deviation")

    def __init__(self, config: Any, context: RewardContext = WITHOUT_SOURCE):
        if not context.training and not context.key.startswith(
            "reward.model"
        ):  # validation shows that one's inner score
            raise InputError(
                "per_prompt normalises by scores seen in training, which a reward that only judges never sees",
                got=context.key,
                fix="judge by its inner reward",
            )
        super().__init__(config, context, {"reward": build_part(config.reward, context, "reward")})
        self.needs_prompts = True
        self.known: dict[str, Statistics] = {}
        self.pooled = Statistics()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        scores = self.observed(images, prompts)
        constants = torch.tensor([self._constants(prompt) for prompt in prompts], dtype=scores.dtype)
        mean, scale = moved(constants, scores.device).T
        return (scores - mean) / scale

    def _constants(self, prompt: str) -> tuple[float, float]:
        """Mean and scale of a prompt."""
        own = self.known.get(prompt, Statistics())
        statistics = own if own.count >= self.config.least else self.pooled
        if statistics.count < self.config.least:
            return 0.0, 1.0
        return statistics.mean, statistics.variance**0.5 + self.config.epsilon

    def keepers(self) -> dict[str, Keeper]:
        return {"reward": self} | super().keepers()

    def observed(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,) scores of the inner reward."""
        return self.parts["reward"](images, prompts)

    def observe(self, scores: Tensor, prompts: Sequence[str]) -> None:
        """Take scores (B,) of the inner reward into the statistics.

        Raises:
            ValueError: a score is not finite, which would stay in the statistics for good.
        """
        scores = scores.detach().double().cpu()
        if not scores.isfinite().all():
            raise ValueError("per_prompt cannot take non-finite scores into its statistics")
        self.pooled = self.pooled.updated(scores, self.config.decay)
        for prompt, rows in _groups(prompts).items():
            self.known[prompt] = self.known.get(prompt, Statistics()).updated(scores[rows], self.config.decay)

    def state(self) -> dict[str, Any]:
        return {
            "known": {prompt: asdict(statistics) for prompt, statistics in self.known.items()},
            "pooled": asdict(self.pooled),
            "parts": super().state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.known = {prompt: stored.made(Statistics, values) for prompt, values in state["known"].items()}
        self.pooled = stored.made(Statistics, state["pooled"])
        super().load(state["parts"])


def _groups(prompts: Sequence[str]) -> dict[str, list[int]]:
    """Rows of each distinct prompt."""
    groups: dict[str, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(row)
    return groups
