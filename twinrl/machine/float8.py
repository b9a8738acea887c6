"""Linear layers whose products are computed in 8 bits, by torchao: weights, gradients and optimizer stay as they are.

Inputs, weights and gradients are scaled by their largest number and rounded to float8 for each product
(arXiv:2209.05433). The modules keep their names and parameters, so checkpoints and exports are those of other runs.
"""

from collections.abc import Iterable
from importlib.util import find_spec

import torch
from torch import nn

from twinrl.config.errors import InputError

OLDEST = (8, 9)
"""Compute capability from which GPUs multiply in 8 bits: Ada and Hopper."""
MULTIPLE = 16
"""Of the sides of a matrix."""


def check_torchao(key: str) -> None:
    """Raises InputError where torchao is not installed."""
    if find_spec("torchao") is None:
        raise InputError(f"{key} needs torchao", fix="pip install torchao, or leave it out")


def check(device: torch.device, key: str) -> None:
    """Raises InputError where a device does not multiply in 8 bits, or torchao is not installed."""
    check_torchao(key)
    if device.type != "cuda":
        raise InputError(f"{key} needs a GPU", got=f"{device}", fix="leave it out, or set machine.device")
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        got, expected = (f"compute capability {major}.{minor}" for major, minor in (found, OLDEST))
        raise InputError(f"{key}: {device} is too old", got=got, expected=f"{expected} or newer")


def convert(blocks: Iterable[nn.Module], emulate: bool = False) -> None:
    """Make the linear layers of blocks, whose sides are multiples of 16, compute in 8 bits; in place.

    Arguments:
        blocks: of a network, which may be on the meta device.
        emulate: round to 8 bits and compute as before; for devices that can't.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    for block in blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=_fits)


def _fits(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not module.in_features % MULTIPLE and not module.out_features % MULTIPLE
