"""A gradient is one vector in several tensors: norms, products, and what is in place."""

import math

import pytest
import torch
from torch import Tensor, nn

from twinrl.gradients import Gradient


def vector(*parts: list[float], dtype: torch.dtype = torch.float64) -> Gradient:
    return Gradient({i: torch.tensor(part, dtype=dtype) for i, part in enumerate(parts)})


def test_norm_and_product_by_hand() -> None:
    a, b = vector([3.0, 0.0], [4.0]), vector([1.0, 7.0], [-2.0])
    assert a.norm == 5
    assert a.dot(b) == b.dot(a) == 3 - 8
    assert a.dot(a) == a.norm.square()


def test_parameters_that_only_one_reaches() -> None:
    a, b = Gradient({0: torch.ones(2), 1: torch.ones(3)}), Gradient({1: 2 * torch.ones(3), 4: torch.ones(1)})
    assert a.dot(b) == 6
    summed = a.plus(b)
    a.add_(b).tensors[4].add_(1)
    assert {i: tensor.tolist() for i, tensor in a.tensors.items()} == {0: [1] * 2, 1: [3] * 3, 4: [2]}
    assert {i: tensor.tolist() for i, tensor in summed.tensors.items()} == {0: [1] * 2, 1: [3] * 3, 4: [1]}
    assert b.tensors[4].item() == 1


def test_nothing_has_no_length() -> None:
    nothing, something = Gradient({}), vector([1.0])
    assert nothing.norm == nothing.dot(something) == something.dot(nothing) == 0
    assert nothing.scale_(2.0).norm == 0
    nothing.add_(something)
    assert nothing.norm == 1


def test_scaling_takes_the_norm_along_and_adding_measures_again() -> None:
    gradient = vector([3.0, 0.0], [-4.0])
    assert gradient.norm == 5
    gradient.scale_(torch.tensor(-0.5, dtype=torch.float64))
    assert gradient.norm == 2.5
    assert gradient.tensors[1].item() == 2
    gradient.add_(vector([3.0, 0.0], [-4.0]))
    assert gradient.tensors[0].tolist() == [1.5, 0]
    assert gradient.norm.item() == pytest.approx(math.hypot(1.5, 2))
    gradient.tensors[0].zero_()
    gradient.changed()
    assert gradient.norm == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    """Two tensors of norm 1e25: their squares are beyond float32, their norm is not. Scaling keeps the dtype."""
    for size in (1e25, 1e-25):
        gradient = vector([size], [size], dtype=dtype)
        assert gradient.norm.item() == pytest.approx(math.sqrt(2) * size, rel=1e-2)
        assert gradient.scale_(torch.tensor(0.5, dtype=torch.float64)).tensors[0].dtype == dtype


def test_many_small_parts_do_not_drown() -> None:
    """In float32, 1e8 would not see 100 times 1 among its squares."""
    gradient = vector([1e4], *([1.0] for _ in range(100)), dtype=torch.float32)
    assert gradient.norm.item() == pytest.approx(math.sqrt(1e8 + 100), abs=1e-9)


def test_nan_and_infinity_show_in_the_norm() -> None:
    assert vector([1.0, math.inf]).norm == math.inf
    assert vector([1.0], [math.nan]).norm.isnan()


def test_taking_empties_and_putting_fills() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    given: dict[int, Tensor] = {0: torch.ones(2), 2: torch.full((2,), 2.0)}
    for i, tensor in given.items():
        parameters[i].grad = tensor
    gradient = Gradient.take(parameters)
    assert all(parameter.grad is None for parameter in parameters)
    assert {i: t.data_ptr() for i, t in gradient.tensors.items()} == {i: t.data_ptr() for i, t in given.items()}
    gradient.put(parameters)
    assert [parameter.grad is None for parameter in parameters] == [False, True, False]


def test_a_clone_has_tensors_of_its_own() -> None:
    gradient = vector([1.0])
    copied = gradient.clone()
    copied.scale_(3.0)
    assert (gradient.tensors[0].item(), copied.tensors[0].item()) == (1, 3)


def test_every_norm_and_product_asks_the_other_ranks() -> None:
    """Also of a rank that holds no rows of a term: the others wait for it."""
    asked = []

    def total(value: Tensor) -> Tensor:
        asked.append(value.dtype)
        return value + 9

    empty, full = Gradient({}, total), Gradient({0: torch.tensor([4.0])}, total)
    assert (empty.norm, full.norm) == (3, 5)
    assert (empty.dot(full), full.dot(full)) == (9, 25)
    assert asked == [torch.float64] * 4
