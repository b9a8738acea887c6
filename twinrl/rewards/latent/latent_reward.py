"""``LatentReward``: from latents and a reward model to an ascent direction in the latent space."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from pydantic import Field, model_validator
from torch import Tensor

from twinrl.config import Settings, component
from twinrl.config.components import Registry, checked
from twinrl.config.errors import InputError
from twinrl.flow.returned import check_aux
from twinrl.flow.transport import like
from twinrl.rewards.latent.autograd import Autograd
from twinrl.rewards.latent.contract import Codec, Estimate, LatentEstimator, PixelEstimator, RewardFunction, RowDraws
from twinrl.rewards.latent.exact import VaeBackprop, exact_gradient
from twinrl.rewards.latent.finite_difference import Antithetic, Orthogonal, RandomDirection
from twinrl.rewards.latent.projection import Baseline, project, round_trip
from twinrl.rewards.latent.spsa import Spsa
from twinrl.run import names

ESTIMATORS: Registry[PixelEstimator | LatentEstimator] = Registry(
    "gradient estimator",
    (PixelEstimator, LatentEstimator),
    {
        "autograd": Autograd,
        "random_direction": RandomDirection,
        "antithetic": Antithetic,
        "orthogonal": Orthogonal,
        "spsa": Spsa,
        "vae_backprop": VaeBackprop,
    },
)
"""Estimators of the gradient by name."""

if TYPE_CHECKING:
    EstimatorConfig: TypeAlias = Any
else:
    EstimatorConfig = component(ESTIMATORS)


class LatentRewardConfig(Settings):
    """How a reward becomes an ascent direction."""

    estimator: EstimatorConfig = Field(
        default="autograd", validate_default=True, description=f"gradient estimator: {', '.join(ESTIMATORS)}"
    )
    eta: float = Field(0.05, gt=0, allow_inf_nan=False, description="η: length of the step along the gradient")
    baseline: Baseline | None = Field(
        None, description="projection's zero point: decoded (the default) = E(D(z)), latent = z (published)"
    )
    chunk: int | None = Field(None, ge=1, description="images decoded, scored and encoded at once; null = all")

    @model_validator(mode="after")
    def _baseline_has_an_effect(self) -> "LatentRewardConfig":
        kind = self.estimator.kind
        if self.baseline and issubclass(ESTIMATORS.find(kind), LatentEstimator):
            raise ValueError(f"baseline has no effect with estimator {kind}, which does not encode; fix: remove it")
        return self


@dataclass(frozen=True)
class LatentGradient:
    """Ascent directions, one for each image.

    Attributes:
        g: (B, C, h, w); η times the estimated gradient, or its projection.
        scores: (B,) rewards of the images D(z).
        aux: metric name → (B,) values per image.
    """

    g: Tensor
    scores: Tensor
    aux: dict[str, Tensor]

    @property
    def finite(self) -> Tensor:
        """(B,) of which images score and gradient are finite; the others' values stand as they are."""
        return self.scores.isfinite() & self.g.flatten(1).isfinite().all(1)


def sum_of(parts: Sequence[LatentGradient]) -> LatentGradient:
    """The ascent of a sum of rewards of the same images; its norm is its own, what else is logged the first one's."""
    g = torch.stack([part.g for part in parts]).sum(0)
    scores = torch.stack([part.scores for part in parts]).sum(0)
    return LatentGradient(g, scores, parts[0].aux | {names.REWARD_GRAD_NORM: _norm(g)})


