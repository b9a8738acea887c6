"""The bytes of a training step beyond what is held between steps, found by taking the step without values.

Networks without values (torch's ``FakeTensorMode``: shapes, dtypes, autograd, autocast and what kernels return, but no
numbers) go forward and backward at their real sizes in seconds on any machine, while every storage that is made and let
go is counted. Not counted: workspaces inside kernels, the allocator's rounding, and what fragmentation costs.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from twinrl.flow.conditions import Condition


class Counted(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside make, as long as they live.

    Arguments:
        known: tensors that are there already.

    Attributes:
        now, peak: bytes alive; the most so far.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        self.leave_out(known)

    def leave_out(self, tensors: Iterable[Tensor]) -> None:
        """These do not count (any longer): they are held between steps."""
        for storage in (tensor.untyped_storage() for tensor in tensors):
            if id(storage) in self._sizes:
                self.now -= self._sizes[id(storage)]
                self._sizes[id(storage)] = 0
            else:
                self._watch(storage, 0)
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what it returns."""
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._made, out)
        return out

    def _made(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            self._watch(storage, storage.nbytes())

    def _watch(self, storage: torch.UntypedStorage, size: int) -> None:
        self._sizes[id(storage)] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, id(storage))

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def without_values() -> AbstractContextManager[Any]:
    """Tensors made inside have shapes and no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def strip(module: nn.Module, low: torch.dtype | None = None) -> None:
    """Parameters and buffers without values in place of a module's own (usually on the meta device).

    Called inside :func:`without_values`. ``low``: dtype of parameters instead of their own.
    """
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied weights stay tied
                    is_parameter = isinstance(tensor, nn.Parameter)
                    dtype = low if is_parameter and low is not None else tensor.dtype
                    empty = torch.empty(tensor.shape, dtype=dtype, device="cpu")
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                held[name] = made[id(tensor)]  # type: ignore[assignment]


def backward(
    network: nn.Module,
    x: Tensor,
    condition: Condition,
    low: torch.dtype | None,
    reward: Callable[[Tensor], object] | None = None,
) -> int:
    """Bytes at the peak of a micro-batch's passes, beyond parameters and gradients.

    While the student's graph is kept a teacher of the same shape is asked for targets, then the reward, and the graph
    is freed by the backward pass.

    Arguments:
        network: stripped, see :func:`strip`.
        x: (B, C, h, w) latents of a micro-batch. condition: of its rows.
        low: dtype of the autocast; None where there is none.
        reward: asks the reward for the gradient at these latents.
    """

    def predict() -> Tensor:
        with nullcontext() if low is None else torch.autocast("cpu", low):
            velocity: Tensor = network(x, torch.ones(len(x)), torch.zeros(len(x)), condition)
        return velocity.float()

    network.train()
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)  # of an earlier micro-batch
    held = [*network.parameters(), *network.buffers(), *(p.grad for p in trained if p.grad is not None)]
    with Counted([*held, x, *condition.values()]) as count:
        prediction = predict()
        with torch.no_grad():
            target = predict()
            if reward is not None:
                reward(target)
        (prediction - target).square().mean().backward()
    for parameter in trained:
        parameter.grad = None
    return count.peak


def update(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], network: nn.Module, together: bool) -> int:
    """Bytes at the peak of an optimizer's step, beyond parameters, gradients and the optimizer's own tensors.

    Arguments:
        make: builds the optimizer. network: stripped.
        together: all parameters in one operation, torch's default on a GPU, whose temporaries are as large as they.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer = make(trained)
    for group in optimizer.param_groups:
        group["foreach"] = together
    optimizer.step()
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, Tensor)]
    with Counted([*trained, *(p.grad for p in trained if p.grad is not None), *state]) as count:
        optimizer.step()
    return count.peak
