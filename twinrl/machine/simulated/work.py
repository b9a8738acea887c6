"""What the device has to compute and to move, and how long that takes at least (a roofline).

An operation takes as long as its arithmetic at the device's peak, or as its tensors through the device's memory,
whichever is longer. Real kernels take more; what is small is bound by how fast the host asks for it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry


class GPU(NamedTuple):
    """By its data sheet: dense, without sparsity.

    Attributes:
        half, single: arithmetic of matrix products in 16 bits and in float32 (no TF32), operations a second.
        memory: bytes a second. capacity: bytes.
    """

    half: float
    single: float
    memory: float
    capacity: float


GPUS = {
    "H100": GPU(989e12, 67e12, 3.35e12, 80e9),
    "H200": GPU(989e12, 67e12, 4.8e12, 141e9),
    "A100": GPU(312e12, 19.5e12, 2.04e12, 80e9),
    "4090": GPU(165e12, 82.6e12, 1.01e12, 24e9),
}
"""By name: SXM boards, the A100 with 80 GB."""
HALF = (torch.bfloat16, torch.float16)


class Cost(NamedTuple):
    """Of one operation: floating-point operations, bytes read and written, whether it computes in 16 bits."""

    flops: int
    moved: int
    half: bool


class Estimate(NamedTuple):
    """Of a step on a GPU: seconds at least, and which share of its peak in 16 bits that is."""

    seconds: float
    share: float

    @classmethod
    def of(cls, flops: int, seconds: float, gpu: GPU) -> "Estimate":
        """Of so much arithmetic in so much time."""
        return cls(seconds, flops / (seconds * gpu.half) if seconds else 0.0)


@dataclass
class Work:
    """Counts it.

    Attributes:
        operations: on the device. costs: how often operations of equal cost were run.
    """

    operations: int = 0
    costs: Counter[Cost] = field(default_factory=Counter)

    def note(self, func: Any, args: Any, kwargs: Any, tensors: Iterable[Tensor], out: Any, made: Iterable[Any]) -> None:
        """An operation on the device was run: of ``tensors``, to the tensors ``made``."""
        if func.is_view:
            return
        self.operations += 1
        count = flop_registry.get(func._overloadpacket)
        flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
        seen = [t for t in (*tensors, *made) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in seen)
        self.costs[Cost(flops, moved, any(t.dtype in HALF for t in seen))] += 1

    @property
    def flops(self) -> int:
        """In all."""
        return sum(cost.flops * n for cost, n in self.costs.items())

    @property
    def moved(self) -> int:
        """Bytes in all."""
        return sum(cost.moved * n for cost, n in self.costs.items())

    def on(self, gpu: GPU) -> Estimate:
        """How long it takes there at least."""
        seconds = sum(
            max(cost.flops / (gpu.half if cost.half else gpu.single), cost.moved / gpu.memory) * n
            for cost, n in self.costs.items()
        )
        return Estimate.of(self.flops, seconds, gpu)

    def forget(self) -> None:
        """Start to count again."""
        self.operations = 0
        self.costs.clear()
