"""Frozen modules that wait on the host and visit the device while they are used.

Training reads prepared latents, so VAE and reward models are idle for most of a step. With ``machine.offload`` they are
loaded on the CPU and stay there; whoever uses them does it inside :func:`visiting`, whose modules are on the device
for that long. Their weights never change, so the host's are kept and put back: nothing is copied home.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the frozen ``modules`` are on ``device``; afterwards each is where it was.

    Modules that are there already, also because an outer visit brought them, stay. A gradient through them has to be
    taken inside.

    *When to use*: around every use of a frozen module that may wait on the host.

    Raises:
        ValueError: a module has parameters that are trained: their updates would be lost.
    """
    at_home = [place for module in modules for place in _places(module, device)]
    there: dict[int, Tensor] = {}  # tied weights stay tied
    try:
        for held, name, waiting in at_home:
            if id(waiting) not in there:
                there[id(waiting)] = _copy(waiting, device)
            held[name] = there[id(waiting)]
        yield
    finally:
        for held, name, waiting in at_home:
            held[name] = waiting


def _places(module: nn.Module, device: torch.device) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where the module's tensors that are not on ``device`` are held: the owner's dict, the name in it, the tensor."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None and tensor.requires_grad:
                    raise ValueError(f"only frozen modules visit a device; {name} is trained")
                if tensor is not None and tensor.device != device:
                    yield held, name, tensor


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    moved = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
