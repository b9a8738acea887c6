"""Per-sample losses: their size, and the size of their gradient against the residual's."""

import math

import pytest
import torch
from torch import Tensor

from twinrl.terms.losses import L2, Barron, mean_square, time_weight

D = 48  # elements of a sample
SHAPE = (3, 4, 4)


def residual(rms: float, rows: int = 3) -> Tensor:
    """(rows, 3, 4, 4) float64 residuals of exactly this RMS per sample."""
    drawn = torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn * (rms / drawn.flatten(1).norm(dim=1) * D**0.5).view(-1, 1, 1, 1)


def gradient_norms(loss: L2 | Barron, F: Tensor) -> Tensor:
    """(B,) norms of each sample's own gradient, for target 0."""
    F = F.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(F, torch.zeros_like(F)).sum(), F)
    return gradient.flatten(1).norm(dim=1)


def barron(**settings: float) -> Barron:
    return Barron(Barron.Config(**settings))


def test_l2_is_the_mean_square_of_each_sample() -> None:
    F = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    target = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert L2(L2.Config())(F, target).tolist() == [2.0, 1.0]
    assert mean_square(F, target).tolist() == [2.0, 1.0]
    norms = gradient_norms(L2(L2.Config()), residual(0.3))
    torch.testing.assert_close(norms, torch.full((3,), 2 * 0.3 / D**0.5).double())


@pytest.mark.parametrize("rms", [0.05, 1.0, 40.0])
def test_barron_far_above_c_is_the_rms_with_a_constant_gradient(rms: float) -> None:
    """Loss ≈ RMS and gradient norm ≈ 2/√D whatever the residual (to √1.01, from the 1e-8 beside c²)."""
    F = residual(rms)
    torch.testing.assert_close(barron()(F, torch.zeros_like(F)), torch.full((3,), rms).double(), rtol=6e-3, atol=0)
    torch.testing.assert_close(gradient_norms(barron(), F), torch.full((3,), 2 / D**0.5).double(), rtol=6e-3, atol=0)


def test_barron_at_c_has_071_of_the_gradient() -> None:
    """At RMS = c the weight is (1/1.01 + 1)^(−1/2)/c (the 1.01 from c² + 1e-8): 0.709 · 2/√D."""
    expected = (1 / 1.01 + 1) ** -0.5 * 2 / D**0.5
    assert expected == pytest.approx(0.709 * 2 / D**0.5, rel=1e-3)
    torch.testing.assert_close(gradient_norms(barron(), residual(1e-3)), torch.full((3,), expected).double())


def test_barron_far_below_c_is_mean_square_over_c() -> None:
    norms = gradient_norms(barron(), residual(1e-6))
    torch.testing.assert_close(norms, torch.full((3,), 2 * 1e-6 / 1e-3 / D**0.5).double(), rtol=1e-5, atol=0)
    assert barron()(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


def test_barron_weight_carries_no_gradient() -> None:
    """The gradient is weight·∇m; the derivative of the weight would halve it."""
    F = residual(1.0).requires_grad_()
    loss = barron()(F, torch.zeros_like(F))
    (gradient,) = torch.autograd.grad(loss.sum(), F)
    weight = (loss / F.square().flatten(1).mean(1)).view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient, (weight * 2 * F / D).detach())


def test_barron_of_other_shapes() -> None:
    """α = 0, c = 0.1, m = 0.04: m·(0.04/(0.01 + 1e-8)/2 + 1)^(−1)/0.1 = 0.4/3."""
    F = residual(0.2)
    torch.testing.assert_close(barron(alpha=0, c=0.1)(F, 0 * F), torch.full((3,), 0.4 / 3).double(), rtol=1e-5, atol=0)


def test_max_ratio_restores_the_scale_of_mean_square() -> None:
    """Published setting 1e6: below RMS 1 nothing changes, beyond it the gradient grows with the residual again."""
    limited = barron(max_ratio=1e6)
    below, above = residual(0.5), residual(10.0)
    assert torch.equal(limited(below, 0 * below), barron()(below, 0 * below))
    one, ten = gradient_norms(limited, residual(1.1)), gradient_norms(limited, residual(11.0))
    torch.testing.assert_close(ten, 10 * one)
    torch.testing.assert_close(limited(above, 0 * above), torch.full((3,), 100 / math.sqrt(1e6 + 1) / 1e-3).double())


def test_samples_do_not_see_each_other() -> None:
    F = torch.cat([residual(0.01, 1), residual(7.0, 1)])
    both = barron()(F, torch.zeros_like(F))
    assert torch.equal(both[1:], barron()(F[1:], torch.zeros_like(F[1:])))


# --- time weight --------------------------------------------------------------------------------------------


def test_time_weight_at_its_known_points() -> None:
    """tan(π/2.5) + 1 = 4.0777 at r = t, tan 0 + 1 = 1 at (1, 0), tan(π/5) + 1 = 1.7265 halfway."""
    t, r = torch.tensor([0.3, 1.0, 1.0, 0.8]).double(), torch.tensor([0.3, 1.0, 0.0, 0.3]).double()
    expected = [4.0777, 4.0777, 1.0, 1.7265]
    assert time_weight(t, r).tolist() == pytest.approx(expected, abs=5e-5)


def test_fake_rows_have_weight_one() -> None:
    t = -torch.tensor([0.01, 0.5, 1.0])
    assert time_weight(t, t).tolist() == [1, 1, 1]
    assert time_weight(torch.tensor([0.5, -0.5]), torch.tensor([0.5, -0.5])).tolist() == pytest.approx(
        [4.0777, 1], 1e-4
    )


def test_longer_jumps_weigh_less() -> None:
    t = torch.ones(50).double()
    weights = time_weight(t, torch.linspace(0, 1, 50).double())
    assert (weights.diff() > 0).all()
    assert weights.min() == 1
