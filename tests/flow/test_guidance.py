"""Guidance in the target: which rows are enhanced, from where, and at what cost."""

import pytest
import torch
from torch import Tensor

from twinrl.flow.branches import Rows
from twinrl.flow.conditions import Condition
from twinrl.flow.guidance import GuidanceConfig, enhanced_velocity


class CountingTeacher:
    """F̄ = 2·x + t + label, so that conditional and empty passes differ by the label; keeps its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, c: Condition) -> Tensor:
        self.calls.append((t, r))
        return 2 * x + (t + c["label"])[:, None]


TIMES = torch.tensor([0.0, 0.2, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
LABELS, NULL = torch.arange(7).double(), torch.full((7,), -1.0).double()


@pytest.fixture
def rows() -> Rows:
    x, z = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Rows(torch.arange(7), x, z, TIMES, TIMES / 2, {"label": LABELS}, {"label": NULL}, None, 7)  # type: ignore[arg-type]


def difference() -> Tensor:
    """F̄(c) − F̄(∅): label + 1 in every element."""
    return (LABELS - NULL)[:, None]


def test_strict_limits(rows: Rows) -> None:
    """Rows at t = lo and t = hi keep the path's velocity, rows just inside do not."""
    v_star = enhanced_velocity(rows, GuidanceConfig(strength=0.5, range=(0.25, 0.75)), CountingTeacher())
    enhanced = ((v_star - rows.v) != 0).all(1)
    assert enhanced.tolist() == [False, False, False, True, False, False, False]
    torch.testing.assert_close(v_star[3], rows.v[3] + 0.5 * difference()[3])


def test_default_range_leaves_one_step_rows_alone(rows: Rows) -> None:
    """With [0, 1] the e2e rows at t = 1 are not enhanced."""
    v_star = enhanced_velocity(rows, GuidanceConfig(), CountingTeacher())
    torch.testing.assert_close(v_star[1:-1], (rows.v + 0.5 * difference())[1:-1])
    assert torch.equal(v_star[[0, -1]], rows.v[[0, -1]])


def test_null_range_enhances_every_row(rows: Rows) -> None:
    v_star = enhanced_velocity(rows, GuidanceConfig(strength=2, range=None), CountingTeacher())
    torch.testing.assert_close(v_star, rows.v + 2 * difference())


@pytest.mark.parametrize("strength", [0.0, 1.0, 4.0])
def test_image_free_form_starts_from_the_teacher(rows: Rows, strength: float) -> None:
    """v* = F̄(∅) + w·(F̄(c) − F̄(∅)) where enhanced, z − x at t = 1; w = 1 is the conditional teacher."""
    v_star = enhanced_velocity(rows, GuidanceConfig(strength=strength, form="teacher"), CountingTeacher())
    empty = 2 * rows.x_t + (rows.t + NULL)[:, None]
    torch.testing.assert_close(v_star[1:-1], (empty + strength * difference())[1:-1])
    assert torch.equal(v_star[-1], rows.v[-1])


def test_teacher_is_asked_for_instantaneous_velocities(rows: Rows) -> None:
    teacher = CountingTeacher()
    enhanced_velocity(rows, GuidanceConfig(), teacher)
    assert len(teacher.calls) == 2
    assert all(torch.equal(t, rows.t) and torch.equal(r, rows.t) for t, r in teacher.calls)


def test_zero_strength_makes_no_teacher_pass(rows: Rows) -> None:
    teacher = CountingTeacher()
    assert torch.equal(enhanced_velocity(rows, GuidanceConfig(strength=0), teacher), rows.v)
    assert teacher.calls == []


@pytest.mark.parametrize("limits", [(0.5, 0.5), (1.0, 0.0)])
def test_empty_range_is_refused(limits: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="expected lo < hi"):
        GuidanceConfig(range=limits)
