"""What torch.cuda has where there is CUDA and the program needs: streams and events that do nothing, one device of 8.

Attention goes to the kernel that a GPU takes, since torch without CUDA would compute the whole matrix.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes

from twinrl.machine.simulated.waits import Waits

CUDA = "cuda"
DEVICES = 8
FLASH_WIDTH = 256
"""Widest heads of flash attention."""
FORMULAS = ("silu_backward", "mish_backward")
"""Operations that a torch without CUDA would take apart before anybody sees them, for want of a kernel."""


class Stream:
    """Of a device; everything is in order anyway."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def _nothing(self, *_: Any) -> None:
        pass

    wait_event = wait_stream = synchronize = _nothing


class Event(torch.Event):
    """Of a stream. A torch.Event by class, since FSDP asks; without a device."""

    def __new__(cls, *_: Any, **__: Any) -> "Event":
        return torch.Event.__new__(cls, device="cpu")

    def __init__(self, *_: Any, **__: Any):
        pass

    def _nothing(self, stream: Any = None) -> None:
        pass

    record = wait = _nothing

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Handle:
    """torch.cuda for FSDP and device meshes."""

    Stream, Event = Stream, Event

    @staticmethod
    def current_stream(*_: Any) -> Any:
        return Stream()

    @staticmethod
    def stream(_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def device_count() -> int:
        return DEVICES

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def device(_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    @staticmethod
    def get_rng_state(_: Any = 0) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)

    @staticmethod
    def _nothing(*_: Any, **__: Any) -> None:
        pass

    set_device = set_rng_state = synchronize = _nothing


@contextmanager
def cuda(waits: Waits) -> Iterator[None]:
    """Inside, torch has it."""
    import torch.distributed.device_mesh as mesh
    import torch.distributed.fsdp._fully_shard
    import torch.distributed.tensor._random

    def synchronize(*_: Any) -> None:
        waits.note("stream")

    there: dict[str, Any] = {
        "torch.cuda._lazy_init": Handle._nothing, "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.set_device": Handle._nothing, "torch.cuda.current_device": Handle.current_device,
        "torch.cuda.default_generators": tuple(torch.Generator() for _ in range(DEVICES)),
        "torch.cuda.get_rng_state": Handle.get_rng_state, "torch.cuda.set_rng_state": Handle._nothing,
        "torch.cuda.get_device_capability": lambda *_: (9, 0), "torch.cuda.synchronize": synchronize,
        "torch.cuda.current_stream": Handle.current_stream, "torch.accelerator.current_stream": Handle.current_stream,
        "torch.cuda.Stream": Stream, "torch.cuda.Event": Event, "torch.cuda.stream": Handle.stream,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.utils.checkpoint.DefaultDeviceType._default_device_type": CUDA,
        # the class of a fake parameter is FakeTensor; torch joins parameters in one operation by their class
        **{f"{name}._foreach_supported_types": [*importlib.import_module(name)._foreach_supported_types, FakeTensor]
           for name in ("torch.optim.optimizer", "torch.utils._foreach_utils")},
    }  # fmt: skip
    real, composite = mesh._get_device_handle, nn.functional.scaled_dot_product_attention
    with ExitStack() as stack:
        for name, value in there.items():
            stack.enter_context(mock.patch(name, value))
        for name, module in list(sys.modules.items()):
            if name.startswith("torch.distributed") and getattr(module, "_get_device_handle", None) is real:
                stack.enter_context(mock.patch.object(module, "_get_device_handle", _handle(real)))
            for known in [key for key, value in getattr(module, "__dict__", {}).items() if value is composite]:
                stack.enter_context(mock.patch.object(module, known, _attention(composite)))
        if torch.version.cuda is None:
            kernels = torch.library.Library("aten", "IMPL")
            stack.callback(kernels._destroy)
            for name in FORMULAS:
                kernels.impl(name, Handle._nothing, "CUDA")
        stack.enter_context(mock.patch.object(nn.Module, "to", _moved(nn.Module.to)))
        inferring = ShardingPropagator._propagate_tensor_meta_non_cached
        stack.enter_context(mock.patch.object(ShardingPropagator, inferring.__name__, _elsewhere(inferring)))
        # one copy, as torch does; FakeTensor's own asks number by number
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()))
        yield


def _elsewhere(action: Callable[..., Any]) -> Callable[..., Any]:
    """DTensor infers shapes from whole tensors that it makes for that: they are on no device."""

    def act(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return action(*args, **kwargs)

    return act


def _handle(real: Callable[..., Any]) -> Callable[..., Any]:
    return lambda kind=CUDA: Handle if kind == CUDA else real(kind)


def _moved(to: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``Module.to``: torch swaps the tensors of a module with fake ones in a way that these do not take. What is on the
    meta device gets memory."""

    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        tensors = [*module.parameters(), *module.buffers()]
        hollow = any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in tensors)
        if device is None or (device.type != CUDA and not hollow):
            return to(module, *args, **kwargs)
        there: dict[int, Tensor] = {}  # tied weights stay tied
        for part in module.modules():
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        if id(tensor) not in there:
                            there[id(tensor)] = _one(tensor, device, dtype)
                        held[name] = there[id(tensor)]  # type: ignore[assignment]
        return module

    return moved


def _one(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if wanted == tensor.dtype and (device is None or device.type == tensor.device.type):
        return tensor
    there = device or tensor.device
    make = torch.empty_like if tensor.is_floating_point() else torch.zeros_like  # of integers, that may be positions
    new = make(tensor, dtype=wanted, device=there) if tensor.is_meta else tensor.detach().to(there, wanted)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


# --- attention ----------------------------------------------------------------------------------------------


def _attention(composite: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Flash attention in 16 bits without a mask, else the memory-efficient kernel; on the CPU as before."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
        if query.device.type != CUDA:
            return composite(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        q, k, v = (_cast(tensor) for tensor in (query, key, value))
        if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= FLASH_WIDTH:
            flash = torch.ops.aten._scaled_dot_product_flash_attention
            return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
        needs = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, _bias(attn_mask, q, k), needs, dropout_p, is_causal, scale=scale)[0]

    return attend


def _cast(tensor: Tensor) -> Tensor:
    return tensor.to(torch.get_autocast_dtype(CUDA)) if torch.is_autocast_enabled(CUDA) else tensor


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """What is added to the scores (B, heads, queries, keys), as the kernel takes it."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    return mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
