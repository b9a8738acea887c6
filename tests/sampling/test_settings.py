import pytest
import torch
from pydantic import ValidationError

from twinrl.config.errors import InputError
from twinrl.sampling import SamplerConfig, any_step, euler, few_step, multi_step, nfe, plan, time_grid


def test_the_grid_of_the_readme_settings():
    assert time_grid(few_step(2)).tolist() == pytest.approx([0.999, 0.6, 0.0])
    assert time_grid(few_step(4)).tolist() == pytest.approx([0.999, 0.832667, 0.666333, 0.5, 0.0], abs=1e-6)
    assert time_grid(any_step(4)).tolist() == time_grid(few_step(4)).tolist()


def test_one_step_jumps_from_exactly_one():
    assert time_grid(few_step(1)).tolist() == [1.0, 0.0]


def test_euler_divides_the_whole_interval_evenly():
    assert time_grid(euler(5)).tolist() == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("gap_end", [0.0, 0.3])
@pytest.mark.parametrize("warp", [(1.0, 1.0, 1.0), (1.17, 0.8, 1.1), (0.3, 4.0, 2.0)])
def test_grids_fall_from_one_side_to_the_other(order, steps, gap_end, warp):
    config = SamplerConfig(steps=steps, order=order, gap_end=gap_end, kumaraswamy=warp)
    grid = time_grid(config)
    assert grid.dtype == torch.float64
    assert len(grid) == (steps if order == 1 else (steps + 1) // 2) + 1
    assert grid[0] < 1
    assert grid[-1] == 0
    assert (grid.diff() < 0).all()


def test_the_warp_is_the_kumaraswamy_distribution_function():
    config = SamplerConfig(steps=3, gap_start=0.2, gap_end=0.2, kumaraswamy=(2.0, 3.0, 0.5))
    u = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    expected = 1 - (1 - (1 - u**2) ** 3).sqrt()
    assert time_grid(config)[:-1].tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("steps", range(1, 9))
def test_nfe_is_the_length_of_the_plan(steps):
    for order in (1, 2):
        config = SamplerConfig(steps=steps, order=order)
        assert nfe(config) == len(plan(config)) <= steps
        assert nfe(config, guidance=2.0) == 2 * nfe(config)
    assert nfe(SamplerConfig(steps=steps)) == steps


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"style": "multi"},
        {"order": 3},
        {"stochastic_ratio": 1.5},
        {"stochastic_ratio": "ode"},
        {"extrapolation": -0.1},
        {"kumaraswamy": (1.0, 0.0, 1.0)},
        {"kumaraswamy": (1.0, 1.0)},
        {"gap_start": 1.0},
        {"gap_end": float("nan")},
        {"nfe": 4},
    ],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValidationError):
        SamplerConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"order": 2, "gap_start": 0.0}, "order 2"),
        ({"gap_start": 0.5, "gap_end": 0.5}, "gaps"),
    ],
)
def test_undefined_combinations_are_refused_in_one_line(wrong, word):
    with pytest.raises(InputError, match=word) as caught:
        SamplerConfig(**wrong)
    assert "\n" not in str(caught.value)


def test_settings_are_values():
    config = multi_step(8)
    assert config == SamplerConfig.model_validate_json(config.model_dump_json())
    with pytest.raises(ValidationError):
        config.steps = 3
