"""The estimators obey their first-order laws, by simulation with bands of five standard errors."""

import pytest
import torch
from torch import Tensor

from tests.rewards.latent.toys import Identity, Linear, Stream, latent_reward
from twinrl.rewards.latent.differences import along
from twinrl.rewards.latent.directions import gaussian, orthonormal, rademacher
from twinrl.run import names

IMAGES = 3000
KINDS = {"random_direction": "gaussian", "antithetic": "gaussian", "orthogonal": "orthonormal", "spsa": "rademacher"}
SIZES = [(12, 1), (12, 4), (48, 1), (48, 8), (192, 4)]


def norm_inflation(law: str, dimensions: int, directions: int) -> float:
    """E‖ĝ‖²/‖g‖², as :mod:`twinrl.rewards.latent.directions` states it; to the power −½ the alignment."""
    if law == "orthonormal":
        return dimensions / directions
    return 1 + (dimensions + (1 if law == "gaussian" else -1)) / directions


def estimates(kind: str, dimensions: int, directions: int) -> tuple[Tensor, Tensor]:
    """(IMAGES, D) estimates of the gradient a (D,), |a| = 1, of a linear reward; pixels are latents."""
    shape = (3, dimensions // 3, 1)
    reward, z = Linear(shape), torch.zeros(IMAGES, *shape, dtype=torch.float64)
    chosen = latent_reward({"kind": kind, "directions": directions, "epsilon": 1e-3}, eta=1e-3)
    found = chosen.gradient(z, ("",) * IMAGES, Identity(), reward, Stream(IMAGES))
    return found.g.flatten(1) / 1e-3, reward.a.flatten()


@pytest.mark.parametrize(("dimensions", "directions"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_bias_norm_and_cosine(kind: str, dimensions: int, directions: int) -> None:
    g, a = estimates(kind, dimensions, directions)
    law = KINDS[kind]

    along_a = g @ a
    assert along_a.mean() == pytest.approx(1, abs=5 * float(along_a.std()) / IMAGES**0.5)  # unbiased
    across = g.mean(0) - along_a.mean() * a
    assert across.abs().max() < 5 * g.std(0).max() / IMAGES**0.5

    square = g.square().sum(1)
    error = 5 * float(square.std()) / IMAGES**0.5 + 1e-9
    assert square.mean() == pytest.approx(norm_inflation(law, dimensions, directions), abs=error)

    cosine_square = (along_a / g.norm(dim=1)).square()
    rms, expected = float(cosine_square.mean().sqrt()), norm_inflation(law, dimensions, directions) ** -0.5
    error = 5 * float(cosine_square.std()) / IMAGES**0.5 / (2 * rms)
    assert rms == pytest.approx(expected, abs=error + (0 if law == "orthonormal" else expected / dimensions))


def test_orthogonal_directions_as_many_as_dimensions_are_the_gradient() -> None:
    g, a = estimates("orthogonal", 12, 12)
    torch.testing.assert_close(g, a.expand_as(g), rtol=1e-6, atol=1e-6)


def test_numbers_that_the_documentation_quotes() -> None:
    dimensions = 3 * 1328**2
    assert norm_inflation("gaussian", dimensions, 4) ** -0.5 == pytest.approx(8.7e-4, rel=2e-3)
    assert norm_inflation("gaussian", dimensions, 4) ** 0.5 == pytest.approx(1150, rel=1e-3)


@pytest.mark.parametrize("directions", [gaussian, rademacher, orthonormal])
def test_directions_are_isotropic_with_unit_variance(directions) -> None:
    x = torch.zeros(8000, 3, 2, 1, dtype=torch.float64)
    drawn = torch.stack([d.flatten(1) for d in directions(Stream(len(x)), x, 3)])  # (K, B, D)
    second_moment = torch.einsum("kbi,kbj->ij", drawn, drawn) / drawn.shape[0] / drawn.shape[1]
    torch.testing.assert_close(second_moment, torch.eye(6).double(), rtol=0, atol=0.05)  # 5 standard errors, √(2/24000)
    if directions is not gaussian:
        torch.testing.assert_close(drawn.norm(dim=2), torch.full(drawn.shape[:2], 6**0.5).double())
    if directions is orthonormal:
        inner = torch.einsum("kbd,lbd->bkl", drawn, drawn) / 6
        torch.testing.assert_close(inner, torch.eye(3).double().expand_as(inner), rtol=0, atol=1e-12)


def test_forward_differences_feel_the_curvature_and_central_ones_do_not() -> None:
    """On R = ½ h·|x|², a forward slope is off by ½·ε·h·|d|², a central one by nothing."""
    x, epsilon, h = torch.ones(1, 3, 2, 1, dtype=torch.float64), 0.5, 3.0

    def score(images: Tensor) -> Tensor:
        return 0.5 * h * images.square().flatten(1).sum(1)

    d = next(gaussian(Stream(1), x, 1))
    true_slope = h * float((x * d).sum())
    forward, central = (along(score, x, base, [d], epsilon).g for base in (score(x), None))
    torch.testing.assert_close(central, true_slope * d)
    torch.testing.assert_close(forward, (true_slope + 0.5 * epsilon * h * d.square().sum()) * d)


@pytest.mark.parametrize(("dimensions", "directions"), [(12, 64), (192, 4)])
def test_signal_to_noise(dimensions: int, directions: int) -> None:
    """E‖ĝ‖² over E‖ĝ − g‖²: (1 + (D+1)/K)/((D+1)/K); near 1 where K ≪ D."""
    shape = (3, dimensions // 3, 1)
    z = torch.zeros(500, *shape, dtype=torch.float64)
    chosen = latent_reward({"kind": "random_direction", "directions": directions})
    found = chosen.gradient(z, ("",) * 500, Identity(), Linear(shape), Stream(500))
    noise = (dimensions + 1) / directions
    assert found.aux[names.REWARD_GRAD_SNR].median() == pytest.approx((1 + noise) / noise, rel=0.3)
