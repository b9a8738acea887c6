"""What enters a projected gradient beside the reward: nothing with ``decoded``, the round trip with ``latent``."""

import pytest
import torch

from tests.rewards.latent.toys import PROMPTS, Brightness, Flat, Toy, latent_reward, latents
from twinrl.rewards.latent import KeyedRows
from twinrl.run import names

ROWS = KeyedRows(0, 0, tuple(range(len(PROMPTS))))
CODECS = [Toy(), Toy(gain=2.0, bend=False)]  # the second one leaves [−1, 1]
PIXEL = ["autograd", "random_direction", "antithetic", "orthogonal"]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", PIXEL)
def test_a_constant_reward_gives_exactly_nothing(kind: str, codec: Toy) -> None:
    """Bitwise, also where the decoder overshoots, for any η: the encoder sees the same image twice."""
    z = latents()
    for eta in (0.05, 1e4):
        found = latent_reward(kind, eta=eta).gradient(z, PROMPTS, codec, Flat(), ROWS)
        assert torch.equal(found.g, torch.zeros_like(z))


def test_decoders_overshoot_in_this_test() -> None:
    assert (CODECS[1].decode(latents()).abs() > 1).float().mean() > 0.2


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", PIXEL)
def test_with_the_latent_as_baseline_the_round_trip_error_remains(kind: str, codec: Toy) -> None:
    """A constant reward then pulls along E(D(z)) − z, at every η."""
    z = latents().double()
    residual = z - codec.encode(codec.decode(z).clamp(-1, 1))
    assert residual.abs().max() > 0.01
    for eta in (0.05, 1e-6):
        found = latent_reward(kind, eta=eta, baseline="latent").gradient(z, PROMPTS, codec, Flat(), ROWS)
        torch.testing.assert_close(found.g, -residual, rtol=1e-9, atol=1e-12)


def test_the_two_baselines_differ_by_the_round_trip_alone() -> None:
    z, codec = latents().double(), Toy()
    decoded, latent = (
        latent_reward("autograd", baseline=b).gradient(z, PROMPTS, codec, Brightness(), ROWS).g
        for b in ("decoded", "latent")
    )
    torch.testing.assert_close(decoded - latent, z - codec.encode(codec.decode(z)), rtol=1e-9, atol=1e-12)


def test_round_trip_is_reported_where_it_was_computed() -> None:
    z, codec = latents(), Toy()
    error = (z - codec.encode(codec.decode(z))).square().mean((1, 2, 3)).sqrt()
    found = latent_reward("autograd").gradient(z, PROMPTS, codec, Brightness(), ROWS)
    torch.testing.assert_close(found.aux[names.REWARD_ROUNDTRIP], error)
    torch.testing.assert_close(found.aux[names.REWARD_GRAD_NORM], found.g.flatten(1).norm(dim=1))
    without = latent_reward("autograd", baseline="latent").gradient(z, PROMPTS, codec, Brightness(), ROWS)
    assert names.REWARD_ROUNDTRIP not in without.aux
