"""Linear layers in 8 bits: refused where they cannot run, and elsewhere near the others, with the same names."""

import importlib.util

import pytest
import torch
from torch import nn

from twinrl.config.errors import InputError
from twinrl.machine import float8

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_what_it_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float8, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"model\.float8 needs torchao"):
        float8.check(GPU, "model.float8")
    monkeypatch.setattr(float8, "find_spec", lambda name: object())
    with pytest.raises(InputError, match=r"model\.float8 needs a GPU; got cpu"):
        float8.check(CPU, "model.float8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(InputError, match=r"too old; got compute capability 8\.0; expected compute capability 8\.9"):
        float8.check(GPU, "model.float8")


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_emulated_products_round_to_eight_bits() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 5))
    x = torch.randn(16, 32)
    expected, names = block(x).detach(), list(block.state_dict())
    float8.convert([block], emulate=True)
    assert [type(layer).__name__ for layer in block] == ["Float8Linear", "Linear"]  # 5 is no multiple of 16
    assert list(block.state_dict()) == names
    found = block(x)
    away = float((found.detach() - expected).norm() / expected.norm())
    assert 1e-4 < away < 0.1  # three digits of two bits: each product is off by at most 2⁻⁴
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())
