"""What a process holds, in bytes."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from twinrl.trainer import Trainer


def held(tensor: Tensor | None) -> int:
    """Bytes of a tensor in this process."""
    if tensor is None:
        return 0
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()


def whole(tensor: Tensor | None) -> int:
    """Bytes of the whole tensor."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def shares(trainer: Trainer) -> dict[str, float]:
    """Part of the whole that this process holds, after a step."""
    trainer.train_step()
    teacher, state = trainer.objective.teacher, trainer.optimizer.state.values()
    assert teacher.ema is not None
    groups: dict[str, list[Tensor | None]] = {
        "parameters": list(trainer.engine.parameters),
        "gradients": [p.grad for p in trainer.engine.parameters],
        "optimizer": [value for entry in state for value in entry.values()],
        "ema": list(teacher.ema.parameters()),
    }
    return {name: sum(map(held, group)) / sum(map(whole, group)) for name, group in groups.items()}


def reductions(trainer: Trainer) -> int:
    """How often gradients are summed over the processes in a step."""
    with _Reductions() as seen:
        trainer.train_step()
    return seen.number


class _Reductions(TorchDispatchMode):
    """Counts reduce-scatters."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # it comes again with the parts
            return NotImplemented
        self.number += "reduce_scatter" in str(func)
        return func(*args, **(kwargs or {}))


def peak_of_building(build: Callable[[], nn.Module]) -> int:
    """Most bytes of tensors alive at once in this process while modules are put together, and at the end."""
    gc.collect()  # sharded modules refer to themselves in circles
    seen = [_alive()]
    hook = register_module_module_registration_hook(lambda *_: seen.append(_alive()))
    try:
        network = build()
    finally:
        hook.remove()
    gc.collect()
    seen.append(_alive())
    del network
    return max(seen) - seen[0]


def _alive() -> int:
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            own = thing._local_tensor if isinstance(thing, DTensor) else thing
            if own.device.type != "meta" and own.layout == torch.strided:
                storage = own.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
