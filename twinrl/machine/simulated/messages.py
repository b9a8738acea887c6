"""What the ranks of a process group send each other, counted where torch hands it over.

The *payload* of a message is the tensor that every rank has in the end (gather), puts in (reduce-scatter) or both
(all-reduce). A ring sends (N−1)/N of it from every rank, twice that for an all-reduce.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "_allgather_base_": "gather", "allgather_": "gather", "_reduce_scatter_base_": "reduce-scatter",
    "allreduce_": "all-reduce", "all_reduce": "all-reduce", "broadcast_": "broadcast",
}  # fmt: skip
"""Operations of torch's process groups → what they are."""


@dataclass
class Messages(TorchDispatchMode):
    """Counts messages of this process while it is active, or as it is told.

    Attributes:
        count, payload: by kind; payloads in bytes.
    """

    count: dict[str, int] = field(default_factory=dict)
    payload: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # it comes again with the parts, and with what they send
            return NotImplemented
        self.note(func, args)
        return func(*args, **(kwargs or {}))

    def note(self, func: Any, args: Any) -> None:
        """An operation is run; if it sends something, that is counted."""
        if func.namespace not in ("c10d", "_c10d_functional"):
            return
        name = func._schema.name.partition("::")[2]
        if (kind := KINDS.get(name)) is not None:
            tensors = list(_tensors(args[1] if name == "_reduce_scatter_base_" else args[0]))
            self.count[kind] = self.count.get(kind, 0) + 1
            self.payload[kind] = self.payload.get(kind, 0) + sum(t.numel() * t.element_size() for t in tensors)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
