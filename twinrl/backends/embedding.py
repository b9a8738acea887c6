"""What every lab network shares: how times, their sign and the condition become one vector.

The contract of a network is ``F(x_t, t, r, c)`` with t in [−1, 1] (negative = fake branch) and |r| ≤ |t|. It
has to tell (t, t) from (−t, −t), and at r = t ≥ 0 it must equal the flow-matching teacher it was initialised
from. So three embeddings are added: of the noise level |t|; of |r|, *scaled by* (|t| − |r|), zero at r = t; and
of the sign, zero for t ≥ 0. The last two start at zero, so that they enter only as they are learnt.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from twinrl.config import Settings
from twinrl.flow.conditions import Condition
from twinrl.flow.transport import like


class NetworkConfig(Settings):
    """Base of the networks' configurations: frozen, and unknown keys are errors."""


@dataclass(frozen=True)
class Spec:
    """What a network must know about its data, beside its own configuration.

    Attributes:
        latent_shape: (C, H, W) of x_t.
        text_width: D of a ``{"text": (B, D)}`` condition; None without one.
        classes: K of a ``{"label": (B,)}`` condition, None without one; the empty condition ∅ is the label K.
    """

    latent_shape: tuple[int, int, int]
    text_width: int | None = None
    classes: int | None = None

    @classmethod
    def of(cls, latent_shape: tuple[int, int, int], condition: Condition, classes: int) -> "Spec":
        """The spec of a source with this example ``condition`` (any number of rows) and K ``classes``.

        Raises:
            ValueError: the condition has neither a ``text`` nor a ``label`` entry.
        """
        if "text" in condition:
            return cls(latent_shape, text_width=condition["text"].shape[-1])
        if "label" in condition:
            return cls(latent_shape, classes=classes)
        raise ValueError(f"a condition needs an entry 'text' or 'label', got {sorted(condition)}")


class VelocityNetwork(nn.Module, ABC):
    """``F(x_t, t, r, condition) → velocity``. Subclasses give ``Config`` and :meth:`forward`.

    Arguments:
        config: an instance of the class's ``Config``.
        spec: what the data decide.
    """

    Config: ClassVar[type[NetworkConfig]] = NetworkConfig

    def __init__(self, config: Any, spec: Spec):
        super().__init__()
        self.config, self.spec = config, spec

    @abstractmethod
    def forward(self, x_bchw: Tensor, t_b: Tensor, r_b: Tensor, condition: Condition) -> Tensor:
        """Latents (B, C, H, W), t in [−1, 1] (negative = fake branch), |r| ≤ |t| → velocity (B, C, H, W)."""


def at_least_single(value_b: Tensor) -> Tensor:
    """Times in float32, or in float64 if that is what they are: half precision cannot tell t from t − Δ."""
    return value_b.to(torch.promote_types(value_b.dtype, torch.float32))


def sinusoids(value_b: Tensor, width: int, lowest: float = 0.5, highest: float = 16.0) -> Tensor:
    """(B,) values in [0, 1] → (B, width) cosines and sines, computed and returned in at least float32.

    Frequencies are geometric, from ``lowest`` to ``highest`` periods per unit. The highest stays low because
    the RCGM target differentiates the network over Δt = 0.01, where fast sinusoids would be amplified.
    """
    value_b = at_least_single(value_b)
    octaves = torch.linspace(0, 1, width // 2, dtype=value_b.dtype, device=value_b.device)
    frequency = 2 * math.pi * lowest * (highest / lowest) ** octaves
    angle = value_b[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """(t, r) → (B, width): noise level, second time scaled by (|t| − |r|), and sign of the branch.

    Arguments:
        width: of the result.
        frequencies: number of sinusoids per time; even.
    """

    def __init__(self, width: int, frequencies: int = 64):
        super().__init__()
        self.frequencies = frequencies
        self.level = _perceptron(frequencies, width)
        self.second = _perceptron(frequencies, width)
        self.sign = nn.Parameter(torch.zeros(width))
        for parameter in self.second[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, t_b: Tensor, r_b: Tensor) -> Tensor:
        """``t_b`` in [−1, 1], negative = fake branch, and ``r_b`` with |r| ≤ |t| → (B, width) in the weights' dtype."""
        with torch.autocast(t_b.device.type, enabled=False):
            t, r, dtype = at_least_single(t_b).abs(), at_least_single(r_b).abs(), self.sign.dtype
            level = self.level(sinusoids(t, self.frequencies).to(dtype))
            second = self.second(sinusoids(r, self.frequencies).to(dtype)) * (t - r).to(dtype)[:, None]
            sign = (t_b < 0).to(dtype)[:, None] * self.sign
            return level + second + sign


class ConditionEmbedding(nn.Module):
    """``{"text": (B, D)}`` or ``{"label": (B,)}`` → (B, width); the label K is the empty condition ∅.

    Text is normalised to unit variance first, so the scale of the text encoder does not matter; the zero
    vector, the lab's empty condition, stays zero.
    """

    def __init__(self, spec: Spec, width: int):
        super().__init__()
        if spec.text_width is not None:
            self.text = nn.Sequential(
                nn.LayerNorm(spec.text_width, elementwise_affine=False), nn.Linear(spec.text_width, width)
            )
        elif spec.classes is not None:
            self.label = nn.Embedding(spec.classes + 1, width)
        else:
            raise ValueError("the spec names neither a text width nor a number of classes")

    def forward(self, condition: Condition) -> Tensor:
        """A condition of B rows → (B, width)."""
        return self.text(condition["text"]) if hasattr(self, "text") else self.label(condition["label"])


class Conditioning(nn.Module):
    """Times and condition as one vector (B, width), which modulates the blocks."""

    def __init__(self, spec: Spec, width: int):
        super().__init__()
        self.time = TimeEmbedding(width)
        self.condition = ConditionEmbedding(spec, width)
        self.mix = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, t_b: Tensor, r_b: Tensor, condition: Condition) -> Tensor:
        """Times (B,), negative = fake branch, and a condition of B rows → (B, width)."""
        return self.mix(self.time(t_b, r_b) + self.condition(condition))


def gaussian_velocity(x_t: Tensor, t_b: Tensor) -> Tensor:
    """The exact velocity at (t, t) if data were N(0, I): ``(2t − 1)/(t² + (1−t)²)·x_t``, with t = |t|.

    Networks add it to their output: latents have unit variance, so they start from the best linear guess and
    need not learn to pass noise through (as the preconditioning of EDM, arXiv:2206.00364).
    """
    t = at_least_single(t_b).abs()
    return like((2 * t - 1) / (t**2 + (1 - t) ** 2), x_t) * x_t


def _perceptron(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))
