import pytest
import torch

from twinrl.config.errors import InputError
from twinrl.sampling import SamplerConfig, few_step, initial_state, plan, update
from twinrl.sampling.update import sde_ratio


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("style", "expected"), [("few", [0, 0, 0]), ("any", [0.6, 0.2, 0]), ("mul", [0.9, 0.6, 0.2])])
def test_target_times_follow_the_style(style, expected):
    evaluations = plan(SamplerConfig(style=style), [0.9, 0.6, 0.2, 0.0])
    assert [e.time for e in evaluations] == [0.9, 0.6, 0.2]
    assert [e.target_time for e in evaluations] == expected


@pytest.mark.parametrize("style", ["few", "any", "mul"])
def test_order_2_asks_twice_at_the_times_between_and_for_the_same_target(style):
    evaluations = plan(SamplerConfig(style=style, order=2), [0.9, 0.6, 0.2, 0.0])
    assert [e.time for e in evaluations] == [0.9, 0.6, 0.6, 0.2, 0.2]
    assert [e.corrects for e in evaluations] == [False, True, False, True, False]
    targets = {}
    for evaluation in evaluations:
        assert targets.setdefault(evaluation.time, evaluation.target_time) == evaluation.target_time


@pytest.mark.parametrize(
    "times",
    [[0.5], [0.5, 0.6, 0.0], [1.1, 0.0], [0.9, 0.5], [0.5, 0.5, 0.0], [0.5, float("nan"), 0.0], [0.0, 0.0]],
)
def test_unusable_times_are_refused(times):
    with pytest.raises(InputError, match="sampling times"):
        plan(SamplerConfig(), times)


def test_order_2_from_one_is_refused():
    with pytest.raises(InputError, match="undefined at t = 1"):
        plan(SamplerConfig(order=2), [1.0, 0.5, 0.0])


def test_extrapolation_starts_at_the_third_step_and_spares_the_result():
    config = SamplerConfig(steps=6, extrapolation=0.4)
    assert [e.extrapolation for e in plan(config)] == [0, 0, 0.4, 0.4, 0.4, 0]


def test_the_sde_ratio_is_its_formula_at_every_step():
    config = SamplerConfig(steps=40, style="mul", stochastic_ratio="sde", gap_end=0.0)
    evaluations = plan(config)
    for e in evaluations[:-1]:
        assert e.stochastic_ratio == pytest.approx(min(1, (e.start - e.stop) * 2 * e.start / e.stop**2))
    assert len({round(e.stochastic_ratio, 6) for e in evaluations}) > 10
    assert sde_ratio(0.5, 0.0) == 1.0


def test_a_step_without_noise_stays_on_the_predicted_line():
    x, F = normal(2, 1, 3, 3), normal(2, 1, 3, 3).flip(0)
    first = plan(SamplerConfig(stochastic_ratio=0.0), [0.8, 0.3, 0.0])[0]
    state = update(first, initial_state(x), F)
    torch.testing.assert_close(state.x, x - 0.5 * F)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_renoising_keeps_the_noise_level(rho):
    """With x̂ = 0 and unit ẑ and ε the next state has standard deviation t' for every ρ."""
    z, noise = normal(40_000, 1), normal(2, 40_000, 1)[1]
    first = plan(SamplerConfig(stochastic_ratio=rho), [1.0, 0.4, 0.0])[0]
    state = update(first, initial_state(z), z, noise)  # F = z at t = 1 means x̂ = 0, ẑ = z
    assert state.x.std().item() == pytest.approx(0.4, rel=0.02)


def test_missing_noise_is_an_error_and_the_last_step_needs_none():
    evaluations = plan(few_step(2))
    x = normal(2, 1, 3, 3)
    with pytest.raises(ValueError, match="noise"):
        update(evaluations[0], initial_state(x), x)
    assert [e.needs_noise for e in evaluations] == [True, False]
    torch.testing.assert_close(update(evaluations[1], initial_state(x), x).x, x - 0.6 * x)


def test_a_correction_without_its_prediction_is_an_error():
    correcting = plan(SamplerConfig(order=2), [0.8, 0.3, 0.0])[1]
    x = normal(2, 1, 3, 3)
    with pytest.raises(ValueError, match="correction"):
        update(correcting, initial_state(x), x)


def test_a_correction_that_agrees_changes_nothing_and_discards_injected_noise():
    """Where ẑ' = ẑ, order 2 gives the Euler step, whatever noise the prediction injected."""
    x, z_hat, noise = normal(3, 2, 4, 4)
    F = (z_hat - x) / (1 - 0.8)
    predicting, correcting = plan(SamplerConfig(order=2, stochastic_ratio=1.0), [0.8, 0.3, 0.0])[:2]
    predicted = update(predicting, initial_state(x), F, noise)
    corrected = update(correcting, predicted, (z_hat - predicted.x) / (1 - 0.3))
    torch.testing.assert_close(corrected.x, x - 0.5 * F)
