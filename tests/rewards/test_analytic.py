"""Closed forms."""

import pytest
import torch

from tests.rewards.tiny import images, reward


def gradient(model, x):
    x = x.clone().requires_grad_(True)
    model(x, []).sum().backward()
    return x.grad


def test_brightness_has_a_constant_gradient():
    x = images(dtype=torch.float64)
    torch.testing.assert_close(reward("brightness")(x, []), x.mean((1, 2, 3)))
    torch.testing.assert_close(gradient(reward("brightness"), x), torch.full_like(x, 1 / x[0].numel()))


def test_quadratic_is_highest_at_its_target():
    model, x = reward({"kind": "quadratic", "target": 0.25}), images(dtype=torch.float64)
    assert torch.equal(model(torch.full_like(x, 0.25), []), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(gradient(model, x), (0.25 - x) / x[0].numel())


def test_sharpness_is_zero_for_flat_images_and_two_for_a_checkerboard():
    flat = torch.full((1, 1, 8, 8), 0.3)
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1).expand(1, 1, 8, 8)
    assert reward("sharpness")(torch.cat([flat, board]), []).tolist() == [0.0, 2.0]


def test_sharpness_is_a_quadratic_form():
    """R(y) = ½⟨y, ∇R(y)⟩ for a homogeneous quadratic."""
    x = images(dtype=torch.float64)
    euler = 0.5 * (x * gradient(reward("sharpness"), x)).flatten(1).sum(1)
    torch.testing.assert_close(reward("sharpness")(x, []), euler)


def test_compressibility_prefers_flat_images_and_has_no_gradient():
    model = reward("compressibility")
    noise, flat = images(1, 64, 64), torch.zeros(1, 3, 64, 64)
    scores = model(torch.cat([noise, flat]).requires_grad_(True), [])
    assert not model.differentiable
    assert not scores.requires_grad
    assert scores[0] < scores[1] < 0


def test_compressibility_does_not_mask_a_broken_image():
    x = torch.zeros(2, 3, 16, 16)
    x[1, 0, 0, 0] = torch.nan
    assert reward("compressibility")(x, []).isnan().tolist() == [False, True]


@pytest.mark.parametrize("kind", ["brightness", "quadratic", "sharpness", "compressibility"])
def test_wrong_shapes_are_refused(kind):
    with pytest.raises(ValueError, match=r"takes \(B, 3, H, W\)"):
        reward(kind)(torch.zeros(2, 4, 8, 8), [])
