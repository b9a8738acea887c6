"""Modules are on the device while they are used and home afterwards. The other device is torch's ``meta``: real, and
without values, so that whatever comes back from it would show."""

import copy

import pytest
import torch
from torch import nn

from twinrl.machine.visiting import visiting

META, CPU = torch.device("meta"), torch.device("cpu")


def frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).eval().requires_grad_(False)


def places(module: nn.Module) -> set[str]:
    return {t.device.type for t in (*module.parameters(), *module.buffers())}


def test_there_inside_and_home_with_the_same_memory_after() -> None:
    module = frozen()
    values, memory = copy.deepcopy(module.state_dict()), [t.data_ptr() for t in module.state_dict().values()]
    with visiting([module], META):
        assert places(module) == {"meta"}
        assert module(torch.zeros(2, 3, device=META)).device == META
        with visiting([module], META):
            assert places(module) == {"meta"}
        assert places(module) == {"meta"}  # the inner visit was none
    assert [t.data_ptr() for t in module.state_dict().values()] == memory
    assert all(torch.equal(values[name], value) for name, value in module.state_dict().items())


def test_home_after_an_error() -> None:
    module = frozen()
    with pytest.raises(KeyError), visiting([module], META):
        raise KeyError
    assert places(module) == {"cpu"}


def test_nothing_happens_where_they_are_already() -> None:
    module, x = frozen(), torch.randn(2, 3)
    data = [p.data_ptr() for p in module.parameters()]
    with visiting([module], CPU):
        assert [p.data_ptr() for p in module.parameters()] == data
        leaf = x.clone().requires_grad_(True)
        module(leaf).sum().backward()
    assert leaf.grad is not None


def test_trained_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="only frozen modules"), visiting([nn.Linear(2, 2)], META):
        pass
