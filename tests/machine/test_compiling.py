"""What cannot be compiled is refused in one line; what can is compiled in place, and a copy of it is not."""

import copy
import shutil
from collections.abc import Iterator

import pytest
import torch
import torch._functorch.config as functorch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from twinrl.config.errors import InputError
from twinrl.machine import compiling

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Layer(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(InputError, match=r"machine\.compile: torch has no backend nowhere; expected one of .*inductor"):
        compiling.check("nowhere", CPU)
    compiling.check("aot_eager", GPU)


def test_inductor_needs_a_compiler_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"needs a C\+\+ compiler"):
        compiling.check("inductor", CPU)
    compiling.check("eager", CPU)


def test_a_device_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.raises(InputError, match=r"cuda is too old; got compute capability 6\.1"):
        compiling.check("inductor", GPU)


@pytest.fixture
def _as_before() -> Iterator[None]:
    before = functorch.donated_buffer  # compiling changes it
    yield
    functorch.donated_buffer = before


@pytest.mark.usefixtures("_as_before")
def test_a_copy_computes_with_its_own_weights() -> None:
    block = Layer()
    compiling.compile_blocks([block], "eager")
    counters.clear()
    x = torch.ones(1, 2)
    expected = block(x)
    assert counters["stats"]["unique_graphs"] == 1
    copied = copy.deepcopy(block)
    with torch.no_grad():
        copied.linear.weight.mul_(2)
    assert torch.equal(copied(x), 2 * expected)
    assert torch.equal(block(x), expected)
