"""Weights and optimizer states that do not fit are refused in one line that names the file and the keys."""

import pytest
import torch
from torch import nn

from twinrl.config.errors import InputError
from twinrl.run import fit


def network(width: int = 3, second: bool = True) -> nn.Module:
    return nn.ModuleDict({"one": nn.Linear(2, width)} | ({"two": nn.Linear(2, 2)} if second else {}))


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        (network(width=4), "2 of another shape (one.weight (4, 2) instead of (3, 2), one.bias"),
        (network(second=False), "2 missing (two.bias, two.weight)"),
        (nn.ModuleDict({"six": nn.Linear(1, 1), **network()}), "2 unexpected (six.bias, six.weight)"),
    ],
)
def test_weights_of_another_architecture_name_file_and_keys(stored: nn.Module, words: str) -> None:
    target = network()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(InputError) as error:
        fit.load_module(target, stored.state_dict(), "runs/a/step-1/ema.safetensors")
    message = str(error.value)
    assert "runs/a/step-1/ema.safetensors" in message
    assert words in message
    assert "fix: " in message
    assert "\n" not in message
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())  # not half loaded


def optimizer(shape: tuple[int, ...] = (3, 2), n: int = 2) -> torch.optim.Optimizer:
    parameters = [nn.Parameter(torch.ones(shape)) for _ in range(n)]
    made = torch.optim.AdamW(parameters, lr=0.1)
    for parameter in parameters:
        parameter.grad = torch.randn(shape)
    made.step()
    return made


def test_optimizer_round_trip() -> None:
    first, second = optimizer(), optimizer()
    second.param_groups[0]["lr"] = 0.7
    fit.load_optimizer(second, fit.optimizer_tensors(first), "here")
    a, b = (fit.optimizer_tensors(o) for o in (first, second))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert second.param_groups[0]["lr"] == 0.7


@pytest.mark.parametrize(
    "tensors",
    [
        fit.optimizer_tensors(optimizer((2, 3))),
        fit.optimizer_tensors(optimizer(n=3)),
        {"weight": torch.ones(3, 2)},
        {"x.exp_avg": torch.ones(3, 2)},
    ],
)
def test_state_of_another_optimizer(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(InputError, match=r"^the optimizer's state in here/o\.safetensors .* got key .*; fix: "):
        fit.load_optimizer(optimizer(), tensors, "here/o.safetensors")
