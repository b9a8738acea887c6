"""Every estimator with every baseline goes uphill, for every image; the exact one is exact."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rewards.latent.toys import PROMPTS, Brightness, Toy, latent_reward, latents
from tests.rounding import assert_rounded
from twinrl.flow.transport import like
from twinrl.rewards.latent import KeyedRows
from twinrl.rewards.latent.projection import project
from twinrl.run import names

ROWS = KeyedRows(0, 0, tuple(range(len(PROMPTS))))
PIXELS = 3 * 8 * 8
PIXEL: list[dict[str, Any]] = [
    {"kind": "autograd"},
    {"kind": "random_direction", "directions": 64},
    {"kind": "random_direction", "directions": 64, "epsilon": 0.05, "quantise": True},
    {"kind": "antithetic", "directions": 64, "epsilon": 0.1},
    {"kind": "orthogonal", "directions": 64},
]
LATENT: list[dict[str, Any]] = [{"kind": "spsa", "directions": 32}, {"kind": "vae_backprop"}]
CASES = [(e, b) for e in PIXEL for b in ("decoded", "latent")] + [(e, None) for e in LATENT]


def rise(z: Tensor, g: Tensor, step: float) -> Tensor:
    """(B,) change of the reward by a step of this length along ``g``."""
    codec, reward = Toy(), Brightness()
    moved = z + step * g / like(g.flatten(1).norm(dim=1), g)
    return reward(codec.decode(moved), PROMPTS) - reward(codec.decode(z), PROMPTS)


@pytest.mark.parametrize(("estimator", "baseline"), CASES)
def test_ascends(estimator: dict[str, Any], baseline: str | None) -> None:
    """R(D(z + step·g)) rises and R(D(z − step·g)) falls for each image, so a flipped sign fails."""
    z = latents()
    found = latent_reward(estimator, baseline=baseline, eta=30.0).gradient(z, PROMPTS, Toy(), Brightness(), ROWS)
    assert found.g.shape == z.shape
    assert (rise(z, found.g, 0.2) > 0).all()
    assert (rise(z, found.g, -0.2) < 0).all()


def test_scores_are_those_of_the_images() -> None:
    z, codec, reward = latents(), Toy(), Brightness()
    expected = reward(codec.decode(z), PROMPTS)
    for estimator in [e for e in PIXEL if not e.get("quantise")] + LATENT:
        found = latent_reward(estimator).gradient(z, PROMPTS, codec, reward, ROWS)
        assert_rounded(found.scores, expected, roundings=PIXELS)


def test_exact_gradient_is_the_derivative() -> None:
    """Cutting the chain at the image changes nothing; η scales it."""
    z, codec, reward = latents().double(), Toy(), Brightness()
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reward(codec.decode(leaf), PROMPTS).sum(), leaf)
    found = latent_reward("vae_backprop", eta=0.5).gradient(z, PROMPTS, codec, reward, ROWS)
    torch.testing.assert_close(found.g, 0.5 * expected, rtol=1e-9, atol=0)
    assert not found.g.requires_grad


def test_projection_of_a_small_step_is_the_encoder_s_derivative() -> None:
    """g_z → η·J_E·g_y as η → 0 (in float64, where the difference of two encodings keeps its digits)."""
    codec, z = Toy(), latents().double()
    y = codec.decode(z)
    g_y = torch.sin(7 * y)
    _, expected = torch.func.jvp(codec.encode, (y,), (g_y,))
    eta = 1e-6
    torch.testing.assert_close(project(codec, z, y, g_y, eta, "decoded").g / eta, expected, rtol=1e-6, atol=1e-6)


def test_comparison_with_the_exact_gradient() -> None:
    z, codec, reward = latents().double(), Toy(), Brightness()
    exact = latent_reward("vae_backprop", eta=2.0, chunk=4)
    measured = exact.compare(exact.gradient(z, PROMPTS, codec, reward, ROWS), z, PROMPTS, codec, reward)
    torch.testing.assert_close(measured[names.REWARD_GRAD_COSINE], torch.ones(len(z)).double())
    torch.testing.assert_close(measured[names.REWARD_GRAD_NORM_RATIO], torch.ones(len(z)).double())
    error = z - codec.encode(codec.decode(z))
    torch.testing.assert_close(measured[names.REWARD_ROUNDTRIP], error.square().mean((1, 2, 3)).sqrt())


def test_more_directions_are_better() -> None:
    z, codec, reward = latents(), Toy(), Brightness()

    def mean_cosine(directions: int) -> float:
        chosen = latent_reward({"kind": "random_direction", "directions": directions}, eta=1.0)
        found = chosen.gradient(z, PROMPTS, codec, reward, ROWS)
        return float(chosen.compare(found, z, PROMPTS, codec, reward)[names.REWARD_GRAD_COSINE].mean())

    assert mean_cosine(4) < mean_cosine(32) < mean_cosine(512)
