"""The linear transport: predictions invert it, scores follow from velocities, the sign of t is only a name."""

import pytest
import torch
from torch import Tensor

from twinrl.flow import transport


def score(x_t: Tensor, t: Tensor, F: Tensor) -> Tensor:
    """``−ẑ/|t|``: the score of the branch that ``F`` belongs to."""
    return -transport.predicted_noise(x_t, t, F) / transport.like(t.abs(), x_t)


SIGN = pytest.mark.parametrize("sign", [1, -1])


@pytest.fixture
def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """x, z (6, 2, 3, 3) and t (6,) in (0, 1), float64."""
    generator = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 6, 2, 3, 3, generator=generator, dtype=torch.float64)
    return x, z, torch.linspace(0.05, 0.95, 6, dtype=torch.float64)


@SIGN
def test_predictions_invert_the_path_exactly(sign: int) -> None:
    """On numbers that floats hold exactly there is no rounding to hide behind."""
    generator = torch.Generator().manual_seed(1)
    x, z = torch.randint(-8, 9, (2, 9, 2, 3, 3), generator=generator).double()
    t = sign * torch.arange(9).double() / 8  # both ends of the path included
    x_t, v = transport.interpolate(x, z, t), transport.velocity(x, z)
    assert torch.equal(transport.predicted_data(x_t, t, v), x)
    assert torch.equal(transport.predicted_noise(x_t, t, v), z)


@SIGN
def test_any_prediction_lies_on_one_line(drawn: tuple[Tensor, Tensor, Tensor], sign: int) -> None:
    """x̂ and ẑ of an arbitrary F are the ends of a path through x_t with velocity F."""
    x_t, F, t = drawn
    t = sign * t
    x_hat, z_hat = transport.predicted_data(x_t, t, F), transport.predicted_noise(x_t, t, F)
    torch.testing.assert_close(transport.interpolate(x_hat, z_hat, t), x_t, rtol=0, atol=1e-12)
    torch.testing.assert_close(transport.velocity(x_hat, z_hat), F, rtol=0, atol=1e-12)


def test_ends_of_the_path(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    x, z, _ = drawn
    assert torch.equal(transport.interpolate(x, z, torch.zeros(6)), x)
    assert torch.equal(transport.interpolate(x, z, torch.ones(6)), z)


def test_difference_of_scores(drawn: tuple[Tensor, Tensor, Tensor]) -> None:
    """s_fake − s_real = −((1−t)/t)·(v_fake − v_real), the fake branch given by negative times."""
    x_t, v_real, t = drawn
    v_fake = v_real.flip(0) + 1
    difference = score(x_t, -t, v_fake) - score(x_t, t, v_real)
    expected = -transport.like((1 - t) / t, x_t) * (v_fake - v_real)
    torch.testing.assert_close(difference, expected, rtol=1e-10, atol=1e-12)


def test_score_of_a_gaussian() -> None:
    """Data N(μ, s²): x_t is N((1−t)μ, t² + (1−t)²s²), whose score is known without the network."""
    mu, s, x_t = 0.7, 0.4, torch.linspace(-2, 2, 5).double()
    t = torch.linspace(0.1, 1, 5).double()
    centred, variance = x_t - (1 - t) * mu, t**2 + (1 - t) ** 2 * s**2
    v = -mu + (t - (1 - t) * s**2) / variance * centred
    torch.testing.assert_close(score(x_t, t, v), -centred / variance, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 1, 2), (3, 2, 2, 2)])
def test_times_go_with_rows_whatever_the_shape(shape: tuple[int, ...]) -> None:
    """Also where a later dimension has the batch's size: nothing may broadcast along it."""
    t = torch.tensor([0.0, 0.5, 1.0])
    levels = transport.interpolate(torch.zeros(shape), torch.ones(shape), t).reshape(3, -1)
    assert torch.equal(levels, t[:, None].expand_as(levels))


def test_times_go_with_rows_of_square_data() -> None:
    t = torch.tensor([0.0, 0.5, 1.0])
    x_t = transport.interpolate(torch.zeros(3, 3), torch.ones(3, 3), t)
    assert torch.equal(x_t, t[:, None].expand(3, 3))
