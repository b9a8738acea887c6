"""Tensors of which a rank holds a part."""

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing its memory; of one that is kept in 8 bits, its numbers."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor.dequantize() if hasattr(tensor, "codes") else tensor


def own_memory(module: nn.Module, arguments: Any, output: Any) -> Any:
    """What a module returns, views copied.

    FSDP2 gathers parameters again when a gradient comes to what a module has returned. An operation in place on a view
    would take that hook away.

    *When to use*: as a forward hook of whatever may be sharded, before it is.
    """
    return tree_map_only(Tensor, lambda t: t.clone() if t.requires_grad and t._is_view() else t, output)