class LatentReward:
    """Gradients of rewards with respect to latents.

    All gradients are scaled by η: g ≈ η·∇_z R(D(z)), so that estimators can be exchanged and x̂ + g is one step of
    gradient ascent. Rows are independent of each other and of ``chunk``.

    *When to use*: in a generator loss ‖x̂ − sg(x̂ + g)‖² (plain l2; a robust loss would erase |g|), or added to the
    target of the fake velocity.

    Arguments:
        config: estimator and its parameters.
    """

    Config = LatentRewardConfig

    def __init__(self, config: LatentRewardConfig):
        self.config = config
        self.estimator: PixelEstimator | LatentEstimator = ESTIMATORS.build(config.estimator)
        self.baseline: Baseline = config.baseline or "decoded"

    def gradient(
        self, z: Tensor, prompts: Sequence[str], codec: Codec, reward: RewardFunction, rows: RowDraws
    ) -> LatentGradient:
        """The ascent direction at ``z``; nothing carries a graph.

        Arguments:
            z: (B, C, h, w) latents.
            prompts: B prompts.
            codec: decoder and encoder.
            reward: what is to rise.
            rows: keyed random numbers of these images (:class:`~twinrl.rewards.latent.contract.KeyedRows`).

        Raises:
            InputError: another number of prompts, a reward that cannot be differentiated but has to be, or one
                that does not return (B,) scores.
        """
        _check(z, prompts)
        size, z = self.config.chunk or max(len(z), 1), z.detach()
        slices = [(start, min(start + size, len(z))) for start in range(0, len(z), size)]
        parts = [self._chunk(z[i:j], prompts[i:j], codec, reward, rows.rows(i, j)) for i, j in slices]
        aux = {name: torch.cat([part.aux[name] for part in parts]) for name in parts[0].aux}
        return LatentGradient(torch.cat([p.g for p in parts]), torch.cat([p.scores for p in parts]), aux)

    def _chunk(
        self, z: Tensor, prompts: Sequence[str], codec: Codec, reward: RewardFunction, rows: RowDraws
    ) -> Estimate:
        if isinstance(self.estimator, LatentEstimator):
            found = self.estimator.latent_gradient(z, prompts, codec, reward, rows)
            self._check(found, z, "latent_gradient")
            g, aux = self.config.eta * found.g, dict(found.aux)
        else:
            with torch.no_grad():
                y = codec.decode(z)
            found = self.estimator.pixel_gradient(y, prompts, reward, rows)
            self._check(found, y, "pixel_gradient")
            projected = project(codec, z, y, found.g, self.config.eta, self.baseline)
            g, aux = projected.g, dict(found.aux)
            if projected.round_trip is not None:
                aux[names.REWARD_ROUNDTRIP] = _rms(z - projected.round_trip)
        return Estimate(g, found.scores, aux | {names.REWARD_GRAD_NORM: _norm(g)})

    def _check(self, found: Estimate, at: Tensor, method: str) -> None:
        """Raises InputError where an estimate is not one for the images ``at`` (B, ...)."""
        checked(found, Estimate, self.estimator, method)
        checked(found.g, Tensor, self.estimator, f"{method}.g", at.shape)
        checked(found.scores, Tensor, self.estimator, f"{method}.scores", at.shape[:1])
        check_aux(found.aux, len(at), self.estimator, f"{method}.aux")

    def compare(
        self, found: LatentGradient, z: Tensor, prompts: Sequence[str], codec: Codec, reward: RewardFunction
    ) -> dict[str, Tensor]:
        """How good the gradient ``found`` at ``z`` is: (B,) metrics per image, for the price of an exact gradient.

        Returns:
            cosine to the exact gradient, ratio of the norms (1 = η times the exact one), and the rms of the
            autoencoder's round-trip error z − E(D(z)).

        Raises:
            InputError: the reward is not differentiable, so that there is no exact gradient.

        *When to use*: every few hundred steps, to see whether a reward's gradient still means something.
        """
        _check(z, prompts)
        size, z = self.config.chunk or max(len(z), 1), z.detach()
        slices = [slice(start, start + size) for start in range(0, len(z), size)]
        exact = torch.cat([exact_gradient(z[part], prompts[part], codec, reward).g for part in slices])
        with torch.no_grad():
            back = torch.cat([round_trip(codec, codec.decode(z[part])) for part in slices])
        return {
            names.REWARD_GRAD_COSINE: cosine(found.g, exact),
            names.REWARD_GRAD_NORM_RATIO: _norm(found.g) / (self.config.eta * _norm(exact)),
            names.REWARD_ROUNDTRIP: _rms(z - back),
        }


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(B,) cosines between the rows of two (B, ...) tensors; NaN where one is zero (no direction, no cosine)."""
    unit_a, unit_b = (v / like(_norm(v), v) for v in (a, b))
    return (unit_a * unit_b).flatten(1).sum(1)


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _rms(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1).sqrt()


def _check(z: Tensor, prompts: Sequence[str]) -> None:
    if len(z) == 0 or len(prompts) != len(z):
        raise InputError(
            "a reward needs images and one prompt for each", got=f"{len(z)} images, {len(prompts)} prompts"
        )
