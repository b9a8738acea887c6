"""The bridge against closed forms: exact on the schedule, continuous off it, DDIM's own results on Gaussian data."""

import itertools

import pytest
import torch
from diffusers import DDIMScheduler

from twinrl.backends.families.diffusion import Bridge
from twinrl.config.errors import InputError

SD = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEAN, SPREAD = 0.7, 0.5  # of Gaussian data
PREDICTIONS = ["epsilon", "v"]


def bridge(prediction, **more):
    return Bridge.of(SD | {"prediction": prediction} | more)


def schedule(bridge):
    """α_s and σ_s of every timestep, from the flow times alone."""
    t = bridge.times
    norm = (t.square() + (1 - t).square()).sqrt()
    return (1 - t) / norm, t / norm


def analytic(prediction, x_s, alpha, sigma):
    """What the perfect model of N(MEAN, SPREAD²) answers at (x_s, s): E[ε | x_s] or E[v | x_s]."""
    gain = (x_s - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)
    z, x = sigma * gain, MEAN + alpha * SPREAD**2 * gain
    return z if prediction == "epsilon" else alpha * z - sigma * x


def velocity_of_gaussian(x_t, t):
    """E[z − x | x_t] on the linear path."""
    gain = (x_t - (1 - t) * MEAN) / ((1 - t) ** 2 * SPREAD**2 + t**2)
    return t * gain - (MEAN + (1 - t) * SPREAD**2 * gain)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_exact_at_every_timestep_of_the_schedule(prediction):
    b, s = bridge(prediction), torch.arange(1000).double()
    alpha, sigma = schedule(b)
    alphas_cumprod = DDIMScheduler(**SD).alphas_cumprod.double()
    torch.testing.assert_close(alpha.square(), alphas_cumprod, atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(b.timestep(b.times), s, atol=1e-9, rtol=0)
    torch.testing.assert_close(b.level(s), b.times, atol=1e-12, rtol=0)
    z, x = torch.randn(2, 1000, 3, generator=torch.Generator().manual_seed(0)).double()
    x_t = b.times[:, None] * z + (1 - b.times[:, None]) * x
    x_s = b.input(x_t, b.times)
    torch.testing.assert_close(x_s, alpha[:, None] * x + sigma[:, None] * z, atol=1e-12, rtol=0)  # on its trajectory
    answer = z if prediction == "epsilon" else alpha[:, None] * z - sigma[:, None] * x
    torch.testing.assert_close(b.velocity(answer, x_t, b.times), z - x, atol=1e-9, rtol=0)
    answer = analytic(prediction, x_s, alpha[:, None], sigma[:, None])
    expected = velocity_of_gaussian(x_t, b.times[:, None])
    torch.testing.assert_close(b.velocity(answer, x_t, b.times), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_single_precision_keeps_six_digits(prediction):
    b = bridge(prediction)
    t = b.times[::37]
    x_t = torch.randn(len(t), 3, generator=torch.Generator().manual_seed(1)).double()
    alpha, sigma = ((1 - t) / _norm(t), t / _norm(t))
    answer = analytic(prediction, b.input(x_t, t), alpha[:, None], sigma[:, None])
    single = b.velocity(answer.float(), x_t.float(), t.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), b.velocity(answer, x_t, t), atol=1e-5, rtol=1e-5)


def _norm(t):
    return (t.square() + (1 - t).square()).sqrt()


def test_between_timesteps_the_time_is_interpolated_and_the_input_is_not():
    b = bridge("epsilon")
    left, right = b.times[400], b.times[401]
    t = (0.75 * left + 0.25 * right)[None]
    torch.testing.assert_close(b.timestep(t), torch.tensor([400.25]).double())
    z, x = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(2)).double()
    x_s = b.input(t * z + (1 - t) * x, t)
    torch.testing.assert_close(x_s, ((1 - t) * x + t * z) / _norm(t))  # unit sum of squares: on the trajectory
    times = torch.linspace(0, 1, 10001).double()
    assert (b.timestep(times).diff() >= 0).all()
    assert b.timestep(times)[[0, -1]].tolist() == [0, 999]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_above_the_schedule_the_velocity_is_continuous_and_finite(prediction):
    b = bridge(prediction)
    end = float(b.times[-1])
    x_t, answer = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(3)).double()
    t = torch.tensor([end, end + 1e-9, 1.0]).double()
    same = b.velocity(answer[:1].expand(3, -1), x_t[:1].expand(3, -1), t)
    torch.testing.assert_close(same[0], same[1], atol=1e-5, rtol=1e-5)
    assert same.isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_gradients_are_finite_at_every_level(prediction):
    b = bridge(prediction)
    t = torch.tensor([0.0, 1e-4, 0.5, 0.9, 0.9360, 0.97, 1.0])
    leaf, answer = (torch.randn(7, 4, requires_grad=True) for _ in range(2))
    (b.velocity(answer, leaf, t).square().sum() + b.input(leaf, t).sum()).backward()
    assert answer.grad.isfinite().all()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_through_the_bridge_is_ddim_and_ends_in_the_data(prediction):
    """Gaussian data: DDIM by diffusers in the model's coordinates, Euler in the flow's, step for step the same."""
    b = bridge(prediction)
    alpha, sigma = schedule(b)
    kind = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, prediction_type=kind)
    ddim.alphas_cumprod = ddim.alphas_cumprod.double()
    ddim.set_timesteps(50)
    start = torch.randn(4000, generator=torch.Generator().manual_seed(4)).double()
    theirs = start.clone()
    for s in ddim.timesteps:
        theirs = ddim.step(analytic(prediction, theirs, alpha[s], sigma[s]), s, theirs).prev_sample
    levels = [*b.times[ddim.timesteps], b.times[0]]
    x = start * _norm(levels[0])
    for now, then in itertools.pairwise(levels):
        t = now.expand(len(x))
        s = int(b.timestep(now[None]).round())
        answer = analytic(prediction, b.input(x[:, None], t)[:, 0], alpha[s], sigma[s])
        x = x + (then - now) * b.velocity(answer[:, None], x[:, None], t)[:, 0]
    ours = b.input(x[:, None], b.times[0].expand(len(x)))[:, 0]
    # diffusers keeps ᾱ of its last step in float32
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert ours.mean() == pytest.approx(MEAN, abs=0.05)
    assert ours.std() == pytest.approx(SPREAD, abs=0.05)


def test_a_schedule_that_ends_in_pure_noise():
    zero = {"rescale_betas_zero_snr": True}
    with pytest.raises(InputError, match=r"a model of ε cannot end in pure noise.*expected model\.prediction=v"):
        bridge("epsilon", **zero)
    b = bridge("v", **zero)
    assert b.times[-1] == pytest.approx(1.0, abs=1e-6)
    z, answer = torch.randn(2, 1, 3).double()
    torch.testing.assert_close(z - b.velocity(answer, z, torch.ones(1).double()), -answer, atol=1e-5, rtol=0)
