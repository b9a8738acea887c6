"""Frozen modules that wait on the host and visit the device while they are used.

Training reads prepared latents, so VAE and reward models are idle for most of a step. With ``machine.offload`` they are
loaded on the CPU and stay there; whoever uses them does it inside :func:`visiting`, whose modules are on the device
for that long. Their weights never change, so the host's are kept and put back: nothing is copied home.

With ``fsdp.frozen=sharded`` every process keeps a part of them instead, and has the whole inside
(:mod:`twinrl.fsdp.frozen`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

IN_PARTS: "WeakKeyDictionary[nn.Module, Callable[[], AbstractContextManager[None]]]" = WeakKeyDictionary()
"""Modules of which this process keeps a part → what makes them whole."""


@contextmanager
def visiting(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Inside, the frozen ``modules`` are on ``device``; afterwards each is where it was.

    Modules that are there already, also because an outer visit brought them, stay. A gradient through them has to be
    taken inside.

    *When to use*: around every use of a frozen module that may wait on the host.

    Raises:
        ValueError: a module has parameters that are trained: their updates would be lost.
    """
    with ExitStack() as stack:
        modules = list(modules)
        for module in modules:
            if module in IN_PARTS:
                stack.enter_context(IN_PARTS[module]())
        with _moved(modules, device):
            yield


@contextmanager
def _moved(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
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
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor.data = tensor.data.pin_memory()  # once; a copy from other memory would be waited for
    moved = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
