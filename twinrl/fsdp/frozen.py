"""Frozen models of which every process keeps its part, and has the whole while it uses it.

VAE, text encoders and reward models are idle while the student trains. Between uses a process keeps 1/N of each one's
numbers; :func:`twinrl.machine.visiting.visiting`, inside which they are used anyway, brings the whole together in one
message for each dtype, and lets go of it afterwards.

Not ``fully_shard``: that gathers whenever a block runs, so every process would have to run it equally often. A reward's
text tower, for one, runs once for every prompt that *this* process has not met before. Uses as a whole are equal on all
processes: they make the same steps with equally many rows, and validation is made by all of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

ALIGNED = 64
"""Bytes to a multiple of which tensors begin, as in memory of their own, so that kernels compute the same."""


class Parted:
    """A frozen module of which this process keeps one of N equal parts; made by all processes alike.

    Between uses its floating-point tensors are stand-ins of one NaN, so that a use outside a visit shows.

    Arguments:
        module: with the same values in all processes, where it is used.
        group: the processes that share it.

    Raises:
        ValueError: it has parameters that are trained.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup):
        self.group, self.whole = group, False
        self.world, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.homes: dict[Tensor, list[tuple[dict[str, Any], str]]] = {}  # stand-in → where it stands
        self.own: dict[torch.dtype, Tensor] = {}
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        places: dict[Tensor, list[tuple[dict[str, Any], str]]] = {}  # a tied tensor has several
        for held, name, tensor in _tensors(module):
            places.setdefault(tensor, []).append((held, name))
        for tensor in places:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        self.order: dict[torch.dtype, list[Tensor]] = {}
        for dtype, tensors in by_dtype.items():
            self.own[dtype] = self._part(tensors)
            self.order[dtype] = [self._stand_in(tensor, places[tensor]) for tensor in tensors]

    def _part(self, tensors: list[Tensor]) -> Tensor:
        """This process's part of all the tensors' numbers, one behind the other."""
        each = self._each(tensors)
        own = torch.zeros(each, dtype=tensors[0].dtype, device=tensors[0].device)
        first, at = self.rank * each, 0
        for tensor in tensors:
            start, end = max(at, first), min(at + tensor.numel(), first + each)
            if start < end:
                own[start - first : end - first] = tensor.detach().reshape(-1)[start - at : end - at]
            at += _padded(tensor)
        return own

    def _each(self, tensors: list[Tensor]) -> int:
        return -(-sum(map(_padded, tensors)) // self.world)

    def _stand_in(self, tensor: Tensor, places: list[tuple[dict[str, Any], str]]) -> Tensor:
        empty = torch.full((), torch.nan, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        stand_in = nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty
        self.homes[stand_in] = places
        for held, name in places:
            held[name] = stand_in
        return stand_in

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, the module is whole; entered by all processes, or by none. A second time inside does nothing."""
        if self.whole:
            yield
            return
        for dtype, own in self.own.items():
            gathered = torch.empty(self.world * len(own), dtype=dtype, device=own.device)
            dist.all_gather_into_tensor(gathered, own, group=self.group)
            self._fill(self.order[dtype], gathered)
        self.whole = True
        try:
            yield
        finally:
            self.whole = False
            for stand_in, places in self.homes.items():
                for held, name in places:
                    held[name] = stand_in

    def _fill(self, stand_ins: list[Tensor], gathered: Tensor) -> None:
        at = 0
        for stand_in in stand_ins:
            values: Tensor = gathered[at : at + stand_in.numel()].view(stand_in.shape)
            values = nn.Parameter(values, requires_grad=False) if isinstance(stand_in, nn.Parameter) else values
            for held, name in self.homes[stand_in]:
                held[name] = values
            at += _padded(stand_in)


def _tensors(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Floating-point parameters and buffers that take more than a few bytes: owner's dict, name in it, tensor."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_floating_point() or tensor.ndim == 0:
                    continue
                if tensor.requires_grad:
                    raise ValueError(f"only frozen modules are kept in parts; {name} is trained")
                yield held, name, tensor


def _padded(tensor: Tensor) -> int:
    """Numbers that a tensor takes, up to where the next one may begin."""
    multiple = ALIGNED // tensor.element_size()
    return -(-tensor.numel() // multiple) * multiple
