import math
from itertools import pairwise

import pytest
import torch

from tests import reference
from tests.sampling.gaussian import GaussianFlow
from twinrl.config.errors import InputError
from twinrl.flow.transport import predicted_data
from twinrl.sampling import (
    SamplerConfig,
    any_step,
    euler,
    few_step,
    keyed_noise,
    multi_step,
    nfe,
    plan,
    sample,
    time_grid,
)

GOLDEN = {
    "sample_few_2": few_step(2),
    "sample_few_4": few_step(4),
    "sample_any_4": any_step(4),
    "sample_mul_12": multi_step(12, extrapolation=0.4),
}


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def at(time, z):
    return torch.full((len(z),), time, dtype=torch.float64)


def followed(network, z, condition, config, **named):
    """A sample of float64 noise, and ``[z, x̂₁ … x̂ₙ]``: the network's predictions on the way, not extrapolated."""
    asked, predictions = iter(plan(config)), [z]

    def recording(x, t, r, c):
        F = network(x, t, r, c)
        if not next(asked).corrects:
            predictions.append(predicted_data(x, t, F))
        return F

    return sample(recording, z, condition, config, **named), torch.stack(predictions)


# --- public code's trajectories -------------------------------------------------------------------------


def test_every_stored_trajectory_is_known():
    assert set(GOLDEN) == set(reference.cases("big", "sample_"))


@pytest.mark.parametrize("name", GOLDEN)
def test_trajectories_of_the_public_code_are_reproduced(name):
    values = reference.case(name)
    result, trajectory = followed(
        reference.network("net_sampler"),
        values["z"],
        {"c": values["c"]},
        GOLDEN[name],
        noise=lambda step: values["noise"][step],
    )
    assert trajectory.shape == values["traj"].shape
    assert reference.relative_error(trajectory, values["traj"]) < 1e-12
    assert torch.equal(result, trajectory[-1])


@pytest.mark.parametrize("name", ["sample_few_2", "sample_mul_12"])
def test_the_reference_network_notices_other_settings(name):
    """The golden cases could fail: a slightly different κ, gap or ratio misses them by far."""
    values = reference.case(name)
    for change in ({"gap_end": 0.55}, {"stochastic_ratio": 0.5}, {"kumaraswamy": (1.2, 0.8, 1.1)}):
        config = GOLDEN[name].model_copy(update=change)
        result = sample(reference.network("net_sampler"), values["z"], {"c": values["c"]}, config)
        assert reference.relative_error(result, values["traj"][-1]) > 1e-4


# --- a flow that can be solved --------------------------------------------------------------------------


