"""What Adam's state says, against numbers made by hand."""

import math

import pytest
import torch
from torch import nn

from twinrl.gradients import telemetry
from twinrl.run import names

ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("kind", ADAMS)
def test_rms_by_hand(kind: str) -> None:
    """β₂ = 0.9. Gradients 1 then 3: v = 0.9·0.1 + 0.1·9 = 0.99, v̂ = 0.99/(1 − 0.81) = 5.2105, g²/v̂ = 1.7273."""
    p = parameter(1.0)
    optimizer = ADAMS[kind]([p], lr=0.1, betas=(0.5, 0.9))
    found = []
    for gradient in (1.0, 3.0):
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        found.append(telemetry.rms(optimizer)[p].item())
        optimizer.step()
    assert found == pytest.approx([1, math.sqrt(9 / (0.99 / 0.19))], rel=1e-12)


def test_rms_is_a_mean_over_the_tensor_and_bounded_by_eps() -> None:
    """An entry that never had a gradient counts 0; one of 1e-12 with eps = 1e-8 counts 1e-8, not 1."""
    p = parameter(1.0, 1.0, 1.0)
    optimizer = torch.optim.AdamW([p], betas=(0.5, 0.9), eps=1e-8)
    p.grad = torch.tensor([2.0, 0.0, 1e-12], dtype=torch.float64)
    assert telemetry.rms(optimizer)[p].item() == pytest.approx(math.sqrt((1 + 0 + 1e-8) / 3), rel=1e-12)


def test_rms_shows_a_spike_after_a_calm_past() -> None:
    p = parameter(1.0)
    optimizer = torch.optim.AdamW([p], betas=(0.9, 0.99))
    for gradient in [1.0] * 50:
        p.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
    p.grad = torch.tensor([20.0], dtype=torch.float64)
    assert telemetry.rms(optimizer)[p] > 2.3


def test_frozen_parameters_have_no_rms() -> None:
    p, frozen = parameter(1.0), parameter(1.0)
    optimizer = torch.optim.AdamW([p, frozen])
    assert telemetry.rms(optimizer) == {}
    p.grad = torch.ones_like(p)
    assert list(telemetry.rms(optimizer)) == [p]
    optimizer.step()
    assert list(telemetry.rms(optimizer)) == [p]


def test_other_optimizers_have_no_rms() -> None:
    p = parameter(1.0)
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        assert telemetry.rms(optimizer) == {}
        optimizer.step()


def test_nan_is_the_largest() -> None:
    values = [torch.tensor(value) for value in (1.0, 3.0, 2.0)]
    assert telemetry.largest(values) == 3
    assert telemetry.largest([*values, torch.tensor(math.nan)]).isnan()
    assert telemetry.largest([]) == 0


def test_finite_parameters() -> None:
    assert telemetry.all_finite([parameter(1.0), parameter(2.0)])
    assert not telemetry.all_finite([parameter(1.0), parameter(2.0, math.inf)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_a_step_leaves_unmoved_by_hand(dtype: torch.dtype) -> None:
    """Adam's first step is lr of any weight with a gradient: below half a unit of 1, above it of 1e-3."""
    unit = torch.finfo(dtype).eps
    p, wide = (nn.Parameter(torch.tensor([1.0, 1.0, 1e-3, 1.0]).to(d)) for d in (dtype, torch.float32))
    optimizer = torch.optim.AdamW([p, wide], lr=0.2 * unit, weight_decay=0)
    for parameter in (p, wide):
        parameter.grad = torch.tensor([1.0, -1.0, 1.0, 0.0]).to(parameter.dtype)
    unmoved = telemetry.Unmoved(optimizer, [p, wide])
    optimizer.step()
    assert {name: share.item() for name, share in unmoved.shares().items()} == {names.UNMOVED: pytest.approx(2 / 3)}


def test_second_moments_of_low_precision_that_cannot_fall() -> None:
    """At β₂ = 0.999 a moment falls by 1e-3 of itself, a quarter of a unit of bf16; at 0.9 it does."""
    for beta, share in ((0.999, 1.0), (0.9, 0.0)):
        p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        optimizer = torch.optim.AdamW([p], lr=0.1, betas=(0.9, beta))
        p.grad = torch.ones_like(p)
        optimizer.step()
        p.grad = torch.full_like(p, 1e-3)
        unmoved = telemetry.Unmoved(optimizer, [p])
        optimizer.step()
        assert unmoved.shares()[names.UNMOVED_MOMENTS] == share


def test_in_float32_nothing_is_watched() -> None:
    p = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.ones_like(p)
    unmoved = telemetry.Unmoved(optimizer, [p])
    optimizer.step()
    assert unmoved.shares() == {}
