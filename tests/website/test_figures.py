"""The pictures of docs/twinflow.md show what they say: a flow that ends in the data, and a force towards them."""

import numpy as np
from scipy.stats import norm

from website.figures import DATA, GENERATED, Mixture, delta_v


def test_the_flow_carries_noise_to_the_data() -> None:
    levels = (np.arange(400) + 0.5) / 400
    ends = np.sort(DATA.paths(norm.ppf(levels))[-1])
    mean = np.dot(DATA.weights, DATA.means)
    variance = np.dot(DATA.weights, np.square(DATA.means)) + DATA.deviation**2 - mean**2
    assert abs(ends.mean() - mean) < 0.02, "Euler steps of 1/200, quantiles of 1/400"
    assert abs(ends.var() - variance) < 0.03 * variance


def test_of_one_gaussian_the_velocity_is_known() -> None:
    """x ~ N(m, s²): E[z − x | x_t] is linear in x_t, with x_t's own mean and variance."""
    one, t = Mixture((0.5,), (1.0,), 0.3), 0.7
    x_t = np.array([-1.0, 0.2, 2.0])
    variance = (1 - t) ** 2 * 0.3**2 + t**2
    slope = (t - (1 - t) * 0.3**2) / variance
    assert np.allclose(one.velocity(x_t, t), slope * (x_t - (1 - t) * 0.5) - 0.5)


def test_delta_v_points_from_samples_to_data() -> None:
    """The generator's left samples lie right of the data's left mode: they are moved to the left."""
    between = np.linspace(DATA.means[0] + 0.1, GENERATED.means[0], 5)
    assert (delta_v(between) < 0).all()
