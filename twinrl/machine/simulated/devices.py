"""The mode in which "cuda" is a device without values."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed._tools.fake_collectives
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from twinrl.machine.simulated import pretended
from twinrl.machine.simulated.memory import Memory
from twinrl.machine.simulated.messages import Messages
from twinrl.machine.simulated.places import Places
from twinrl.machine.simulated.pretended import CUDA
from twinrl.machine.simulated.recipes import Recipes
from twinrl.machine.simulated.values import SMALL, Values
from twinrl.machine.simulated.waits import Waits
from twinrl.machine.simulated.work import Work

aten = torch.ops.aten
ANSWERS = (aten.equal.default, aten.is_nonzero.default)
SHAPES = (aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default)
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default)
WHERE = torch.ops.prim.device.default
WRAPPERS = frozenset({"DTensor", "AsyncCollectiveTensor"})


class Simulation(TorchDispatchMode):
    """Inside, tensors on "cuda" are fake and those on the CPU are computed.

    Arguments:
        places: reads where the program is.

    Attributes:
        memory, work, waits, messages: what is counted.
        guesses: lines where the program asked for a value that is not known, and was given a guess: one, true, all.
    """

    def __init__(self, places: Places):
        super().__init__()
        self.places = places
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.recipes, self.values = Recipes(self.fake), Values(self.fake)
        self.memory, self.work, self.waits, self.messages = Memory(places), Work(), Waits(places), Messages()
        self.guesses: dict[str, int] = {}

    @contextmanager
    def running(self) -> Iterator["Simulation"]:
        """Inside, there are devices."""
        lifts = torch._C._only_lift_cpu_tensors()
        with ExitStack() as stack:
            stack.enter_context(pretended.cuda(self.waits))
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))
            stack.callback(torch._C._set_only_lift_cpu_tensors, lifts)
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda"): made on the host, then moved
            stack.enter_context(self.memory.watching())
            stack.enter_context(self)
            yield self

    def forget(self) -> None:
        """Start to count again; what is in memory stays."""
        self.memory.forget()
        self.work.forget()
        self.waits.forget()
        self.messages.count.clear()
        self.messages.payload.clear()

    # --- operations -----------------------------------------------------------------------------------------

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would wrap every operation once more

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is WHERE and isinstance(args[0], FakeTensor):  # every second operation
            return args[0].fake_device
        if any(kind.__name__ in WRAPPERS for kind in types):  # they come again with their parts
            return NotImplemented
        kwargs = kwargs or {}
        tensors = list(_tensors(args))
        if kwargs:
            tensors += _tensors(kwargs.values())
        device = kwargs.get("device")
        wanted = None if device is None else torch.device(device).type
        if func is aten._pin_memory.default:
            return self._pinned(args[0].clone())
        if func is aten.is_pinned.default:
            return _is_pinned(args[0])
        if kwargs.get("pin_memory"):
            return self._pinned(func(*args, **{**kwargs, "pin_memory": False}))
        self.messages.note(func, args)
        if wanted != CUDA and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        return self._faked(func, types, args, kwargs, tensors, wanted)

    def _faked(self, func: Any, types: Any, args: Any, kwargs: Any, tensors: list[Tensor], wanted: str | None) -> Any:
        """An operation on the device."""
        if func is aten._local_scalar_dense.default:
            return self._number(args[0])
        if func in ANSWERS:
            return self._answer(func, args)
        if func is aten._to_copy.default:
            if self._copied(args[0], wanted or args[0].device.type, bool(kwargs.get("non_blocking"))):
                return self._brought(args[0], kwargs.get("dtype"))
        elif func is aten.copy_.default:
            target, source = args[0], args[1]
            written = not source.ndim  # a number that is assigned: torch fills with it
            if self._copied(source, target.device.type, written or (len(args) > 2 and bool(args[2])), written):
                return self._written(target, source)
        elif func in SHAPES:
            self.waits.note("shape")
            return self.values.lifted(func(self._values_of(args[0], 0), *args[1:], **kwargs))
        elif func in INDEXED:
            args = self._indexed(func, args)
        elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self.waits.note("shape")
        return self._run(func, types, args, kwargs, tensors)

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        self.waits.operations += 1
        out = self.recipes(func, types, args, kwargs, tensors)
        made = [out] if isinstance(out, Tensor) else list(_tensors(out)) if isinstance(out, list | tuple) else []
        self.values.follow(func, args, kwargs, tensors, made)
        self.memory.made(made)
        self.work.note(func, args, kwargs, tensors, out, made)
        return out

    def _pinned(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storage._pinned = True  # type: ignore[attr-defined]
        self.memory.pinned(storage)
        return tensor

    # --- what the host asks for -----------------------------------------------------------------------------

    def _values_of(self, tensor: Tensor, otherwise: int) -> Tensor:
        """The values of a tensor on the device; where they are not known, all are ``otherwise``."""
        value = self.values.known(tensor)
        if value is not None:
            return value
        line = self.places.here().line
        self.guesses[line] = self.guesses.get(line, 0) + 1
        return torch.full(tensor.shape, otherwise, dtype=tensor.dtype)

    def _number(self, tensor: Tensor) -> Any:
        self.waits.note("item", tensor.element_size())
        return self._values_of(tensor, int(tensor.dtype != torch.bool)).item()

    def _answer(self, func: Any, args: Sequence[Any]) -> Any:
        self.waits.note("item", 1)
        return func(*(self._values_of(arg, 1) if isinstance(arg, Tensor) else arg for arg in args))

    def _copied(self, source: Tensor, target: str, non_blocking: bool, pinned: bool = False) -> bool:
        """A tensor is copied to ``target``: the host may wait. True where it has to become a real one."""
        size, fake = source.numel() * source.element_size(), isinstance(source, FakeTensor)
        if not fake and target == CUDA:
            if not (non_blocking and (pinned or _is_pinned(source))):
                self.waits.note("to device", size)
            return False
        if fake and source.device.type == CUDA and target == "cpu":
            if not non_blocking:
                self.waits.note("to host", size)
            return True
        return fake and target == "cpu"

    def _brought(self, source: Tensor, dtype: torch.dtype | None) -> Tensor:
        otherwise = 0 if source.is_floating_point() else 1  # losses, norms: nothing that would be an event
        return self._values_of(source, otherwise).to(dtype or source.dtype).clone()

    def _written(self, target: Tensor, source: Tensor) -> Tensor:
        """``source`` is written into a tensor on the host. What is large and unknown would take memory for nothing."""
        value = self.values.known(source)
        if value is None and source.numel() > SMALL:
            return target
        return target.copy_(torch.ones(source.shape, dtype=source.dtype) if value is None else value)

    def _indexed(self, func: Any, args: Sequence[Any]) -> Sequence[Any]:
        """Boolean indices by their positions; indices on the CPU are copied by torch, which waits."""
        indices = [index for index in args[1] if isinstance(index, Tensor)]
        for index in indices:
            if not isinstance(index, FakeTensor) and isinstance(args[0], FakeTensor):
                self.waits.note("index", index.numel() * index.element_size())
        masks = [index for index in indices if index.dtype in (torch.bool, torch.uint8)]
        if not masks:
            return args
        if func is not aten.index.Tensor and len(args[1]) == 1 and args[2].ndim == 0:
            return args[0], [None], args[2]  # torch takes masked_fill_, which needs no size
        self.waits.note("shape")
        places: list[Any] = []
        for index in args[1]:
            is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            found = self._values_of(index, 1).nonzero().unbind(1) if is_mask else (index,)
            places += self.values.lifted(list(found)) if is_mask else found
        return args[0], places, *args[2:]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "_pinned", False)
