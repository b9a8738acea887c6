"""Distributions of times: they are what they say, by Kolmogorov and Smirnov, and draws are paired."""

import math

import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from scipy.special import expit, logit

from twinrl.config.errors import InputError
from twinrl.flow import draws
from twinrl.renoise.distributions import Beta, LogitNormal
from twinrl.run import names

N = 20_000


def logit_normal_cdf(location: float, scale: float):
    return lambda t: stats.norm.cdf((logit(t) - location) / scale)


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (1.0, 0.5), (-0.5, 2.0)])
def test_logit_normal_has_its_distribution(location: float, scale: float) -> None:
    t = LogitNormal(location, scale).sample(draws.uniform((N,), 0, "t"))
    assert stats.kstest(t.numpy(), logit_normal_cdf(location, scale)).pvalue > 1e-3
    assert stats.kstest(t.numpy(), logit_normal_cdf(location + 0.1 * scale, scale)).pvalue < 1e-6  # the test has power


@pytest.mark.parametrize(("location", "scale"), [(0.0, 1.0), (1.0, 0.5), (-3.0, 4.0)])
def test_logit_normal_mean_against_quadrature(location: float, scale: float) -> None:
    mean, _ = quad(lambda n: expit(location + scale * n) * stats.norm.pdf(n), -12, 12)
    assert LogitNormal(location, scale).mean == pytest.approx(mean, abs=2e-5)


def test_times_stay_in_their_interval() -> None:
    u = torch.tensor([0.0, 1e-7, 0.5, 1 - 2**-24])
    for law in (Beta(4, 1), Beta(1, 1.5), Beta(0.5, 0.5), LogitNormal(0, 1), LogitNormal(2, 10)):
        t = law.sample(u)
        assert t.dtype == u.dtype
        assert t.min() >= 0
        assert t.max() <= 1
        assert t.isfinite().all()


def test_draws_of_different_distributions_are_paired() -> None:
    """Rows keep their order from one distribution to the other, so arms differ by the law and not by luck."""
    u = draws.uniform((500,), 0, "t").double()
    order = u.argsort()
    laws = (Beta(4, 1), Beta(4, 1.5), Beta(1, 1), LogitNormal(0, 1), LogitNormal(1, 0.3))
    drawn = [law.sample(u) for law in laws]
    assert all(torch.equal(t.argsort(), order) for t in drawn)
    # pairing pays: the difference of two arms varies far less than with independent draws
    a, b = Beta(4, 1), Beta(4, 1.5)
    other = draws.uniform((500,), 1, "t").double()
    paired, independent = (a.sample(u) - b.sample(u)).var(), (a.sample(u) - b.sample(other)).var()
    assert paired < independent / 20


def test_metrics() -> None:
    assert Beta(4, 1).metrics() == {names.RENOISE_ALPHA: 4, names.RENOISE_BETA: 1, names.RENOISE_T_MEAN: 0.8}
    found = LogitNormal(0, 1).metrics()
    assert math.isclose(found.pop(names.RENOISE_T_MEAN), 0.5, abs_tol=1e-12)
    assert found == {names.RENOISE_LOCATION: 0, names.RENOISE_SCALE: 1}


@pytest.mark.parametrize(
    "wrong", [{"parameters": None}, {"parameters": {"k": "1"}}, {"mean": None}, {"mean": torch.ones(2)}]
)
def test_what_an_own_distribution_says_of_itself_is_checked(wrong: dict[str, object]) -> None:
    class Own(Beta):
        @property
        def mean(self):
            return wrong.get("mean", 0.5)

        def parameters(self):
            return wrong.get("parameters", {})

    (name,) = wrong
    with pytest.raises(
        InputError, match=rf"Own\.{name}\S* returns .* at .*test_distributions\.py:\d+; expected (a finite number|dict)"
    ):
        Own(1.0, 1.0).metrics()
