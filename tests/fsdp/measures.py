"""What a process holds, in bytes."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twinrl.machine.visiting import IN_PARTS
from twinrl.training.trainer import Trainer


def held(tensor: Tensor | None) -> int:
    """Bytes of a tensor in this process."""
    if tensor is None:
        return 0
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.numel() * own.element_size()


def whole(tensor: Tensor | None) -> int:
    """Bytes of the whole tensor."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def kept(module: nn.Module) -> int:
    """Bytes of memory behind a module's tensors, and of its part where it is in parts."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in (*module.parameters(), *module.buffers())}
    together = IN_PARTS.get(module)
    own = 0 if together is None else sum(part.nbytes for part in together.__self__.own.values())  # type: ignore[attr-defined]
    return own + sum(storage.nbytes() for storage in storages.values())


def shares(trainer: Trainer) -> dict[str, float]:
    """Part of the whole that this process holds of what a step has made."""
    teacher, state = trainer.objective.teacher, trainer.optimizer.state.values()
    assert teacher.ema is not None
    groups: dict[str, list[Tensor | None]] = {
        "parameters": list(trainer.engine.parameters),
        "gradients": [p.grad for p in trainer.engine.parameters],
        "optimizer": [value for entry in state for value in entry.values()],
        "ema": list(teacher.ema.parameters()),
    }
    return {name: sum(map(held, group)) / sum(map(whole, group)) for name, group in groups.items()}


def messages(trainer: Trainer) -> Counter[str]:
    """How often the first step sends each kind of message; gradients are summed by ``reduce_scatter``."""
    with _Messages() as seen:
        trainer.train_step()
    return seen.number


class _Messages(TorchDispatchMode):
    """Counts messages."""

    def __init__(self) -> None:
        super().__init__()
        self.number: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # it comes again with the parts, and with what they send
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            name = str(func._schema.name).partition("::")[2].replace("_base_", "").strip("_")
            self.number[name.replace("allreduce", "all_reduce")] += 1
        return func(*args, **(kwargs or {}))


class _Watched(TorchDispatchMode):
    """Knows the tensors that operations have read or made; after every fifth operation measures those still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, weakref.ref[Tensor]] = {}
        self.peak = self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # it comes again with the parts
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.known[id(tensor)] = weakref.ref(tensor)
        self.number += 1
        if self.number % 5 == 0:
            self.peak = max(self.peak, self._bytes())
        return result

    def _bytes(self) -> int:
        found = {key: tensor for key, ref in self.known.items() if (tensor := ref()) is not None}
        self.known = {key: self.known[key] for key in found}
        storages = [tensor.untyped_storage() for tensor in found.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_of_reading(build: Callable[[], nn.Module]) -> int:
    """Most bytes of tensors alive at once while a network is made and its weights are read from files."""
    with _Watched() as watched:
        build()
    return watched.peak


def peak_of_building(build: Callable[[], nn.Module]) -> int:
    """Most bytes of tensors alive at once in this process while modules are put together, and at the end."""
    gc.collect()  # sharded modules refer to themselves in circles
    gc.freeze()  # what is there now is not looked at again and again
    seen = [_alive()]
    hook = register_module_module_registration_hook(lambda *_: seen.append(_alive()))
    try:
        network = build()
    finally:
        hook.remove()
    gc.collect()
    seen.append(_alive())
    gc.unfreeze()
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
