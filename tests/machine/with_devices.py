"""Devices that are not there: what is counted on them is what a real one would do. Run by ``test_simulated.py``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from twinrl.machine.moving import known, moved, on_host, rows_of
from twinrl.machine.simulated import Simulation
from twinrl.machine.simulated.places import Places, Rule
from twinrl.machine.simulated.work import GPU

HERE = Path(__file__).parents[1]
CUDA = torch.device("cuda", 0)


def simulation(*owners: Rule) -> Simulation:
    return Simulation(Places([HERE], owners=owners))


def waits(action: Callable[[], Any]) -> list[tuple[str, int]]:
    """Kinds of waits in an action, and how often."""
    with simulation().running() as found:
        action()
    assert all(wait.line.startswith("tests/machine/with_devices.py:") for wait in found.waits.found())
    return [(wait.kind, wait.times) for wait in found.waits.found()]


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device=CUDA)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (lambda: ones(3).sum().item(), "item"),
        (lambda: bool(ones(1) > 0), "item"),
        (lambda: ones(3).cpu(), "to host"),
        (lambda: ones(3).tolist(), "to host"),
        (lambda: torch.ones(3).to(CUDA), "to device"),
        (lambda: torch.tensor([1.0, 2.0], device=CUDA), "to device"),
        (lambda: ones(3)[torch.tensor([0, 2])], "index"),
        (lambda: ones(3)[ones(3) > 0], "shape"),
        (lambda: ones(3).nonzero(), "shape"),
        (lambda: torch.cuda.synchronize(), "stream"),
    ],
)
def test_what_is_waited_for(action: Callable[[], Any], kind: str) -> None:
    assert waits(action) == [(kind, 1)]


def test_what_is_not_waited_for() -> None:
    def work() -> None:
        x = moved(torch.ones(4), CUDA, torch.bfloat16)
        x = rows_of(x, torch.tensor([0, 2])) + rows_of(x, torch.tensor([True, False, True, False]))
        mask = known(moved(torch.tensor([True, False]), CUDA), torch.tensor([True, False]))
        assert on_host(mask).tolist() == [True, False]
        x[x > 0] = 0.0
        torch.where(x.isfinite(), x, 0.0).sum()

    assert waits(work) == []


def test_values_that_came_from_the_host_decide_as_they_would() -> None:
    with simulation().running() as found:
        t = moved(torch.tensor([0.25, 0.75]), CUDA)
        assert (t * 2).tolist() == [0.5, 1.5]
        assert [bool(value > 0.5) for value in t] == [False, True]
        assert not found.guesses
        torch.randn(3, device=CUDA).tolist()
    assert sum(found.guesses.values()) == 1


def test_memory_is_counted_while_it_is_held() -> None:
    with simulation(Rule("with_devices.py", "ones", "ones")).running() as found:
        a, b = ones(1024), ones(2048)
        assert found.memory.now == 4 * 3072
        view = a[:10]
        del a, b
        assert found.memory.now == 4 * 1024
        found.memory.belongs("somebody", [view])
        assert found.memory.held() == {"somebody": 4 * 1024}
        view.untyped_storage().resize_(0)
        assert found.memory.now == 0
    assert found.memory.peaks["forward"].owners == {"ones": 4 * 3072}


def test_operations_give_what_they_first_gave() -> None:
    """Sizes, strides, views and what is written in place: inferred, and by recipe."""

    def work(x: Tensor) -> list[Tensor]:
        y = x.transpose(0, 1) @ x
        y.add_(1).mul_(y)
        parts = y.split(2)
        joined = torch.stack([*parts[:2], parts[1]]).permute(2, 0, 1)
        return [y, joined, joined[1:].contiguous(), torch.view_as_complex(x.view(4, 3, 2)), *torch.var_mean(x, 0)]

    with simulation().running() as found:
        first, again = (work(torch.empty(4, 6, device=CUDA)) for _ in range(2))
        real = work(torch.empty(4, 6))
    for one, other, true in zip(first, again, real, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert (one.shape, one.stride(), one.dtype) == (true.shape, true.stride(), true.dtype)
    assert len(found.recipes) < found.waits.operations / 1.5


def test_a_roofline_takes_the_longer_of_arithmetic_and_memory() -> None:
    gpu = GPU(half=1e6, single=1e3, memory=1e4, capacity=1e9)
    with simulation().running() as found:
        x = torch.empty(10, 10, device=CUDA)
        found.forget()
        _ = x @ x
        assert found.work.flops == 2000
        assert found.work.on(gpu).seconds == pytest.approx(2000 / 1e3)
        _ = x + x
    seconds, share = found.work.on(gpu)
    assert seconds == pytest.approx(2 + 3 * 400 / 1e4)
    assert share == pytest.approx(2000 / seconds / 1e6)


def test_tensors_of_two_devices_do_not_mix() -> None:
    with simulation().running(), pytest.raises(RuntimeError, match="device"):
        ones(3) + torch.ones(3)