def test_one_step_is_the_jump_from_noise():
    flow, z = GaussianFlow(), normal(4, 1, 2, 2)
    expected = z - flow(z, at(1.0, z), at(0.0, z), {})
    torch.testing.assert_close(sample(flow, z, {}, few_step(1)), expected)
    assert flow.asked[-1] == (1.0, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("gap_start", [0.0, 0.001, 0.2])
def test_any_step_lands_exactly_where_the_flow_ends(steps, gap_start):
    flow, z = GaussianFlow(), normal(4, 1, 2, 2)
    config = any_step(steps).model_copy(update={"gap_start": gap_start})
    expected = flow.move(z, at(1 - gap_start, z), at(0.0, z))
    torch.testing.assert_close(sample(flow, z, {}, config), expected, rtol=1e-12, atol=1e-12)


def test_any_step_predicts_the_flow_at_the_next_time_on_the_way():
    """The second evaluation of two is asked exactly at the flow's point at the second time."""
    flow, z = GaussianFlow(), normal(4, 1, 2, 2)
    seen = []

    def network(x, t, r, condition):
        seen.append(x)
        return flow(x, t, r, condition)

    sample(network, z, {}, any_step(2))
    start, second = time_grid(any_step(2))[:2].tolist()
    torch.testing.assert_close(seen[1], flow.move(z, at(start, z), at(second, z)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nfe_", [1, 2, 4, 8])
def test_few_step_keeps_the_data_distribution(nfe_):
    flow, z = GaussianFlow(mean=0.7, std=0.4), normal(20_000, 1)
    x = sample(flow, z, {}, few_step(nfe_).model_copy(update={"gap_start": 0.0}), seed=3)
    assert x.mean().item() == pytest.approx(0.7, abs=5 * 0.4 / math.sqrt(20_000))
    assert x.std().item() == pytest.approx(0.4, rel=0.03)


def test_few_step_samples_leave_their_starting_noise():
    """ρ = 1 replaces the noise, ρ = 0 keeps it: correlation with z falls from 1 to near 0."""
    flow, z = GaussianFlow(), normal(20_000, 1)

    def correlation(ratio):
        config = few_step(4).model_copy(update={"stochastic_ratio": ratio})
        return torch.corrcoef(torch.cat([sample(flow, z, {}, config), z], 1).T)[0, 1].item()

    assert correlation(0.0) == pytest.approx(1.0, abs=1e-6)
    assert correlation(1.0) < 0.6


def errors(config, counts):
    flow, z = GaussianFlow(mean=0.7, std=0.4), normal(64, 1)
    exact = flow.move(z, at(1 - config.gap_start, z), at(0.0, z))
    configs = [config.model_copy(update={"steps": n}) for n in counts]
    return [(sample(flow, z, {}, c) - exact).abs().max().item() for c in configs]


def test_euler_converges_at_first_order():
    for coarse, fine in pairwise(errors(euler(1), [32, 64, 128, 256])):
        assert math.log2(coarse / fine) == pytest.approx(1, abs=0.2)


def test_order_2_converges_at_second_order():
    config = SamplerConfig(style="mul", order=2, stochastic_ratio=0.0, gap_start=0.5, gap_end=0.0)
    for coarse, fine in pairwise(errors(config, [31, 63, 127, 255])):
        assert math.log2(coarse / fine) == pytest.approx(2, abs=0.2)


def test_order_2_beats_order_1_at_equal_evaluations():
    settings = {"style": "mul", "stochastic_ratio": 0.0, "gap_start": 0.2, "gap_end": 0.0}
    first, second = (errors(SamplerConfig(order=order, **settings), [31])[0] for order in (1, 2))
    assert second < first / 3


def order_2_by_hand(F, z, times, kappa):
    """UCGM's order 2 written out for ``mul`` without noise; returns the raw x̂ of every step."""
    x, previous, predictions = z, None, []
    for i, (t, s) in enumerate(pairwise(times)):
        x_hat, z_hat = x - t * F(x, t), x + (1 - t) * F(x, t)
        raw, predictions = (x_hat, z_hat), [*predictions, x_hat]
        if i >= 2:
            x_hat, z_hat = x_hat + kappa * (x_hat - previous[0]), z_hat + kappa * (z_hat - previous[1])
        previous = raw
        if s > 0:
            euler_point = (1 - s) * x_hat + s * z_hat
            z_hat_there = euler_point + (1 - s) * F(euler_point, s)
            x = x * (1 - s) / (1 - t) + (s - (1 - s) * t / (1 - t)) * (z_hat + z_hat_there) / 2
    return predictions


@pytest.mark.parametrize("kappa", [0.0, 0.4])
@pytest.mark.parametrize("gap_end", [0.0, 0.3])
def test_order_2_is_the_written_formula(kappa, gap_end):
    flow, z = GaussianFlow(), normal(4, 1, 2, 2)
    config = SamplerConfig(
        steps=11, style="mul", order=2, stochastic_ratio=0.0, extrapolation=kappa, gap_start=0.1, gap_end=gap_end
    )
    _, trajectory = followed(flow, z, {}, config)
    by_hand = order_2_by_hand(lambda x, t: flow.velocity(x, at(t, x)), z, time_grid(config).tolist(), kappa)
    torch.testing.assert_close(trajectory[1:], torch.stack(by_hand), rtol=1e-10, atol=1e-10)


def test_the_sde_ratio_keeps_the_data_distribution_in_the_limit():
    flow, z = GaussianFlow(mean=0.7, std=0.4), normal(4000, 1)
    config = SamplerConfig(steps=200, style="mul", stochastic_ratio="sde", gap_start=0.001, gap_end=0.0)
    x = sample(flow, z, {}, config)
    assert x.mean().item() == pytest.approx(0.7, abs=0.03)
    assert x.std().item() == pytest.approx(0.4, rel=0.1)


# --- the contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [few_step(1), few_step(3), any_step(4), multi_step(5), euler(7)])
def test_order_1_evaluates_steps_times(config):
    flow = GaussianFlow()
    sample(flow, normal(2, 1, 2, 2), {}, config)
    assert flow.calls == config.steps == nfe(config)


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_order_2_evaluates_as_often_as_it_says(steps):
    flow, config = GaussianFlow(), SamplerConfig(steps=steps, order=2, style="mul")
    sample(flow, normal(2, 1, 2, 2), {}, config)
    assert flow.calls == nfe(config)


def test_equal_seeds_give_equal_samples_and_others_do_not():
    flow, z = GaussianFlow(), normal(2, 1, 2, 2)
    first, again, other = (sample(flow, z, {}, few_step(2), seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_default_noise_is_the_keyed_one_and_the_global_stream_is_untouched():
    flow, z = GaussianFlow(), normal(2, 1, 2, 2)
    before = torch.get_rng_state()
    default = sample(flow, z, {}, few_step(4), seed=9)
    given = sample(flow, z, {}, few_step(4), noise=lambda step: keyed_noise(z.shape, 9, step))
    assert torch.equal(default, given)
    assert torch.equal(torch.get_rng_state(), before)


def test_deterministic_settings_ignore_the_noise():
    flow, z = GaussianFlow(), normal(2, 1, 2, 2)

    def refuse(step):
        raise AssertionError("asked for noise")

    sample(flow, z, {}, any_step(4), noise=refuse)
    assert torch.equal(sample(flow, z, {}, any_step(4), seed=1), sample(flow, z, {}, any_step(4), seed=2))


@pytest.mark.parametrize(
    ("dtype", "times"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_network_sees_z_dtype_and_fine_times(dtype, times):
    def network(x, t, r, condition):
        assert (x.dtype, t.dtype, r.dtype) == (dtype, times, times)
        assert t.shape == r.shape == (2,)
        return 0.5 * x

    assert sample(network, normal(2, 1, 2, 2).to(dtype), {}, few_step(2)).dtype == dtype


def test_the_state_is_float64_between_evaluations():
    """200 Euler steps of float32 predictions add up as in float64: one rounding, not 200."""
    z = normal(2, 1, 2, 2).float()
    result = sample(lambda x, t, r, c: torch.full_like(x, 1 / 3), z, {}, euler(200))
    expected = z.double() - float(torch.tensor(1 / 3))
    half_a_digit = 2.0**-24 * expected.abs()
    assert ((result - expected).abs() <= half_a_digit * (1 + 1e-6)).all()


def test_guidance_moves_away_from_the_null_prediction():
    def network(x, t, r, condition):
        return condition["v"]

    z, v, null = normal(3, 2, 1, 2, 2)
    guided = sample(network, z, {"v": v}, few_step(1), guidance=1.5, null={"v": null})
    torch.testing.assert_close(guided, z - (v + 1.5 * (v - null)))
    assert torch.equal(sample(network, z, {"v": v}, few_step(1), null={"v": null}), z - v)


def test_nothing_is_recorded_for_gradients():
    model = reference.network("net_sampler")
    values = reference.case("sample_few_2")
    assert not sample(model, values["z"], {"c": values["c"]}, few_step(2)).requires_grad


def test_non_finite_values_are_passed_on():
    z = normal(2, 1, 2, 2)
    result = sample(lambda x, t, r, c: torch.full_like(x, float("nan")), z, {}, few_step(2))
    assert result.isnan().all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"z": torch.zeros(2, 1, 2, 2, dtype=torch.int64)}, "floating point"),
        ({"guidance": 2.0}, "empty condition"),
        ({"noise": lambda step: torch.zeros(2, 1, 2, 1)}, "noise of step 0"),
        ({"network": lambda x, t, r, c: x[:, :, :1]}, "forward returns Tensor of shape"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(changes, word):
    arguments = {
        "network": GaussianFlow(),
        "z": normal(2, 1, 2, 2),
        "condition": {},
        "config": few_step(2),
    } | changes
    with pytest.raises(InputError, match=word) as caught:
        sample(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_importing_the_samplers_leaves_diffusers_alone():
    import subprocess
    import sys

    code = "import sys, twinrl.sampling; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
