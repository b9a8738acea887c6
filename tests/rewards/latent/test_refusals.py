"""Settings and rewards that cannot work are refused in one line; 8 bits are 8 bits."""

from typing import Any

import pytest
import torch

from tests.rewards.latent.toys import PROMPTS, Brightness, Flat, Identity, Toy, latent_reward, latents
from tests.rounding import assert_rounded
from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.rewards.latent import KeyedRows
from twinrl.rewards.latent.finite_difference import to_8_bit
from twinrl.run import names

ROWS = KeyedRows(0, 0, tuple(range(len(PROMPTS))))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": {"kind": "orthogonal", "directions": 0}}, "directions: .* greater than or equal to 1, got 0"),
        ({"estimator": {"kind": "spsa", "directions": -1}}, "estimator.directions"),
        ({"estimator": {"kind": "antithetic", "epsilon": 0}}, "estimator.epsilon: .* greater than 0, got 0"),
        ({"estimator": {"kind": "spsa", "epsilon": -0.1}}, "estimator.epsilon"),
        ({"estimator": "guess"}, "unknown gradient estimator 'guess'; expected one of autograd, .*, vae_backprop"),
        ({"estimator": {"kind": "autograd", "epsilon": 0.1}}, "unknown key estimator.epsilon"),
        ({"estimator": "spsa", "baseline": "latent"}, "baseline has no effect with estimator spsa"),
        ({"estimator": "vae_backprop", "baseline": "decoded"}, "baseline has no effect with estimator vae_backprop"),
        ({"estimator": "autograd", "eta": 0}, "eta: .* greater than 0"),
        ({"estimator": "autograd", "chunk": 0}, "chunk"),
    ],
)  # fmt: skip
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        latent_reward(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["autograd", "vae_backprop"])
def test_a_reward_without_gradient(kind: str) -> None:
    chosen = latent_reward(kind)
    with pytest.raises(
        InputError, match=f"estimator {kind} needs a differentiable reward, and Brightness is none; fix:"
    ):
        chosen.gradient(latents(), PROMPTS, Toy(), Brightness(differentiable=False), ROWS)


@pytest.mark.parametrize("kind", ["random_direction", "antithetic", "orthogonal", "spsa"])
def test_estimators_that_need_none(kind: str) -> None:
    found = latent_reward(kind).gradient(latents(), PROMPTS, Toy(), Brightness(differentiable=False), ROWS)
    assert found.g.abs().min() > 0


def test_a_reward_that_claims_a_gradient_and_has_none() -> None:
    reward = Brightness(differentiable=False)
    reward_that_lies = type("Liar", (), {"differentiable": True, "__call__": lambda self, *given: reward(*given)})()
    with pytest.raises(
        InputError, match="Liar calls itself differentiable, but its scores do not depend on the pixels"
    ):
        latent_reward("autograd").gradient(latents(), PROMPTS, Toy(), reward_that_lies, ROWS)


def test_a_reward_that_does_not_score_each_image() -> None:
    column = type("Column", (Flat,), {"__call__": lambda self, y, prompts: y.flatten(1).sum(1, keepdim=True)})()
    for kind in ("autograd", "random_direction", "spsa"):
        with pytest.raises(InputError, match=r"Column.__call__ returns Tensor of shape \(6, 1\)"):
            latent_reward(kind).gradient(latents(), PROMPTS, Toy(), column, ROWS)


def test_prompts_must_be_as_many_as_images() -> None:
    for z, prompts in ((latents(), PROMPTS[:5]), (latents()[:0], ())):
        with pytest.raises(InputError, match=f"got {len(z)} images, {len(prompts)} prompts"):
            latent_reward("autograd").gradient(z, prompts, Toy(), Brightness(), ROWS)


def test_more_orthogonal_directions_than_dimensions() -> None:
    with pytest.raises(InputError, match="33 orthogonal directions do not exist in 32 dimensions"):
        latent_reward({"kind": "orthogonal", "directions": 33}).gradient(
            latents(), PROMPTS, Identity(), Brightness(), ROWS
        )


def test_8_bits() -> None:
    levels = torch.arange(256) / 127.5 - 1
    assert_rounded(to_8_bit(levels), levels, roundings=4)
    images = 2 * draws.normal((10_000,), 0, "pixels")
    assert len(to_8_bit(images).unique()) == 256
    assert (to_8_bit(images) - images.clamp(-1, 1)).abs().max() < 1 / 255 + 1e-6


def test_8_bits_hide_a_small_step() -> None:
    """A step far below one level is invisible: no gradient, and a signal-to-noise ratio of nothing is NaN."""
    z = to_8_bit(0.3 * latents())
    settings = {"kind": "random_direction", "epsilon": 1e-5}
    seen = latent_reward(settings).gradient(z, PROMPTS, Identity(), Brightness(), ROWS)
    hidden = latent_reward({**settings, "quantise": True}).gradient(z, PROMPTS, Identity(), Brightness(), ROWS)
    assert seen.g.abs().max() > 0
    assert torch.equal(hidden.g, torch.zeros_like(z))
    assert hidden.aux[names.REWARD_GRAD_SNR].isnan().all()
